"""The scorecard: what the sixteen tests of test_sixteen.py saw, a line for each fault, at the end of a run."""

import re
from collections.abc import Iterator

import pytest

SCENARIOS = {
    "S01": "429 once, Retry-After: 2",
    "S02": "429 without Retry-After, persistent",
    "S03": "500 once",
    "S04": "503 persistent",
    "S05": "TCP reset before headers",
    "S06": "accepts, never answers",
    "S07": "headers, and no first token",
    "S08": "stream cut after 40 of 60 tokens",
    "S09": "stream stalls, connection open",
    "S10": "malformed event in mid-stream",
    "S11": "stream complete, no [DONE]",
    "S12": "400 context_length_exceeded",
    "S13": "400 content filter",
    "S14": "cut, and the fallback takes no prefill",
    "S15": "down for 60 s, then healthy, 20 calls",
    "S16": "503, and the fallback answers",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print it, where any of the sixteen ran. A fault passes where each of its tests does."""
    found: dict[str, list[pytest.TestReport]] = {}
    for report in _reports(terminalreporter):
        number = re.search(r"test_sixteen\.py::test_(s\d\d)_", report.nodeid)
        if number is not None:
            found.setdefault(number[1].upper(), []).append(report)
    if not found:
        return
    terminalreporter.section("sixteen faults, streaming, through the gateway")
    for number, title in SCENARIOS.items():
        reports = found.get(number, [])
        verdict = "not run" if not reports else "FAIL" if any(one.failed for one in reports) else "pass"
        saw = next((text for one in reports for name, text in one.user_properties if name == "saw"), "")
        terminalreporter.write_line(f"{number}  {title:<39} {verdict:<8}{saw if verdict == 'pass' else ''}".rstrip())
    passed = sum(not any(one.failed for one in reports) for reports in found.values())
    terminalreporter.write_line(f"{passed} of {len(SCENARIOS)} pass")


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            # Of a test that passed, only its own report; of one that did not, also its set-up's.
            if isinstance(report, pytest.TestReport) and (report.when == "call" or report.failed):
                yield report
