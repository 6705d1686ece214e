"""After a fault: the next model of the chain, or give up. Pure; the deadline is passed in as what is left of it.

This is where the whole fault taxonomy, retries, budgets and breakers will stand; today it knows one remedy.
Its one invariant: nothing is tried again once bytes of an answer have gone out.
"""

from enum import Enum
from typing import NamedTuple

from gateway.domain.errors import FaultKind


class Step(Enum):
    """What to do after an attempt failed."""

    NEXT_MODEL = "next_model"
    GIVE_UP = "give_up"


class Remedy(NamedTuple):
    """One row of the table: what to do while there is a model left, whether the provider may still bill, and why."""

    step: Step
    may_be_billed: bool
    why: str


REMEDIES: dict[FaultKind, Remedy] = {
    FaultKind.CONNECT: Remedy(Step.NEXT_MODEL, False, "nothing was sent, another provider may be up"),
    FaultKind.RESET: Remedy(Step.NEXT_MODEL, True, "no byte of an answer has gone out"),
    FaultKind.TIMEOUT: Remedy(Step.NEXT_MODEL, True, "a silent provider is not asked twice"),
    FaultKind.RATE_LIMITED: Remedy(Step.NEXT_MODEL, False, "this provider wants less of us, the next may not"),
    FaultKind.SERVER: Remedy(Step.NEXT_MODEL, False, "its fault, not the request's"),
    FaultKind.NOT_FOUND: Remedy(Step.NEXT_MODEL, False, "the model is retired or was never there; the next one is"),
    FaultKind.AUTH: Remedy(Step.NEXT_MODEL, False, "our key is wrong there, which is not the caller's doing"),
    FaultKind.REJECTED: Remedy(Step.GIVE_UP, False, "the request itself was refused; the caller must see why"),
    FaultKind.INVALID: Remedy(Step.NEXT_MODEL, True, "what came was no answer"),
    FaultKind.CUT: Remedy(Step.NEXT_MODEL, True, "the answer broke off; only what has gone out cannot be taken back"),
}


def next_step(fault: FaultKind, *, models_left: int, left_s: float, has_sent_bytes: bool) -> Step:
    """What to do after `fault`, with `models_left` further models in the chain and `left_s` seconds of the deadline."""
    if has_sent_bytes or models_left <= 0 or left_s <= 0:
        return Step.GIVE_UP
    return REMEDIES[fault].step
