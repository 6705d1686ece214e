"""Where a rollout stands and what its evidence says, as plain values for a terminal or for JSON."""

from typing import Any

from gateway.decide.rollout import recommendation
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.decide.rollout_words import compared
from gateway.domain.experiment import Finding
from gateway.domain.rollout import Change, RolloutState
from gateway.domain.rollout_policy import ALL_BPS
from gateway.domain.spans import format_time

_PERCENT = 100 / ALL_BPS


def status_of(state: RolloutState, look: Look, plan: RolloutPlan, *, now_ms: int) -> dict[str, Any]:
    """One agent's rollout. Shares in percent, times in UTC."""
    advice = recommendation(state, look, now_ms=now_ms, plan=plan)
    upcoming = plan.next_bps(state.share_bps)
    mismatch = look.evidence.mismatch
    return {
        "agent": state.agent,
        "phase": state.phase.value,
        "share_percent": state.share_bps * _PERCENT,
        "since": format_time(state.share_since_ms),
        "experiment": state.experiment,
        "mode": "automatic" if plan.is_automatic else "manual",
        "next_percent": None if upcoming is None else upcoming * _PERCENT,
        "last_change": {"by": state.by, "why": state.why, "at": format_time(state.changed_ms)},
        "users": {"finetuned": look.evidence.users_treated, "baseline": look.evidence.users_control},
        "users_at_stage": {"finetuned": look.users_treated, "baseline": look.users_control},
        "sample_ratio_mismatch": mismatch.is_found,
        "recommendation": advice.word,
        "reasons": list(advice.reasons),
        "metrics": [_metric(finding) for finding in look.evidence.findings],
    }


def change_line(change: Change) -> dict[str, Any]:
    """One row of the audit log."""
    return {
        "agent": change.agent,
        "version": change.version,
        "at": format_time(change.at_ms),
        "by": change.by,
        "event": change.event.value,
        "from_phase": change.from_phase.value,
        "phase": change.phase.value,
        "experiment": change.experiment,
        "from_percent": change.from_bps * _PERCENT,
        "share_percent": change.share_bps * _PERCENT,
        "why": change.why,
        "reasons": list(change.reasons),
        "evidence": change.evidence,
        "forced": change.is_forced,
        "mismatch": change.has_mismatch,
    }


def _metric(finding: Finding) -> dict[str, Any]:
    return {
        "metric": finding.metric,
        "finetuned": finding.treated,
        "baseline": finding.control,
        "difference": finding.difference,
        "low": finding.low,
        "high": finding.high,
        "verdict": finding.verdict,
        "guardrail": finding.guard,
        "words": compared(finding),
    }
