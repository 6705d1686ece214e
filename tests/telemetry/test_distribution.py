"""Histograms: which bucket a value falls into, and whose exemplar stands there."""

from gateway.telemetry.distribution import Distribution, Exemplar


def exemplar(value: float, span_id: str = "1" * 16) -> Exemplar:
    return Exemplar("a" * 32, span_id, value, 1_000.0)


def test_an_edge_belongs_to_its_own_bucket() -> None:
    seen = Distribution((1, 10, 100))
    for value in (0, 1, 1.0001, 10, 99.9, 100, 100.1, 5_000):
        seen.add(value)
    assert [bucket[:2] for bucket in seen.buckets()] == [("1", 2.0), ("10", 4.0), ("100", 6.0), ("+Inf", 8.0)]
    assert (seen.count, seen.sum) == (8, sum((0, 1, 1.0001, 10, 99.9, 100, 100.1, 5_000)))


def test_an_exemplar_stands_at_the_bucket_of_its_value_and_nowhere_else() -> None:
    seen = Distribution((1, 10, 100))
    for value in (1, 10.5, 1e9):
        seen.exemplify(exemplar(value))
    assert [left and left.value for _, _, left in seen.buckets()] == [1, None, 10.5, 1e9]


def test_the_last_exemplar_of_a_bucket_wins_so_that_there_are_no_more_than_buckets() -> None:
    seen = Distribution((1, 10))
    assert seen.exemplars is None
    for number in range(1_000):
        seen.exemplify(exemplar(number % 20, f"{number:016x}"))
    assert seen.exemplars is not None
    assert len(seen.exemplars) == 3
    assert {left.span_id for left in seen.exemplars.values()} == {f"{number:016x}" for number in (981, 990, 999)}
