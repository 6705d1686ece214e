"""After a fault: try here again, try the next model, or give up. A table says what, one function says when.

Pure: the time left, the dice and the state of the budget are passed in. The invariants: nothing that may have been
answered is repeated at the same model without need, every wait fits into the call's deadline, and a caller's own
mistake is never anybody else's fault.
"""

from enum import Enum
from typing import NamedTuple

from gateway.domain.errors import FaultKind
from gateway.domain.provider_error import ProviderError


class Then(Enum):
    """Where to go on when this model is not tried again."""

    NEXT_MODEL = "next model"
    LARGER_MODEL = "next model with a larger context"
    GIVE_UP = "give up"


class Remedy(NamedTuple):
    """One row: how often to retry here, where to go on then, whether the provider may still bill the attempt, and
    whether it counts against the model (breakers listen to that)."""

    retries_here: int
    then: Then
    may_be_billed: bool
    is_models_fault: bool
    why: str


REMEDIES: dict[FaultKind, Remedy] = {
    FaultKind.CONNECT: Remedy(1, Then.NEXT_MODEL, False, True, "nothing was sent; often one bad address of several"),
    FaultKind.RESET: Remedy(1, Then.NEXT_MODEL, True, True, "often a kept connection closed under us"),
    FaultKind.FIRST_BYTE: Remedy(0, Then.NEXT_MODEL, True, True, "a silent model is not asked twice"),
    FaultKind.FIRST_TOKEN: Remedy(0, Then.NEXT_MODEL, True, True, "it accepted and then said nothing"),
    FaultKind.STALL: Remedy(0, Then.NEXT_MODEL, True, True, "the answer stopped with the connection open"),
    FaultKind.DRIP: Remedy(0, Then.NEXT_MODEL, True, True, "slower than the least rate, for too long"),
    FaultKind.CUT: Remedy(0, Then.NEXT_MODEL, True, True, "the answer broke off"),
    FaultKind.SERVER: Remedy(1, Then.NEXT_MODEL, False, True, "its own failure; once is often chance"),
    FaultKind.RATE_LIMITED: Remedy(2, Then.NEXT_MODEL, False, False, "it wants less of us, and says for how long"),
    FaultKind.QUOTA: Remedy(0, Then.NEXT_MODEL, False, True, "the account there is empty; waiting does not fill it"),
    FaultKind.NOT_FOUND: Remedy(0, Then.NEXT_MODEL, False, True, "the model is retired, or was never there"),
    FaultKind.AUTH: Remedy(0, Then.NEXT_MODEL, False, True, "our key is wrong there, which is not the caller's doing"),
    FaultKind.INVALID: Remedy(0, Then.NEXT_MODEL, True, True, "what came was no answer"),
    FaultKind.CONTEXT_LENGTH: Remedy(0, Then.LARGER_MODEL, False, False, "the prompt is too long for this model"),
    FaultKind.FILTERED: Remedy(0, Then.GIVE_UP, False, False, "the provider's filter; the caller must see why"),
    FaultKind.REJECTED: Remedy(0, Then.GIVE_UP, False, False, "the request itself; the caller must see why"),
    FaultKind.DEADLINE: Remedy(0, Then.GIVE_UP, True, False, "the call's own time is over"),
    FaultKind.OVERRUN: Remedy(0, Then.GIVE_UP, True, False, "cut by us: over its limit, or its money was taken back"),
    FaultKind.LEFT: Remedy(0, Then.GIVE_UP, True, False, "the caller has gone and nobody waits for it"),
}

_KIND_BY_CODE: dict[str | None, FaultKind] = {
    "context_length_exceeded": FaultKind.CONTEXT_LENGTH,
    "content_filter": FaultKind.FILTERED,
    "content_policy_violation": FaultKind.FILTERED,
    "insufficient_quota": FaultKind.QUOTA,
    "model_not_found": FaultKind.NOT_FOUND,
    # Mistral's type, under status 400 and a number for a code.
    "invalid_model": FaultKind.NOT_FOUND,
}
_KIND_BY_STATUS = {
    401: FaultKind.AUTH,
    402: FaultKind.QUOTA,
    403: FaultKind.AUTH,
    404: FaultKind.NOT_FOUND,
    408: FaultKind.FIRST_BYTE,
    413: FaultKind.CONTEXT_LENGTH,
    429: FaultKind.RATE_LIMITED,
}
# Mistral, vLLM and llama.cpp give a context that is too long no code of its own, only these words.
_CONTEXT_WORDS = ("context length", "context window", "context size", "maximum model length", "too large for model")


def kind_of_refusal(status: int, said: ProviderError) -> FaultKind:
    """The kind of fault behind a status other than 200, by code or type, then words, then status."""
    if 400 <= status < 500:
        for name in (said.code, said.type):
            if name in _KIND_BY_CODE:
                return _KIND_BY_CODE[name]
        if status == 400 and any(words in said.message.lower() for words in _CONTEXT_WORDS):
            return FaultKind.CONTEXT_LENGTH
        return _KIND_BY_STATUS.get(status, FaultKind.REJECTED)
    return FaultKind.SERVER if status >= 500 else FaultKind.INVALID


class Action(Enum):
    """What to do now."""

    RETRY = "retry"
    NEXT_MODEL = "next_model"
    LARGER_MODEL = "larger_model"
    GIVE_UP = "give_up"


class Step(NamedTuple):
    """What to do now, and after how many seconds."""

    action: Action
    after_s: float = 0.0


class RetryLimits(NamedTuple):
    """Exponential backoff with full jitter: a wait is anywhere from nothing to base × 2^retry, up to the maximum."""

    base_s: float
    max_wait_s: float


def next_step(
    kind: FaultKind,
    *,
    retry_after_s: float | None,
    tries_here: int,
    is_last_model: bool,
    may_retry: bool,
    left_s: float,
    dice: float,
    limits: RetryLimits,
) -> Step:
    """The step after the `tries_here`-th try at this model failed. `may_retry`: its retry budget has something left;
    `dice` is uniform in 0 to 1; `left_s` is what is left of the call's deadline."""
    if left_s <= 0:
        return Step(Action.GIVE_UP)
    remedy = REMEDIES[kind]
    if tries_here <= remedy.retries_here and may_retry:
        backoff_s = dice * min(limits.max_wait_s, limits.base_s * 2 ** (tries_here - 1))
        # What the provider asks for is a minimum; the jitter on top keeps the callers it told the same apart.
        wait_s = backoff_s if retry_after_s is None else retry_after_s + dice * limits.base_s
        if wait_s <= limits.max_wait_s + limits.base_s and wait_s < left_s:
            return Step(Action.RETRY, wait_s)
    if is_last_model or remedy.then is Then.GIVE_UP:
        return Step(Action.GIVE_UP)
    return Step(Action.LARGER_MODEL if remedy.then is Then.LARGER_MODEL else Action.NEXT_MODEL)
