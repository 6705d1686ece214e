"""After every fault there is an answer to "and now?", and no wait is longer than what is left of the call."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.fallback import REMEDIES, Action, RetryLimits, Step, Then, kind_of_refusal, next_step
from gateway.domain.errors import FaultKind
from gateway.domain.provider_error import read_error

LIMITS = RetryLimits(base_s=0.25, max_wait_s=5.0)
# How often each fault is tried again where it happened. What is not here is not.
RETRIES = {FaultKind.CONNECT: 1, FaultKind.RESET: 1, FaultKind.SERVER: 1, FaultKind.RATE_LIMITED: 2}
GIVES_UP = {FaultKind.REJECTED, FaultKind.FILTERED, FaultKind.DEADLINE, FaultKind.OVERRUN, FaultKind.LEFT}
# Nothing was sent, or the provider refused before it began: it has nothing to put on a bill.
CANNOT_BE_BILLED = {
    FaultKind.CONNECT, FaultKind.SERVER, FaultKind.RATE_LIMITED, FaultKind.QUOTA, FaultKind.NOT_FOUND, FaultKind.AUTH,
    FaultKind.CONTEXT_LENGTH, FaultKind.FILTERED, FaultKind.REJECTED,
}  # fmt: skip
# One caller's request, or one caller's pace, says nothing of the model.
NOT_THE_MODELS = {
    FaultKind.RATE_LIMITED, FaultKind.CONTEXT_LENGTH, FaultKind.FILTERED, FaultKind.REJECTED, FaultKind.DEADLINE,
    FaultKind.OVERRUN, FaultKind.LEFT,
}  # fmt: skip

KINDS = st.sampled_from(FaultKind)
DICE = st.floats(0, 1)
SITUATIONS = st.fixed_dictionaries(
    {
        "retry_after_s": st.none() | st.floats(0, 1e6),
        "tries_here": st.integers(1, 6),
        "is_last_model": st.booleans(),
        "may_retry": st.booleans(),
        "left_s": st.floats(-1, 100) | st.just(float("inf")),
        "dice": DICE,
        "limits": st.builds(RetryLimits, st.floats(0.001, 100), st.floats(0.001, 100)),
    }
)


def step(kind: FaultKind, **situation: Any) -> Step:
    """The step after the first try at a model that is not the last, with all the time in the world."""
    usual: dict[str, Any] = {
        "retry_after_s": None, "tries_here": 1, "is_last_model": False, "may_retry": True, "left_s": 60.0, "dice": 0.5,
        "limits": LIMITS,
    }  # fmt: skip
    return next_step(kind, **(usual | situation))


# --- The table -------------------------------------------------------------------------------------------------------


def test_every_fault_has_a_remedy_with_a_reason() -> None:
    assert set(REMEDIES) == set(FaultKind)
    assert all(remedy.why for remedy in REMEDIES.values())


@pytest.mark.parametrize("kind", FaultKind)
def test_each_row_of_the_table(kind: FaultKind) -> None:
    remedy = REMEDIES[kind]
    assert remedy.retries_here == RETRIES.get(kind, 0)
    assert (remedy.then is Then.GIVE_UP) is (kind in GIVES_UP)
    assert (remedy.then is Then.LARGER_MODEL) is (kind is FaultKind.CONTEXT_LENGTH)
    assert remedy.may_be_billed is (kind not in CANNOT_BE_BILLED)
    assert remedy.is_models_fault is (kind not in NOT_THE_MODELS)


def test_what_gives_up_never_retries_and_counts_against_nobody() -> None:
    for remedy in REMEDIES.values():
        if remedy.then is Then.GIVE_UP:
            assert (remedy.retries_here, remedy.is_models_fault) == (0, False)


# --- The step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FaultKind)
def test_a_fault_is_retried_as_often_as_its_row_says_and_then_left(kind: FaultKind) -> None:
    retries = list(itertools.takewhile(lambda tries: step(kind, tries_here=tries).action is Action.RETRY, range(1, 9)))
    assert len(retries) == RETRIES.get(kind, 0)
    after = step(kind, tries_here=len(retries) + 1)
    wanted = Action.NEXT_MODEL
    if kind in GIVES_UP:
        wanted = Action.GIVE_UP
    elif kind is FaultKind.CONTEXT_LENGTH:
        wanted = Action.LARGER_MODEL
    assert after == Step(wanted)


@pytest.mark.parametrize("kind", FaultKind)
def test_on_the_last_model_what_is_not_retried_is_given_up(kind: FaultKind) -> None:
    assert step(kind, is_last_model=True, tries_here=9) == Step(Action.GIVE_UP)
    assert (step(kind, is_last_model=True).action is Action.RETRY) is (kind in RETRIES)


@pytest.mark.parametrize("kind", RETRIES)
def test_an_empty_budget_goes_straight_to_the_next_model(kind: FaultKind) -> None:
    assert step(kind, may_retry=False) == Step(Action.NEXT_MODEL)


@pytest.mark.parametrize("left_s", [0.0, -1.0])
@pytest.mark.parametrize("kind", FaultKind)
def test_without_time_left_it_gives_up(kind: FaultKind, left_s: float) -> None:
    assert step(kind, left_s=left_s) == Step(Action.GIVE_UP)


@pytest.mark.parametrize(
    ("retry_after_s", "left_s", "wanted"),
    [
        (2.0, 60.0, Step(Action.RETRY, 2.0)),
        (0.0, 60.0, Step(Action.RETRY, 0.0)),
        (5.0, 60.0, Step(Action.RETRY, 5.0)),
        # Longer than the policy waits, or than the call has left: elsewhere, at once.
        (6.0, 60.0, Step(Action.NEXT_MODEL)),
        (2.0, 2.0, Step(Action.NEXT_MODEL)),
        (2.0, 2.001, Step(Action.RETRY, 2.0)),
    ],
)
def test_what_the_provider_asks_for_is_kept_within_bounds(retry_after_s: float, left_s: float, wanted: Step) -> None:
    assert step(FaultKind.RATE_LIMITED, retry_after_s=retry_after_s, left_s=left_s, dice=0.0) == wanted


@given(DICE, st.floats(0, 5))
def test_a_retry_is_never_earlier_than_asked_and_those_asked_alike_come_apart(dice: float, asked_s: float) -> None:
    found = step(FaultKind.RATE_LIMITED, retry_after_s=asked_s, dice=dice)
    assert found.action is Action.RETRY
    assert asked_s <= found.after_s <= asked_s + LIMITS.base_s
    assert step(FaultKind.RATE_LIMITED, retry_after_s=asked_s, dice=0.0).after_s == asked_s


@pytest.mark.parametrize(("tries", "most_s"), [(1, 0.25), (2, 0.5)])
def test_the_jitter_is_full_and_its_ceiling_doubles(tries: int, most_s: float) -> None:
    waits = [step(FaultKind.RATE_LIMITED, tries_here=tries, dice=dice).after_s for dice in (0.0, 0.5, 1.0)]
    assert waits == [0.0, most_s / 2, most_s]


def test_the_ceiling_of_a_wait_is_the_policys() -> None:
    slow = RetryLimits(base_s=4.0, max_wait_s=5.0)
    assert step(FaultKind.RATE_LIMITED, tries_here=2, dice=1.0, limits=slow).after_s == 5.0
    slower = RetryLimits(base_s=9.0, max_wait_s=5.0)
    assert step(FaultKind.RATE_LIMITED, dice=1.0, limits=slower).after_s == 5.0


@given(KINDS, SITUATIONS)
def test_whatever_happens_the_step_stays_within_its_bounds(kind: FaultKind, situation: dict[str, Any]) -> None:
    found = next_step(kind, **situation)
    remedy, limits, asked_s = REMEDIES[kind], situation["limits"], situation["retry_after_s"]
    if found.action is Action.RETRY:
        assert situation["may_retry"]
        assert situation["tries_here"] <= remedy.retries_here
        assert 0 <= found.after_s < situation["left_s"]
        assert found.after_s <= limits.max_wait_s + limits.base_s
        assert asked_s is None or found.after_s >= asked_s
    else:
        assert found.after_s == 0.0
    if found.action in (Action.NEXT_MODEL, Action.LARGER_MODEL):
        assert not situation["is_last_model"]
        assert remedy.then is not Then.GIVE_UP
    assert (found.action is Action.LARGER_MODEL) <= (kind is FaultKind.CONTEXT_LENGTH)
    if situation["left_s"] <= 0 or kind in GIVES_UP:
        assert found.action is Action.GIVE_UP


@given(KINDS, st.lists(DICE, min_size=20, max_size=20), st.floats(0.01, 30))
def test_a_model_that_always_fails_is_left_within_its_tries(kind: FaultKind, dice: list[float], left_s: float) -> None:
    waited_s = 0.0
    for tries in range(1, 20):
        found = step(kind, tries_here=tries, dice=dice[tries], left_s=left_s - waited_s)
        if found.action is not Action.RETRY:
            break
        waited_s += found.after_s
    assert tries <= 3
    assert waited_s < left_s


# --- What a provider's refusal is ------------------------------------------------------------------------------------


def openai(message: str, code: str | None, type: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": code}}


def flat(message: str, code: Any, type: str) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": type, "param": None, "code": code}


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        # A context that is too long: OpenAI by its code, Mistral and vLLM by their words only, proxies by 413.
        (400, openai("This model's maximum context length is 4096 tokens.", "context_length_exceeded"), "context"),
        (400, openai("Reduce the length of the messages.", "context_length_exceeded"), "context"),
        (400, flat("Prompt contains 40000 tokens, too large for model with 32768 maximum context length", "3051",
                   "invalid_request_error"), "context"),
        (400, flat("This model's maximum context length is 16384 tokens. However, you requested 122946 tokens.", 400,
                   "BadRequestError"), "context"),
        (400, {"error": {"message": "The decoder prompt (length 21535) is longer than the maximum model length of "
                                    "16384.", "type": "BadRequestError", "param": None, "code": 400}}, "context"),
        (400, flat("The prompt (total length 25938) is too long to fit into the model (context length 4096).", 400,
                   "BadRequestError"), "context"),
        (400, openai("the request exceeds the available context size", None, "exceed_context_size_error"), "context"),
        (413, b"<html>413</html>", "context"),
        # A filter.
        (400, openai("The response was filtered.", "content_filter"), "filtered"),
        (403, openai("Your request was rejected by the safety system.", "content_policy_violation"), "filtered"),
        # An empty account is no rate limit, and the other way round.
        (429, openai("You exceeded your current quota.", "insufficient_quota", "insufficient_quota"), "quota"),
        (429, openai("The cap is used up.", "budget_exceeded", "insufficient_quota"), "quota"),
        (402, openai("Insufficient Balance", "invalid_request_error", "unknown_error"), "quota"),
        (429, openai("Rate limit reached for gpt-4o.", "rate_limit_exceeded", "requests"), "rate"),
        (429, flat("Requests rate limit exceeded", "1300", "rate_limited"), "rate"),
        (429, b"", "rate"),
        # A model that is not there: Mistral says so under 400.
        (404, openai("The model `gpt-9` does not exist.", "model_not_found"), "not_found"),
        (404, flat("The model `x` does not exist.", 404, "NotFoundError"), "not_found"),
        (404, {"detail": "Not Found"}, "not_found"),
        (400, openai("No such model", "model_not_found"), "not_found"),
        (400, flat("Invalid model: mistral-medium-3.5", "1500", "invalid_model"), "not_found"),
        # Our key.
        (401, openai("Incorrect API key provided: sk-***", "invalid_api_key"), "auth"),
        (401, {"detail": "Unauthorized"}, "auth"),
        (403, b"", "auth"),
        # The request itself.
        (400, openai("Unrecognized request argument: foo", None), "rejected"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "Field required", "type": "missing"}]}, "rejected"),
        (400, flat("max_tokens must be at least 1", 400, "BadRequestError"), "rejected"),
        (409, b"", "rejected"),
        (499, b"", "rejected"),
        # The provider.
        (408, b"", "first_byte"),
        (500, openai("The server had an error.", None, "server_error"), "server"),
        (500, openai("odd, under 500", "context_length_exceeded"), "server"),
        (502, b"<html>Bad Gateway</html>", "server"),
        (503, flat("Service unavailable", 503, "internal"), "server"),
        (529, openai("Overloaded", None, "overloaded_error"), "server"),
        # No answer and no refusal.
        (204, b"", "invalid"),
        (302, b"", "invalid"),
        (399, openai("x", "model_not_found"), "invalid"),
    ],
)  # fmt: skip
def test_a_refusal_is_known_by_its_code_its_words_or_its_status(status: int, body: Any, kind: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kinds = {"context": FaultKind.CONTEXT_LENGTH, "rate": FaultKind.RATE_LIMITED}
    assert kind_of_refusal(status, read_error(status, data)) == kinds.get(kind, kind)


def test_words_about_a_context_are_believed_under_400_only() -> None:
    words = read_error(401, b'{"message": "maximum context length"}')
    assert kind_of_refusal(401, words) is FaultKind.AUTH
    assert kind_of_refusal(400, words) is FaultKind.CONTEXT_LENGTH


@given(st.integers(201, 999), st.binary(max_size=60))
def test_every_status_has_a_kind(status: int, body: bytes) -> None:
    assert kind_of_refusal(status, read_error(status, body)) in FaultKind
