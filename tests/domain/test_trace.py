"""Trace context and baggage: what is in order is read and written again, and what is not is as if it had not come."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.domain.trace import (
    MAX_BAGGAGE_CHARS,
    MAX_STATE_CHARS,
    Parent,
    bound_of,
    is_below,
    read_baggage,
    read_parent,
    read_state,
    write_parent,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("came", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, 1)),
        (f"00-{TRACE}-{SPAN}-00", Parent(TRACE, SPAN, 0)),
        # The random flag is kept; flags that nobody knows are not.
        (f"00-{TRACE}-{SPAN}-03", Parent(TRACE, SPAN, 3)),
        (f"00-{TRACE}-{SPAN}-ff", Parent(TRACE, SPAN, 3)),
        (f"  00-{TRACE}-{SPAN}-01 ", Parent(TRACE, SPAN, 1)),
        # Of a later version the part that we know holds.
        (f"01-{TRACE}-{SPAN}-01-more", Parent(TRACE, SPAN, 1)),
        (f"cc-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, 1)),
    ],
)
def test_a_parent_in_order_is_read(came: str, found: Parent) -> None:
    assert read_parent([came]) == found


@pytest.mark.parametrize(
    "came",
    [
        "", "00", "nonsense", "00-" + "-" * 50,
        f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-01-", f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01", f"0-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE[:-1]}g-{SPAN}-01", f"00-{TRACE}-{SPAN[:-1]}-01",
        f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-01more",
        "00-" + "٣" * 32 + f"-{SPAN}-01",
    ],
)  # fmt: skip
def test_a_parent_out_of_order_is_none(came: str) -> None:
    assert read_parent([came]) is None


def test_two_parents_are_none() -> None:
    assert read_parent([]) is None
    assert read_parent([f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01"]) is None


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), st.integers(0, 3))
def test_what_is_written_opentelemetry_reads_the_same(trace: bytes, span: bytes, flags: int) -> None:
    header = write_parent(trace.hex(), span.hex(), flags)
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": header})).get_span_context()
    ours = read_parent([header])
    assert theirs.is_valid == (ours is not None)
    if ours is not None:
        assert (theirs.trace_id, theirs.span_id) == (int(ours.trace_id, 16), int(ours.span_id, 16))
        assert theirs.trace_flags.sampled == ours.is_sampled


@given(st.text(max_size=80))
def test_no_header_raises(text: str) -> None:
    read_parent([text])
    read_state([text])
    read_baggage([text])


@pytest.mark.parametrize(
    ("came", "kept"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["rojo=1", "congo=2"], "rojo=1,congo=2"),
        (["rojo=1, ,congo=2,"], "rojo=1,congo=2"),
        (["tenant@vendor=a b"], "tenant@vendor=a b"),
        ([], ""),
        # As one is broken, none is believed.
        (["rojo=1,=2"], ""),
        (["rojo=1,rojo=2"], ""),
        (["Rojo=1"], ""),
        (["rojo=grün"], ""),
        (["rojo=1=2"], ""),
        ([",".join(f"k{number}=1" for number in range(33))], ""),
    ],
)
def test_state_is_kept_whole_or_not_at_all(came: list[str], kept: str) -> None:
    assert read_state(came) == kept


def test_of_too_long_a_state_the_long_and_the_old_go_first() -> None:
    long = "l=" + "x" * 200
    short = [f"k{number}=" + "y" * 50 for number in range(12)]
    kept = read_state([",".join([long, *short])])
    assert len(kept) <= MAX_STATE_CHARS
    assert kept.split(",") == short[:9]
    assert read_state([long]) == long


@pytest.mark.parametrize(
    ("came", "kept"),
    [
        (["userId=alice,serverNode=DF%2028"], "userId=alice,serverNode=DF%2028"),
        (["key1=value1;property1;p2=v2, key2 = value2"], "key1=value1;property1;p2=v2,key2 = value2"),
        (["a=1", "b=2"], "a=1,b=2"),
        ([""], ""),
        (["a=1,b"], ""),
        (["a=ü"], ""),
        (['a="quoted"'], ""),
        (["a=" + "x" * MAX_BAGGAGE_CHARS], ""),
        ([",".join(f"k{number}=1" for number in range(65))], ""),
    ],
)
def test_baggage_is_kept_whole_or_not_at_all(came: list[str], kept: str) -> None:
    assert read_baggage(came) == kept


@pytest.mark.parametrize(
    ("came", "is_kept"),
    [
        ("a=1" + ";b= " * 2_000, True),
        ("a=1" + ";b= " * 2_000 + "\\", False),
        ("a=" + " " * 8_000 + "1", True),
        ("a=" + " " * 8_000 + "\\", False),
        ("a" + " " * 8_000 + "\\", False),
        ("a=1" + " " * 8_000 + "\\", False),
        ("a=1;" + " " * 8_000 + "\\", False),
        ("a=1;b" + " ;" * 4_000 + "\\", False),
        ("a" * 8_000 + "\\", False),
        ("a=1;" + "b" * 8_000 + "\\", False),
        ("=" * 8_000 + "\\", False),
    ],
    ids=range(11),
)
def test_baggage_that_is_made_to_be_hard_to_read_is_read_at_once(came: str, is_kept: bool) -> None:
    # The first two would have taken a regular expression with two ways to match a blank 2**2000 steps.
    assert len(came) <= MAX_BAGGAGE_CHARS
    assert bool(read_baggage([came])) == is_kept


def test_state_and_parent_that_are_made_to_be_hard_to_read_are_read_at_once() -> None:
    for hard in (
        "a" * 8_000,
        "a=" + " " * 8_000,
        "a" * 255 + "=" + " " * 255,
        "a@" * 4_000,
        "a=" + "b" * 255 + " " * 8_000,
    ):
        assert read_state([hard + "\n"]) == ""
        assert read_parent([f"01-{TRACE}-{SPAN}-01-" + hard + "\n\n."]) is None


_GRAMMAR = re.compile(
    r"(?:{token}){blank}={blank}(?:{value})(?:{blank};{blank}(?:{token})(?:{blank}={blank}(?:{value}))?)*".format(
        token=r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+",
        blank=r"[ \t]*",
        value=r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*",
    )
)


@given(st.text('ab=;; \t\\"\x0b\xa0', max_size=14))
def test_an_entry_is_baggage_if_it_is_by_the_recommendations_grammar(entry: str) -> None:
    entry = entry.strip(" \t")
    # As the recommendation has it, in one piece; which only texts as short as these may be read with.
    assert bool(read_baggage([entry])) == (_GRAMMAR.fullmatch(entry) is not None)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.text(max_size=20), max_size=9))
def test_baggage_that_opentelemetry_writes_is_kept(entries: dict[str, str]) -> None:
    context = None
    for name, value in entries.items():
        context = baggage.set_baggage(name, value, context)
    carrier: dict[str, str] = {}
    W3CBaggagePropagator().inject(carrier, context)
    written = carrier.get("baggage", "")
    assert read_baggage([written] if written else []) == written


@given(st.integers(1, 2**128 - 1), st.floats(0, 1))
def test_the_ratio_chooses_the_traces_that_opentelemetry_chooses(trace: int, ratio: float) -> None:
    theirs = TraceIdRatioBased(ratio).should_sample(None, trace, "").decision is Decision.RECORD_AND_SAMPLE
    assert is_below(bound_of(ratio), trace) == theirs
