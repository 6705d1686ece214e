"""From what was counted to what is quoted."""

from pathlib import Path

import pytest

from bench import report
from bench.figures import rows_of
from bench.measure import Settings, Visit
from bench.orders import Result
from bench.proc import Memory


def result(**changes: object) -> Result:
    values: dict[str, object] = {
        "completed": 1_000,
        "chunks": 0,
        "errors": 0,
        "first_error": "",
        "seconds": 2.0,
        "cpu_us": 60_000,
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "first_chunk_p50_ms": 0.5,
        "generator_busy": 0.5,
        "queued": 0,
        "asked": 1_200,
    }
    return Result(**values | changes)  # type: ignore[arg-type]


def visit(subject: str, number: int, *, upstream_calls: int = 1_200, **results: Result) -> Visit:
    memory = Memory(rss_kb=40_960, pss_kb=None)
    return Visit(subject, number, 0.25, memory, memory, dict(results), upstream_calls)


def test_cpu_per_request_is_the_median_of_the_rounds() -> None:
    visits = [visit("gateway", turn, plain=result(cpu_us=us)) for turn, us in enumerate((60_000, 50_000, 90_000))]
    found = rows_of(visits)[0].figures["cpu_us_per_request"]
    assert found == (60.0, 50.0, 90.0, 3)


def test_added_latency_is_taken_against_direct_of_the_same_round() -> None:
    visits = [
        visit("direct", 0, open_50=result(p50_ms=1.0)),
        visit("gateway", 0, open_50=result(p50_ms=1.5)),
        visit("gateway", 1, open_50=result(p50_ms=9.0)),
        visit("direct", 1, open_50=result(p50_ms=8.0)),
    ]
    direct, gateway = rows_of(visits)
    assert gateway.figures["added_p50_50_ms"] == (0.75, 0.5, 1.0, 2)
    assert "added_p50_50_ms" not in direct.figures


def test_what_was_not_measured_is_absent() -> None:
    row = rows_of([visit("gateway", 0, plain=result(completed=0, cpu_us=0))])[0]
    assert "cpu_us_per_request" not in row.figures
    assert "pss_after_mb" not in row.figures
    assert row.figures["rss_after_mb"].median == 40.0


@pytest.mark.parametrize(
    "broken, complaint",
    [
        (
            visit("gateway", 0, plain=result(errors=3, first_error="HTTP/1.1 500")),
            "3 errors, the first: HTTP/1.1 500",
        ),
        (visit("gateway", 0, plain=result(completed=0)), "no call completed"),
        (
            visit("gateway", 0, plain=result(), upstream_calls=1_201),
            "1200 calls asked, 1201 reached the upstream",
        ),
        (visit("gateway", 0, open_50=result(queued=4)), "4 calls waited"),
        (Visit("gateway", 0, failure="RuntimeError: no such option"), "no such option"),
    ],
)
def test_whatever_is_not_clean_is_told(broken: Visit, complaint: str) -> None:
    assert complaint in " ".join(rows_of([broken])[0].complaints)


def test_a_clean_visit_has_no_complaints() -> None:
    assert rows_of([visit("gateway", 0, plain=result())])[0].complaints == []


def test_a_throughput_that_the_generator_limited_is_marked() -> None:
    rows = rows_of([visit("nginx", 0, plain=result(generator_busy=0.97)), visit("naive", 0, plain=result())])
    page = report.markdown(rows, report.Setting("machine", "software", "cores", "0", Settings(), {}))
    assert "| req/s | 500† | 500 |" in page


def test_the_page_is_changed_between_its_marks_only(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    setting = report.Setting("machine", "software", "cores", "0", Settings(), {"nginx": "not installed"})
    report.write_into_page(page, rows_of([visit("gateway", 0, plain=result())]), setting)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "nginx: not installed" in text


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("nothing here")
    setting = report.Setting("machine", "software", "cores", "0", Settings(), {})
    with pytest.raises(ValueError, match="no place for results"):
        report.write_into_page(page, [], setting)
    assert page.read_text() == "nothing here"
