"""A number and its noun agree."""

import pytest

from gateway.domain.words import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 torn lines"), (1, "1 torn line"), (2, "2 torn lines"), (1_200, "1,200 torn lines")]
)
def test_one_is_one_and_all_else_are_many(number: int, said: str) -> None:
    assert counted(number, "torn line") == said
