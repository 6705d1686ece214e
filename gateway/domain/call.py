"""One call: what was decided about it, its attempts, and the record that outlives it. Values only."""

from typing import Literal

import msgspec

from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage

Variant = Literal["finetuned", "baseline"]
# What a cost rests on. exact: the provider's usage. estimate: what came, counted upwards, as no usage did. bound: the
# most it can have been. none: nothing to pay. manual: somebody wrote it down.
Basis = Literal["exact", "estimate", "bound", "none", "manual"]


class Attempt(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One try at one model. `fault` is None where it answered; cost and tokens are what was booked, or is in doubt.

    `span_id` is that of the span the provider was told of, where the call is traced.
    """

    ref: str
    started_ms: int
    duration_ms: float = 0.0
    status: int = 0
    fault: FaultKind | None = None
    is_in_doubt: bool = False
    cost_nusd: int = 0
    tokens: int = 0
    span_id: str = ""


class CallRecord(msgspec.Struct, tag="call", tag_field="event", kw_only=True, omit_defaults=True):
    """What is kept of a call: enough for the bill, the comparison and the post-mortem; no prompt, no user in clear.

    Times are unix milliseconds, durations milliseconds. `model_asked`, `model_sent` and `model_answered` are three
    names kept apart: what the caller wrote, the reference we chose, what the provider says it was. `experiment` and
    `stage` are those of the agent's rollout, and 0 where it did not choose the arm. `trace_id` is the trace that the
    call belongs to, in 32 hex digits; `span_id` is our own span in it, in 16, where it is sampled. `shadow_of`: the
    call that this one is a shadow of. `cost_nusd` is what was booked of all attempts, without what is in doubt.
    """

    id: str
    at_ms: int
    env: str
    agent: str = ""
    agent_from: str = ""
    rule: str = ""
    variant: Variant | None = None
    variant_from: str = ""
    bucket: int | None = None
    share_bps: int | None = None
    user: str = ""
    key: str = ""
    operation: str = "inference"
    stream: bool = False
    model_asked: str = ""
    model_sent: str = ""
    model_answered: str = ""
    attempts: list[Attempt] = []
    is_fallback: bool = False
    switched_by: str = ""
    status: int = 0
    error: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    cost_nusd: int = 0
    cost_basis: Basis = "none"
    duration_ms: float = 0.0
    first_chunk_ms: float | None = None
    overhead_ms: float = 0.0
    client_left: bool = False
    experiment: int = 0
    stage: int = 0
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str = ""
    shadow_of: str = ""
