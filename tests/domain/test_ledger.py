"""What the journal says of an attempt, and the one row that becomes of it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.domain.call import CallRecord
from gateway.domain.ledger import Amounts, Dimensions, Held, InDoubt, LedgerRow, Line, Posted, Void, row_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNTS = st.integers(0, 2**53)
AMOUNTS = st.builds(Amounts, COUNTS, COUNTS, COUNTS)
DIMENSIONS = st.builds(Dimensions, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS, TEXTS)
HELD = st.builds(Held, TEXTS, COUNTS, TEXTS, DIMENSIONS, AMOUNTS)
ENDS = st.one_of(
    st.builds(Posted, TEXTS, AMOUNTS, st.sampled_from(("exact", "estimate", "bound")), COUNTS, COUNTS),
    st.builds(Void, TEXTS),
    st.builds(InDoubt, TEXTS),
)


@given(HELD | ENDS)
def test_a_line_comes_back_as_it_was_and_as_what_it_was(line: Line) -> None:
    assert msgspec.json.decode(msgspec.json.encode(line), type=Line) == line


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (Held("r.1", 5, "dev", Dimensions(agent="a"), Amounts(7, 1, 9)),
         b'{"event":"held","id":"r.1","at_ms":5,"env":"dev","on":["a","","","inference","",""],"amounts":[7,1,9]}'),
        (Posted("r.1", Amounts(7, 1, 9)), b'{"event":"posted","id":"r.1","amounts":[7,1,9]}'),
        (Void("r.1"), b'{"event":"void","id":"r.1"}'),
        (InDoubt("r.1"), b'{"event":"in_doubt","id":"r.1"}'),
        (CallRecord(id="r", at_ms=5, env="dev"), b'{"event":"call","id":"r","at_ms":5,"env":"dev"}'),
    ],
)  # fmt: skip
def test_how_a_line_is_written_is_how_it_can_be_read_for_years(line: Line, text: bytes) -> None:
    assert msgspec.json.encode(line) == text
    assert msgspec.json.decode(text, type=Line) == line
    # A newer gateway may say more.
    assert msgspec.json.decode(text[:-1] + b',"of_tomorrow":1}', type=Line) == line


def test_a_line_without_its_kind_is_not_guessed_at() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"id":"r.1"}', type=Line)


@given(HELD, ENDS)
def test_a_row_is_the_hold_s_in_all_but_what_it_came_to(held: Held, end: Posted | Void | InDoubt) -> None:
    row = row_of(held, end)
    assert (row.id, row.at_ms, row.env, row.on, row.source) == (held.id, held.at_ms, held.env, held.on, "gateway")
    if isinstance(end, Posted):
        assert (row.state, row.amounts, row.basis) == ("posted", end.amounts, end.basis)
        assert (row.prompt_tokens, row.completion_tokens) == (end.prompt_tokens, end.completion_tokens)
    elif isinstance(end, Void):
        assert (row.state, row.amounts, row.basis) == ("void", Amounts(), "none")
    else:
        # All of it, for nobody knows.
        assert (row.state, row.amounts, row.basis) == ("in_doubt", held.amounts, "bound")


def test_what_is_left_out_is_nothing_by_nobody_for_an_ordinary_call() -> None:
    assert Amounts() == (0, 0, 0)
    assert Dimensions() == ("", "", "", "inference", "", "")
    row = LedgerRow(id="r.1", at_ms=1, env="dev", on=Dimensions(), amounts=Amounts())
    assert (row.state, row.basis, row.source, row.note) == ("posted", "exact", "gateway", "")
