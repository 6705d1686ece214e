"""What an experiment says by now: each metric, treated arm against control, as Evidence.

Any rows may be put in: a window of time, one agent's stages or several agents'. No policy: what follows from it is
decide/rollout.py's. Its one invariant: all intervals of one experiment miss the truth at any look, ever, with
probability `Terms.alpha` at most, as far as the arms are large enough (docs/statistics.md, with what was measured).
"""

from collections.abc import Hashable, Iterable
from math import inf, isfinite, sqrt
from typing import Final, NamedTuple

from gateway.decide.intervals import Band, ratio_band, threshold
from gateway.decide.mismatch import mismatch_of
from gateway.decide.quantiles import Quantiles, quantiles
from gateway.decide.ratios import Arms, Contrast, Read, contrast
from gateway.domain.experiment import (
    METRICS,
    Arrivals,
    Evidence,
    Finding,
    Guardrail,
    GuardVerdict,
    Metric,
    Terms,
    UserSums,
    Verdict,
)

_LEVEL: Final = 0.95


class Kind(NamedTuple):
    """What a metric is made of. `tau`: the difference that its test is sharpest for, fixed once and for all.

    `is_relative`: whether `tau` is a part of the arms' values. `scale`: how far calls can be apart, and so the arms.
    """

    read: Read | None
    is_higher_better: bool
    tau: float
    is_relative: bool
    scale: float | None = None


KINDS: Final[dict[Metric, Kind]] = {
    "success_rate": Kind(lambda row: (row.calls, row.successes), True, 0.02, False, 1.0),
    "mean_latency": Kind(lambda row: (row.calls, row.latency_ms), False, 0.1, True),
    "p95_latency": Kind(None, False, 0.1, True),
    "cost_per_request": Kind(lambda row: (row.calls, row.cost_nusd), False, 0.1, True),
    "satisfaction": Kind(lambda row: (row.scores, row.score_sum), True, 0.1, False, 2.0),
}


def evidence_of(rows: Iterable[UserSums], arrivals: Iterable[Arrivals], terms: Terms) -> Evidence:
    """All that the rows and arrivals say.

    Raises ValueError for two guardrails of one metric, for one that is relative to satisfaction, which has no natural
    zero, and for a margin that is no number from 0 up.
    """
    guardrails = _guardrails(terms)
    alpha = terms.alpha / max(1, len(guardrails))
    strata = merge(rows)
    findings = []
    for metric in METRICS:
        seen = _seen(strata, metric, terms, alpha)
        findings.append(_finding(metric, seen, guardrails.get(metric), alpha))
    users = [len({user for arms in strata.values() for user in arms[arm]}) for arm in (0, 1)]
    return Evidence(
        findings=tuple(findings),
        users_treated=users[1],
        users_control=users[0],
        mismatch=mismatch_of(arrivals, alpha=terms.mismatch_alpha),
    )


def merge(rows: Iterable[UserSums]) -> dict[Hashable, Arms]:
    """The rows by stage and arm, those of the same user as one; without those that have no calls."""
    strata: dict[Hashable, Arms] = {}
    for row in rows:
        if row.calls <= 0:
            continue
        arm = strata.setdefault(row.stage, ({}, {}))[row.is_treated]
        before = arm.get(row.user)
        arm[row.user] = row if before is None else _added(before, row)
    return strata


def _added(one: UserSums, other: UserSums) -> UserSums:
    latencies = dict(one.latencies)
    for cell, count in other.latencies.items():
        latencies[cell] = latencies.get(cell, 0) + count
    return one._replace(
        calls=one.calls + other.calls,
        successes=one.successes + other.successes,
        latency_ms=one.latency_ms + other.latency_ms,
        cost_nusd=one.cost_nusd + other.cost_nusd,
        scores=one.scores + other.scores,
        score_sum=one.score_sum + other.score_sum,
        latencies=latencies,
    )


def _guardrails(terms: Terms) -> dict[Metric, Guardrail]:
    found: dict[Metric, Guardrail] = {}
    for guardrail in terms.guardrails:
        if guardrail.metric in found:
            raise ValueError(f"{guardrail.metric} has two guardrails")
        if guardrail.is_relative and guardrail.metric == "satisfaction":
            raise ValueError("a guardrail on satisfaction is absolute: -1 to 1 has no zero to be relative to")
        if not (isfinite(guardrail.margin) and guardrail.margin >= 0):
            raise ValueError(f"the margin of {guardrail.metric} must be 0 or more, not {guardrail.margin}")
        found[guardrail.metric] = guardrail
    return found


class _Seen(NamedTuple):
    """One metric: values (control, treated), intervals, and the numbers behind them. No intervals: too few."""

    values: tuple[float, float] | None = None
    users: tuple[int, int] = (0, 0)
    calls: tuple[int, int] = (0, 0)
    difference: Band | None = None
    relative: Band | None = None
    contrast: Contrast | None = None
    reach: float = inf


def _seen(strata: dict[Hashable, Arms], metric: Metric, terms: Terms, alpha: float) -> _Seen:
    kind = KINDS[metric]
    if kind.read is None:
        found = quantiles(strata, _LEVEL)
        return _Seen() if found is None else _of_quantiles(found, kind.tau, terms, alpha)
    arms = contrast(strata, kind.read, scale=kind.scale)
    return _Seen() if arms is None else _of_ratios(arms, kind, terms, alpha)


def _is_enough(arms: Contrast, terms: Terms) -> bool:
    return min(arms.users) >= terms.min_users and arms.effective >= terms.min_effective_users


def _of_ratios(arms: Contrast, kind: Kind, terms: Terms, alpha: float) -> _Seen:
    seen = _Seen(arms.values, arms.users, arms.calls)
    if not _is_enough(arms, terms):
        return seen
    variance = arms.variance()
    control, treated = arms.values
    if variance == 0:
        # Only a metric that is 0 for every call of both arms comes here: a model without a price.
        return seen._replace(difference=Band(0.0, 0.0), contrast=arms, reach=0.0)
    tau = kind.tau * (abs(control) + abs(treated)) / 2 if kind.is_relative else kind.tau
    reach = threshold(tau * tau / variance, alpha, arms.freedom)
    half = reach * sqrt(variance)
    ratio = ratio_band(
        treated,
        control,
        var_treated=arms.variances[1],
        var_control=arms.variances[0],
        covariance=arms.covariance,
        reach=reach,
    )
    return seen._replace(
        difference=Band(arms.difference - half, arms.difference + half),
        relative=Band(ratio.low - 1, ratio.high - 1) if ratio is not None and control > 0 else None,
        contrast=arms,
        reach=reach,
    )


def _of_quantiles(found: Quantiles, tau: float, terms: Terms, alpha: float) -> _Seen:
    arms = found.contrast
    seen = _Seen(found.values, arms.users, arms.calls)
    if not _is_enough(arms, terms) or not found.relative_se:
        return seen
    reach = threshold(tau * tau / found.relative_se**2, alpha, arms.freedom)
    relative = found.relative_band(reach)
    control = found.values[0]
    # The absolute interval is the relative one at the control's value, so that they never disagree about zero.
    return seen._replace(difference=Band(control * relative.low, control * relative.high), relative=relative)


def _finding(metric: Metric, seen: _Seen, guardrail: Guardrail | None, alpha: float) -> Finding:
    if seen.values is None:
        guard: GuardVerdict = "none" if guardrail is None else "too few"
        return Finding(metric, "too few", guard, alpha=alpha, guardrail=guardrail)
    control, treated = seen.values
    has_ratio = _has_ratio(metric, control)
    most = KINDS[metric].scale or inf
    low, high = _ends(seen.difference, -most, most)
    # No metric with a ratio is ever below zero.
    relative_low, relative_high = _ends(seen.relative, -1.0, inf) if has_ratio else (None, None)
    return Finding(
        metric=metric,
        verdict=_verdict(seen.difference, KINDS[metric].is_higher_better),
        guard=_guard(metric, seen, guardrail),
        treated=treated,
        control=control,
        difference=treated - control,
        low=low,
        high=high,
        relative=treated / control - 1 if has_ratio else None,
        relative_low=relative_low,
        relative_high=relative_high,
        users_treated=seen.users[1],
        users_control=seen.users[0],
        calls_treated=seen.calls[1],
        calls_control=seen.calls[0],
        alpha=alpha,
        guardrail=guardrail,
    )


def _has_ratio(metric: Metric, control: float) -> bool:
    return control > 0 and metric != "satisfaction"


def _ends(band: Band | None, least: float, most: float) -> tuple[float | None, float | None]:
    """An interval as it is shown: without what cannot be, and None where it has no end or there is none."""
    if band is None:
        return None, None
    low, high = max(band.low, least), min(band.high, most)
    return low if isfinite(low) else None, high if isfinite(high) else None


def _verdict(band: Band | None, is_higher_better: bool) -> Verdict:
    if band is None:
        return "too few"
    if band.low > 0:
        return "better" if is_higher_better else "worse"
    if band.high < 0:
        return "worse" if is_higher_better else "better"
    return "undecided"


def _guard(metric: Metric, seen: _Seen, guardrail: Guardrail | None) -> GuardVerdict:
    if guardrail is None:
        return "none"
    if seen.difference is None:
        return "too few"
    excess = _excess(metric, seen, seen.difference, guardrail)
    if excess.low > 0:
        return "breached"
    return "holds" if excess.high <= 0 else "undecided"


def _excess(metric: Metric, seen: _Seen, difference: Band, guardrail: Guardrail) -> Band:
    """By how much the treated arm is worse than the guardrail allows, as an interval."""
    is_higher_better, margin = KINDS[metric].is_higher_better, guardrail.margin
    if not guardrail.is_relative:
        low, high = (-difference.high, -difference.low) if is_higher_better else difference
        return Band(low - margin, high - margin)
    if seen.contrast is None:
        relative = seen.relative
        if relative is None:
            raise AssertionError("BUG: a quantile always has a ratio")
        return Band(relative.low - margin, relative.high - margin)
    # No division: the interval of treated - limit * control is sound however near to zero the control is.
    limit = 1 - margin if is_higher_better else 1 + margin
    control, treated = seen.contrast.values
    excess = limit * control - treated if is_higher_better else treated - limit * control
    half = seen.reach * sqrt(seen.contrast.variance(limit))
    return Band(excess - half, excess + half)
