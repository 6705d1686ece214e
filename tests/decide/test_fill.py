"""What the caller set stays; what they left out is filled; nothing gets over a ceiling."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.fill import Filled, fill, limited
from gateway.domain.dialects import DIALECTS, translate
from gateway.domain.errors import Refused
from gateway.domain.policy import Limits
from gateway.domain.wire import raw
from tests.planning import body_of

DEFAULTS = {"temperature": 0.7, "max_tokens": 100, "top_p": 0.9}
NO_LIMITS = Limits()


def filled(asked: dict[str, Any], limits: Limits = NO_LIMITS, defaults: dict[str, Any] = DEFAULTS) -> Filled:
    return fill(body_of(**asked), {name: raw(value) for name, value in defaults.items()}, limits)


def values(found: Filled) -> dict[str, Any]:
    return {name: json.loads(bytes(value)) for name, value in found.fields.items() if name not in ("model", "messages")}


@pytest.mark.parametrize(
    ("asked", "sent", "max_tokens"),
    [
        ({}, {"temperature": 0.7, "max_tokens": 100, "top_p": 0.9}, 100),
        ({"temperature": 0}, {"temperature": 0, "max_tokens": 100, "top_p": 0.9}, 100),
        ({"temperature": 0.0, "top_p": 0}, {"temperature": 0.0, "max_tokens": 100, "top_p": 0}, 100),
        ({"max_tokens": 5}, {"temperature": 0.7, "max_tokens": 5, "top_p": 0.9}, 5),
        ({"max_tokens": 5_000}, {"temperature": 0.7, "max_tokens": 5_000, "top_p": 0.9}, 5_000),
        ({"max_completion_tokens": 5}, {"temperature": 0.7, "max_completion_tokens": 5, "top_p": 0.9}, 5),
        ({"max_tokens": 9, "max_completion_tokens": 5},
         {"temperature": 0.7, "max_completion_tokens": 5, "top_p": 0.9}, 5),
        # A null is how SDKs write "not given".
        ({"temperature": None, "max_tokens": None, "max_completion_tokens": None},
         {"temperature": 0.7, "max_tokens": 100, "top_p": 0.9}, 100),
        ({"max_tokens": 9, "max_completion_tokens": None}, {"temperature": 0.7, "max_tokens": 9, "top_p": 0.9}, 9),
        ({"max_tokens": None, "max_completion_tokens": 5},
         {"temperature": 0.7, "max_completion_tokens": 5, "top_p": 0.9}, 5),
        ({"seed": 1, "x": {"y": None}},
         {"temperature": 0.7, "max_tokens": 100, "top_p": 0.9, "seed": 1, "x": {"y": None}}, 100),
    ],
)  # fmt: skip
def test_defaults_fill_what_was_left_out_and_nothing_else(asked: Any, sent: Any, max_tokens: int) -> None:
    found = filled(asked)
    assert values(found) == sent
    assert (found.max_tokens, found.lowered) == (max_tokens, ())


@pytest.mark.parametrize(
    ("asked", "limit", "sent", "lowered"),
    [
        ({"max_tokens": 49}, 50, {"max_tokens": 49}, ()),
        ({"max_tokens": 50}, 50, {"max_tokens": 50}, ()),
        ({"max_tokens": 51}, 50, {"max_tokens": 50}, ("max_tokens",)),
        ({"max_completion_tokens": 51}, 50, {"max_completion_tokens": 50}, ("max_completion_tokens",)),
        ({"max_tokens": 1, "max_completion_tokens": 51}, 50, {"max_completion_tokens": 50}, ("max_completion_tokens",)),
        ({"max_tokens": 51, "max_completion_tokens": 1}, 50, {"max_completion_tokens": 1}, ()),
        ({"max_tokens": 51, "max_completion_tokens": None}, 50, {"max_tokens": 50}, ("max_tokens",)),
        # A default over the ceiling was nobody's wish, so nobody is told.
        ({}, 50, {"max_tokens": 50}, ()),
    ],
)
def test_the_ceiling_on_tokens(asked: Any, limit: int, sent: Any, lowered: tuple[str, ...]) -> None:
    found = filled(asked, Limits(max_tokens=limit), {"max_tokens": 100})
    assert values(found) == sent
    assert (found.max_tokens, found.lowered) == (next(iter(sent.values())), lowered)


@pytest.mark.parametrize(
    ("asked", "sent", "lowered"),
    [
        ({"temperature": 0.5}, 0.5, ()),
        ({"temperature": 1}, 1, ()),
        ({"temperature": 1.01}, 1.0, ("temperature",)),
        ({"temperature": 2}, 1.0, ("temperature",)),
        ({}, 1.0, ()),
        ({"temperature": None}, 1.0, ()),
    ],
)
def test_the_ceiling_on_temperature_holds_for_defaults_too(asked: Any, sent: float, lowered: tuple[str, ...]) -> None:
    found = filled(asked, Limits(temperature=1.0), {"max_tokens": 100, "temperature": 1.5})
    assert (values(found)["temperature"], found.lowered) == (sent, lowered)


def test_no_default_no_temperature() -> None:
    assert "temperature" not in values(filled({}, Limits(temperature=1.0), {"max_tokens": 100}))
    assert values(filled({"temperature": None}, Limits(temperature=1.0), {"max_tokens": 100}))["temperature"] is None


@pytest.mark.parametrize(("n", "limit", "is_allowed"), [(1, 1, True), (2, 1, False), (8, 8, True), (9, 8, False)])
def test_more_choices_than_allowed_are_refused(n: int, limit: int, is_allowed: bool) -> None:
    if is_allowed:
        assert values(filled({"n": n}, Limits(n=limit)))["n"] == n
        return
    with pytest.raises(Refused) as caught:
        filled({"n": n}, Limits(n=limit))
    assert (caught.value.code, caught.value.param) == ("invalid_value", "n")


LIMITS = st.none() | st.integers(1, 200)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": LIMITS,
        "max_completion_tokens": LIMITS,
        "temperature": st.none() | st.floats(0, 2),
        "top_p": st.none() | st.floats(0, 1),
        "n": st.none() | st.integers(1, 8),
        "seed": st.none() | st.integers(),
        "stop": st.none() | st.text(max_size=3),
    },
)


@given(ASKED, LIMITS, st.none() | st.floats(0, 2))
def test_whatever_is_asked_the_limit_in_force_is_the_one_that_is_sent(
    asked: dict[str, Any], max_tokens: int | None, temperature: float | None
) -> None:
    body = body_of(**asked)
    before = dict(body.fields)
    found = filled(asked, Limits(max_tokens=max_tokens, temperature=temperature))
    assert body.fields == before
    for kind, dialect in DIALECTS.items():
        sent = {name: json.loads(bytes(value)) for name, value in translate(dialect, found.fields)[0].items()}
        limits = [sent[name] for name in ("max_tokens", "max_completion_tokens") if name in sent]
        # One limit reaches the provider, under whichever name it goes, and the hold is made for that one.
        assert limits == [found.max_tokens], kind
        assert temperature is None or sent["temperature"] <= temperature
    for name, value in asked.items():
        lowerable = {"max_tokens", "max_completion_tokens", "temperature"}
        if value is not None and name not in lowerable:
            assert values(found)[name] == value
    for name in found.lowered:
        assert asked[name] is not None
        assert values(found)[name] < asked[name]


@pytest.mark.parametrize(
    ("asked", "limit", "sent"),
    [
        ({"max_tokens": 50}, 49, {"max_tokens": 49}),
        ({"max_tokens": 50}, 50, {"max_tokens": 50}),
        ({"max_tokens": 50}, 51, {"max_tokens": 50}),
        ({}, 99, {"max_tokens": 99}),
        ({"max_completion_tokens": 50}, 7, {"max_completion_tokens": 7}),
        ({"max_tokens": 1, "max_completion_tokens": 50}, 7, {"max_completion_tokens": 7}),
        ({"max_tokens": 50, "max_completion_tokens": None}, 7, {"max_tokens": 7}),
    ],
)
def test_what_the_budget_can_pay_is_what_is_sent(asked: Any, limit: int, sent: Any) -> None:
    whole = filled(asked, defaults={"max_tokens": 100})
    before = values(whole)
    found = limited(whole, limit)
    assert values(found) == sent
    assert found.max_tokens == next(iter(sent.values()))
    # Another model of the chain may be cheaper, so the whole must still be there.
    assert values(whole) == before
    # What is lowered for the money is told in a header of its own.
    assert found.lowered == whole.lowered


@given(ASKED, LIMITS, st.integers(1, 300))
def test_whatever_was_asked_the_limit_that_can_be_paid_is_the_one_the_provider_gets(
    asked: dict[str, Any], max_tokens: int | None, payable: int
) -> None:
    whole = filled(asked, Limits(max_tokens=max_tokens))
    found = limited(whole, payable)
    assert found.max_tokens == min(whole.max_tokens, payable)
    for kind, dialect in DIALECTS.items():
        sent = {name: json.loads(bytes(value)) for name, value in translate(dialect, found.fields)[0].items()}
        limits = [sent[name] for name in ("max_tokens", "max_completion_tokens") if name in sent]
        assert limits == [found.max_tokens], kind
    others = {"max_tokens", "max_completion_tokens"}
    assert {name: value for name, value in found.fields.items() if name not in others} == {
        name: value for name, value in whole.fields.items() if name not in others
    }


@pytest.mark.parametrize(
    ("tier", "sent", "is_lowered"),
    [
        ("default", "default", False), ("flex", "flex", False), (None, None, False),
        # These may cost more than the price that a cap is reckoned by; so may one that nobody knows.
        ("auto", "default", True), ("priority", "default", True), ("scale", "default", True),
        (["flex"], "default", True),
    ],
)  # fmt: skip
def test_under_a_cap_no_tier_is_asked_for_that_costs_more_than_the_price(
    tier: object, sent: object, is_lowered: bool
) -> None:
    found = fill(body_of(service_tier=tier), {"max_tokens": raw(9)}, NO_LIMITS, is_capped=True)
    assert values(found)["service_tier"] == sent
    assert ("service_tier" in found.lowered) is is_lowered


def test_without_a_cap_a_tier_is_the_callers_affair_and_none_is_made_up() -> None:
    assert values(filled({"service_tier": "priority"}))["service_tier"] == "priority"
    found = fill(body_of(), {"max_tokens": raw(9)}, NO_LIMITS, is_capped=True)
    assert "service_tier" not in found.fields
