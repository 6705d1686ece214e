"""The benchmark of money runs and measures what it says; its figures are for docs/benchmarks.md, not for tests."""

from bench.money import ROWS_PER_SYNC, measure


def test_every_step_is_measured() -> None:
    figures = measure(1, ROWS_PER_SYNC)
    assert [figure.step.partition(":")[0].partition(",")[0] for figure in figures] == [
        "reserve + settle", "journal", "off the hot path"
    ]  # fmt: skip
    assert all(figure.us > 0 for figure in figures)
