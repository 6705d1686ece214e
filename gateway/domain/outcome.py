"""What became of a call, as experiments and reports count it, and what its user said of it. Values only.

The invariant: a call counts in the arm it was assigned to, whoever answered it in the end (intention to treat).
"""

from typing import NamedTuple

from gateway.domain.call import CallRecord


class Outcome(NamedTuple):
    """One call that a model was asked for.

    `experiment` and `stage` are 0 where the rollout did not choose the arm: such calls are in no comparison.
    `is_success` is None where the caller left before the end, so nobody knows. Times in ms, first content's for
    streams only; cost in nUSD, what was booked of all attempts. What is in doubt is not in it: that is the most it can
    be, mostly a hundred times what it is, and an experiment would compare how often providers break. `user` is hashed.
    """

    id: str
    at_ms: int
    env: str
    agent: str
    experiment: int
    stage: int
    share_bps: int
    variant: str
    bucket: int | None
    user: str
    key: str
    operation: str
    model: str
    is_success: bool | None
    is_fallback: bool
    error: str
    latency_ms: float
    first_chunk_ms: float | None
    cost_nusd: int
    prompt_tokens: int
    completion_tokens: int


class Feedback(NamedTuple):
    """What a caller said of a call: `score` from -1 to 1, `label` in its own words or "". `caller` says who it was."""

    call_id: str
    caller: str
    at_ms: int
    score: float
    label: str


def outcome_of(record: CallRecord) -> Outcome | None:
    """The outcome of a call; None where no model was asked: a refusal says nothing of any."""
    if not record.attempts or not record.agent:
        return None
    usage, cost_nusd = record.usage, 0
    for attempt in record.attempts:
        if not attempt.is_in_doubt:
            cost_nusd += attempt.cost_nusd
    # By position, in the order of the fields: names take three times as long, and this is on every call's way.
    return Outcome(
        record.id, record.at_ms, record.env, record.agent, record.experiment, record.stage, record.share_bps or 0,
        record.variant or "", record.bucket, record.user, record.key, record.operation, record.model_sent,
        None if record.client_left else record.status == 200 and not record.error, record.is_fallback, record.error,
        record.duration_ms, record.first_chunk_ms, cost_nusd,
        usage.prompt_tokens if usage is not None else 0, usage.completion_tokens if usage is not None else 0,
    )  # fmt: skip
