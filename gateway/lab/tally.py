"""Figures out of recorded calls: per agent and variant, and how many users each experiment treated. Pure sums.

Latency is the gateway's: from a request's head to the answer's end. The invariant: every record is in exactly one row.
"""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import NamedTuple

from gateway.domain.call import CallRecord

UNDECIDED = "-"


class Row(NamedTuple):
    """The calls of one agent in one variant, or of several together."""

    agent: str
    variant: str
    calls: int
    share: float
    """Of the agent's calls, 0 to 1."""
    p50_ms: float
    p95_ms: float
    input_tokens: int
    output_tokens: int
    cost_nusd: int
    fallbacks: int
    errors: int


class Exposure(NamedTuple):
    """How many of the users who came to an agent got its fine-tuned model, and how many were meant to."""

    agent: str
    users: int
    treated: int
    share_bps: int


def tally(records: Iterable[CallRecord]) -> list[Row]:
    """A row per agent and variant, by name. Calls refused before they had an arm stand under `-`."""
    records = list(records)
    groups: dict[tuple[str, str], list[CallRecord]] = {}
    by_agent: dict[str, int] = {}
    for record in records:
        agent = record.agent or UNDECIDED
        groups.setdefault((agent, record.variant or UNDECIDED), []).append(record)
        by_agent[agent] = by_agent.get(agent, 0) + 1
    return [summed(agent, variant, calls, of=by_agent[agent]) for (agent, variant), calls in sorted(groups.items())]


def summed(agent: str, variant: str, records: Sequence[CallRecord], *, of: int) -> Row:
    """One row for these calls, which are a part of `of`."""
    durations_ms = [record.duration_ms for record in records]
    used = [record.usage for record in records if record.usage is not None]
    return Row(
        agent=agent,
        variant=variant,
        calls=len(records),
        share=len(records) / of if of else 0.0,
        p50_ms=percentile(durations_ms, 0.50),
        p95_ms=percentile(durations_ms, 0.95),
        input_tokens=sum(usage.prompt_tokens for usage in used),
        output_tokens=sum(usage.completion_tokens for usage in used),
        cost_nusd=sum(record.cost_nusd for record in records),
        fallbacks=sum(record.is_fallback for record in records),
        errors=sum(bool(record.error) for record in records),
    )


def exposures(records: Iterable[CallRecord]) -> list[Exposure]:
    """The experiments that ran, by agent. Only calls whose arm the experiment chose count."""
    users: dict[str, dict[str, bool]] = {}
    shares: dict[str, int] = {}
    for record in records:
        if record.variant_from == "experiment" and record.share_bps is not None:
            shares[record.agent] = record.share_bps
            users.setdefault(record.agent, {})[record.user] = record.variant == "finetuned"
    return [Exposure(agent, len(arms), sum(arms.values()), shares[agent]) for agent, arms in sorted(users.items())]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed (nearest rank); 0 where there are none."""
    ranked = sorted(values)
    return ranked[max(1, ceil(share * len(ranked))) - 1] if ranked else 0.0
