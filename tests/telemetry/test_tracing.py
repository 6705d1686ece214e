"""Which calls are traced: as their callers say, where they may; else by a share; and none where nobody exports."""

from random import Random

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.telemetry.tracing import Trace, Tracing

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


def headers(**sent: str) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(sent))


def exporting(ratio: float, *, is_parent_based: bool = True) -> Tracing:
    tracing = Tracing(Random(7))
    tracing.export_to(lambda _: None, ratio=ratio, is_parent_based=is_parent_based)
    return tracing


def test_where_nobody_exports_nothing_begins_and_what_came_goes_on_as_it_is() -> None:
    tracing = Tracing(Random(7))
    assert tracing.begin(headers(), is_trusted=True) == Trace()
    place = tracing.begin(headers(traceparent=SAMPLED, tracestate="a=1", baggage="b=2"), is_trusted=True)
    assert (place.trace_id, place.span_id) == (TRACE, "")
    assert place.sent("", "all") == {"traceparent": SAMPLED, "tracestate": "a=1", "baggage": "b=2"}


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_trusted_callers_decision_holds(ratio: float) -> None:
    tracing = exporting(ratio)
    sampled = tracing.begin(headers(traceparent=SAMPLED), is_trusted=True)
    assert (sampled.trace_id, sampled.parent_id) == (TRACE, SPAN)
    assert len(sampled.span_id) == 16
    assert sampled.span_id != SPAN
    unsampled = tracing.begin(headers(traceparent=UNSAMPLED), is_trusted=True)
    assert unsampled.span_id == ""
    assert unsampled.sent("", "trace") == {"traceparent": UNSAMPLED}


@pytest.mark.parametrize(("ratio", "is_sampled"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("came", [SAMPLED, UNSAMPLED])
def test_a_strangers_decision_does_not_nor_one_that_is_not_asked_for(ratio: float, is_sampled: bool, came: str) -> None:
    strangers = exporting(ratio).begin(headers(traceparent=came), is_trusted=False)
    unasked = exporting(ratio, is_parent_based=False).begin(headers(traceparent=came), is_trusted=True)
    assert bool(strangers.span_id) == bool(unasked.span_id) == is_sampled
    assert strangers.trace_id == unasked.trace_id == TRACE


def test_of_traces_that_begin_here_the_ratio_is_sampled_and_the_others_do_not_begin() -> None:
    tracing = exporting(0.25)
    places = [tracing.begin(headers(), is_trusted=True) for _ in range(4_000)]
    sampled = [place for place in places if place.span_id]
    assert 900 < len(sampled) < 1_100
    assert len({place.trace_id for place in sampled}) == len({place.span_id for place in sampled}) == len(sampled)
    assert all(place.sent("1" * 16, "trace")["traceparent"].endswith("-01") for place in sampled)
    assert {place for place in places if not place.span_id} == {Trace()}


def test_a_malformed_parent_is_as_if_none_had_come_and_its_state_with_it() -> None:
    came = headers(traceparent="00-nonsense", tracestate="a=1")
    place = exporting(1.0).begin(came, is_trusted=True)
    assert place.trace_id
    assert place.parent_id == place.state == ""
    assert Tracing(Random(7)).begin(came, is_trusted=True).sent("", "all") == {}


def test_two_parents_are_none() -> None:
    both = CIMultiDictProxy(CIMultiDict([("traceparent", SAMPLED), ("traceparent", SAMPLED)]))
    assert exporting(1.0).begin(both, is_trusted=True).trace_id != TRACE


def test_the_random_flag_stays() -> None:
    place = exporting(1.0).begin(headers(traceparent=f"00-{TRACE}-{SPAN}-03"), is_trusted=True)
    assert place.sent("2" * 16, "trace") == {"traceparent": f"00-{TRACE}-{'2' * 16}-03"}


def test_an_upstream_is_told_as_much_as_it_may_hear() -> None:
    place = exporting(1.0).begin(headers(traceparent=SAMPLED, tracestate="a=1", baggage="b=2"), is_trusted=True)
    parent = f"00-{TRACE}-{'3' * 16}-01"
    assert place.sent("3" * 16, "none") == {}
    assert place.sent("3" * 16, "trace") == {"traceparent": parent, "tracestate": "a=1"}
    assert place.sent("3" * 16, "all") == {"traceparent": parent, "tracestate": "a=1", "baggage": "b=2"}
    bags_alone = Tracing(Random(7)).begin(headers(baggage="b=2"), is_trusted=True)
    assert bags_alone.sent("", "all") == {"baggage": "b=2"}
    assert bags_alone.sent("", "trace") == {}
