"""The benchmark of telemetry runs and measures what it says; its figures are for docs/benchmarks.md, not for tests."""

from bench.telemetry import measure


def test_every_case_is_measured() -> None:
    figures = dict(measure(1, 100))
    assert list(figures) == [
        "nobody exports", "... and the caller is in a trace", "exported, not sampled", "... by the caller's decision",
        "exported and sampled",
    ]  # fmt: skip
    assert all(us > 0 for us in figures.values())
