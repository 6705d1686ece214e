"""What the evidence of a rollout says, as sentences with figures that a person can check. Decides nothing.

Its one invariant: a figure is never shown without what it is compared with.
"""

from gateway.domain.experiment import Finding, Guardrail, Metric, Mismatch
from gateway.domain.money import format_usd
from gateway.domain.rollout import RolloutState
from gateway.domain.rollout_policy import ALL_BPS, RELATIVE_METRICS
from gateway.domain.spans import format_duration, format_time

LABELS: dict[Metric, str] = {
    "success_rate": "success rate",
    "mean_latency": "mean latency",
    "p95_latency": "p95 latency",
    "cost_per_request": "cost per request",
    "satisfaction": "satisfaction",
}
# A larger value of these is the better one.
MORE_IS_BETTER: frozenset[Metric] = frozenset({"success_rate", "satisfaction"})
_LATENCIES: frozenset[Metric] = frozenset({"mean_latency", "p95_latency"})


def percent(share_bps: int) -> str:
    """A share of users as people write it: 10 %, 12.5 %."""
    return f"{100 * share_bps / ALL_BPS:g} %"


def how_long(ms: float) -> str:
    """A time in its two largest units."""
    return format_duration(round(ms / 1_000))


def value_of(metric: Metric, value: float) -> str:
    """A metric's value with its unit."""
    if metric == "success_rate":
        return f"{100 * value:.2f} %"
    if metric == "cost_per_request":
        return f"{_usd(value)} usd"
    return f"{value:.2f}" if metric == "satisfaction" else f"{value:,.0f} ms"


def allowance(guardrail: Guardrail) -> str:
    """What a guardrail lets pass: "2 points less", "20 % more"."""
    way = "less" if guardrail.metric in MORE_IS_BETTER else "more"
    number = _number(guardrail.metric, guardrail.margin, is_relative=guardrail.is_relative)
    return f"{number}{_unit(guardrail.metric, is_relative=guardrail.is_relative)} {way}"


def compared(finding: Finding) -> str:
    """One metric in both arms, the difference with its interval, and how many users it rests on."""
    label = LABELS[finding.metric]
    users = f"{finding.users_treated:,} and {finding.users_control:,} users"
    if finding.treated is None or finding.control is None:
        return f"{label}: too little is known yet ({users})"
    arms = f"{value_of(finding.metric, finding.treated)} against {value_of(finding.metric, finding.control)}"
    is_relative = finding.metric in RELATIVE_METRICS and finding.relative is not None
    change = finding.relative if is_relative else finding.difference
    low, high = (finding.relative_low, finding.relative_high) if is_relative else (finding.low, finding.high)
    if change is None:
        return f"{label} {arms} ({users})"
    unit = _unit(finding.metric, is_relative=is_relative)
    told, *ends = (
        "no bound" if number is None else _number(finding.metric, number, is_relative=is_relative, sign="+")
        for number in (change, low, high)
    )
    between = "no interval yet" if low is None and high is None else " to ".join(ends)
    return f"{label} {arms}, {told}{unit} ({between}; {users})"


def guarded(finding: Finding, guardrail: Guardrail) -> str:
    """The same, and what the guardrail makes of it."""
    said = {
        "holds": "within the guardrail",
        "breached": "past the guardrail",
        "undecided": "not yet known to be within the guardrail",
    }.get(finding.guard, "too few yet for the guardrail")
    return f"{compared(finding)}: {said} of {allowance(guardrail)}"


def mismatched(mismatch: Mismatch) -> str:
    """That users do not arrive as they were assigned, with the odds."""
    shares = ""
    if mismatch.seen_share is not None and mismatch.expected_share is not None:
        seen, expected = 100 * mismatch.seen_share, 100 * mismatch.expected_share
        shares = f": {seen:.2f} % of them were in the treated arm where {expected:.2f} % belong"
    often = f"once in {mismatch.e_value:,.0f}" if mismatch.e_value < 1e6 else "less than once in a million"
    odds = f"by chance that comes about {often} experiments"
    return f"the arms do not have the users they should ({mismatch.users:,} users{shares}; {odds})"


def standing(state: RolloutState) -> str:
    """Who brought a rollout where it stands, when and why."""
    return f"since {format_time(state.changed_ms)}, by {state.by}: {state.why}"


def above_ceiling(share_bps: int, ceiling_bps: int) -> tuple[str, ...]:
    """That a share is more than the holdback leaves, and how to lower it; nothing where it is not."""
    if share_bps <= ceiling_bps:
        return ()
    most = percent(ceiling_bps)
    lower = f"`gateway rollout set {ceiling_bps * 100 / ALL_BPS:g}`"
    said = f"{percent(share_bps)} is above the {most} that rollout.holdback_percent leaves"
    return (f"{said}: nothing is raised or completed until {lower} takes the last users added back",)


def _number(metric: Metric, number: float, *, is_relative: bool, sign: str = "") -> str:
    """A difference in its unit of `_unit`, with a plus where `sign` is one."""
    if is_relative or metric == "success_rate":
        return f"{100 * number:{sign},.4g}"
    if metric == "cost_per_request":
        return ("+" if sign and number >= 0 else "") + _usd(number)
    return f"{number:{sign},.4g}"


def _usd(nusd: float) -> str:
    """Dollars to four digits: those behind them are chance."""
    return format_usd(round(float(f"{nusd:.4g}")))


def _unit(metric: Metric, *, is_relative: bool) -> str:
    if is_relative:
        return " %"
    if metric in _LATENCIES:
        return " ms"
    return {"success_rate": " points", "cost_per_request": " usd"}.get(metric, "")
