"""The tables of an A/B report as Markdown, in units that people read. Writes; computes nothing.

The invariant: a figure is rounded to what its interval could make a difference to, and never shown without its unit.
"""

from collections.abc import Sequence
from math import floor, log10

from gateway.decide.rollout_words import LABELS, allowance, mismatched, percent
from gateway.domain.experiment import Evidence, Finding, GuardVerdict, Metric, Mismatch
from gateway.domain.money import NUSD_PER_USD
from gateway.domain.rollout import Change
from gateway.domain.spans import format_time
from gateway.lab.ab_arms import Arm
from gateway.lab.ab_figures import Figures, effect_of
from gateway.lab.markdown import code, prose, table

_CHANGES_LISTED = 40
_ERRORS_LISTED = 8
# One call costs too little for anybody to have a feeling for it.
_CALLS_PRICED = 1_000
_NAMES: dict[Metric, str] = {
    **LABELS,
    "cost_per_request": "cost per 1,000 requests",
    "satisfaction": "user satisfaction",
}
_GUARDS: dict[GuardVerdict, str] = {
    "holds": "holds",
    "breached": "**breached**",
    "undecided": "not known yet",
    "too few": "too few yet",
}
_NOTHING = "–"


def summary_table(figures: Figures) -> str:
    """A line for each agent, and one for all of them together."""
    head = ["agent", "phase", "share", "users: fine-tuned", "baseline", "calls: fine-tuned", "baseline", "recommended"]
    rows = []
    for found in figures.agents:
        treated, control = found.arms.treated, found.arms.control
        rows.append([
            code(found.agent), _plain(found.state.phase), percent(found.state.share_bps), f"{treated.users:,}",
            f"{control.users:,}", f"{treated.calls:,}", f"{control.calls:,}",
            f"**{found.advice.word}**" if found.advice else _NOTHING,
        ])  # fmt: skip
    if figures.pooled is not None:
        calls = [sum(getattr(found.arms, arm).calls for found in figures.agents) for arm in ("treated", "control")]
        users = (figures.pooled.users_treated, figures.pooled.users_control)
        rows.append(["all", "", "", *(f"{number:,}" for number in (*users, *calls)), ""])
    return table(head, rows, names=2)


def metrics_table(evidence: Evidence) -> str:
    """Every metric: both arms, the difference with its interval, what that says, and what its guardrail makes of it."""
    head = ["metric", "fine-tuned", "baseline", "difference", "relative", "interval", "verdict", "guardrail"]
    return table(head, [_metric_row(finding) for finding in evidence.findings], names=1)


def windows_table(windows: Sequence[tuple[str, Evidence]]) -> str:
    """Each metric over each window: both arms, the interval of their difference, and what that says."""
    head = ["window", "metric", "fine-tuned", "baseline", "interval", "verdict", "users: fine-tuned", "baseline"]
    rows = []
    for name, evidence in windows:
        for finding in evidence.findings:
            users = (f"{finding.users_treated:,}", f"{finding.users_control:,}")
            arms = (value_of(finding.metric, finding.treated), value_of(finding.metric, finding.control))
            rows.append([name, _NAMES[finding.metric], *arms, _interval(finding), finding.verdict, *users])
            name = ""
    return table(head, rows, names=2)


def calls_table(treated: Arm, control: Arm) -> str:
    """What became of the calls of each arm."""
    rows = [
        [name, *(f"{getattr(arm, field):,}{_part(getattr(arm, field), arm.calls)}" for arm in (treated, control))]
        for name, field in (
            ("calls", "calls"), ("answered", "answered"), ("failed", "failed"),
            ("caller left before the end", "left"), ("answered by a fallback", "fallbacks"),
        )
    ]  # fmt: skip
    rows.append(["cost", *(dollars(arm.cost_nusd) for arm in (treated, control))])
    return table(["", "fine-tuned", "baseline"], rows, names=1)


def errors_table(treated: Arm, control: Arm) -> str:
    """The kinds of errors, the most frequent first; "" where nothing failed."""
    kinds = sorted({*treated.errors, *control.errors}, key=lambda kind: (-_number(treated, control, kind), kind))
    rows = [
        [code(kind), f"{treated.errors.get(kind, 0):,}", f"{control.errors.get(kind, 0):,}"]
        for kind in kinds[:_ERRORS_LISTED]
    ]
    if kinds[_ERRORS_LISTED:]:
        sums = [sum(arm.errors.get(kind, 0) for kind in kinds[_ERRORS_LISTED:]) for arm in (treated, control)]
        rows.append([f"{len(kinds) - _ERRORS_LISTED} other kinds", *(f"{number:,}" for number in sums)])
    return table(["error", "fine-tuned", "baseline"], rows, names=1) if rows else ""


def story_table(changes: Sequence[Change]) -> str:
    """The audit log, latest first: when, who, what, and why."""
    rows = []
    for change in reversed(changes[-_CHANGES_LISTED:]):
        shares = percent(change.share_bps)
        if change.from_bps != change.share_bps:
            shares = f"{percent(change.from_bps)} → {shares}"
        what = f"{_plain(change.event)}{', against the evidence' if change.is_forced else ''}"
        why = "<br>".join(filter(None, (f"“{prose(change.why)}”" if change.why else "", *map(prose, change.reasons))))
        rows.append([format_time(change.at_ms), code(change.by), what, shares, why])
    text = table(["when", "who", "what", "share", "why"], rows, names=5)
    left = len(changes) - len(rows)
    return f"{text}\n\nand {left:,} earlier: `gateway rollout history`" if left else text


def arrivals_words(found: Mismatch) -> str:
    """Whether users arrive in the arms as they were assigned, in words."""
    if found.is_found:
        return f"**{_capital(mismatched(found))}.** Until that is explained no comparison can be trusted."
    if found.seen_share is None or found.expected_share is None:
        return "Too few users have come to say whether they arrive as they were assigned."
    seen, expected = f"{100 * found.seen_share:.2f} %", f"{100 * found.expected_share:.2f} %"
    return (
        f"Users arrive in the arms as they were assigned: of {found.users:,} first calls of a user at a share, {seen} "
        f"were in the fine-tuned arm, where {expected} belong."
    )


def value_of(metric: Metric, value: float | None, *, sign: str = "") -> str:
    """A metric's value, or a difference where `sign` is a plus, as people read it."""
    if value is None:
        return _NOTHING
    if metric == "success_rate":
        return f"{100 * value:{sign}.2f} {'points' if sign else '%'}"
    if metric == "satisfaction":
        return f"{value:{sign}.2f}"
    if metric == "cost_per_request":
        return dollars(value * _CALLS_PRICED, sign=sign)
    return (
        f"{value / 1000:{sign},.2f} s"
        if abs(value) >= 10_000
        else f"{value:{sign},.{0 if abs(value) >= 100 else 1}f} ms"
    )


def dollars(nusd: float, *, sign: str = "") -> str:
    """Dollars to three digits, and to cents at least."""
    usd = nusd / NUSD_PER_USD
    digits = min(9, max(2, 2 - floor(log10(abs(usd))))) if usd else 2
    mark = "-" if usd < 0 else sign
    return f"{mark}${abs(usd):,.{digits}f}"


def _metric_row(finding: Finding) -> list[str]:
    metric = finding.metric
    relative = _NOTHING if finding.relative is None else f"{100 * finding.relative:+.1f} %"
    rail = _NOTHING
    if finding.guardrail is not None:
        rail = f"{_GUARDS[finding.guard]} (at most {allowance(finding.guardrail)})"
    return [
        _NAMES[metric], value_of(metric, finding.treated), value_of(metric, finding.control),
        value_of(metric, finding.difference, sign="+"), relative, _interval(finding), finding.verdict, rail,
    ]  # fmt: skip


def _interval(finding: Finding) -> str:
    """On the scale that the finding is judged on."""
    found = effect_of(finding)
    if found.low is None and found.high is None:
        return _NOTHING
    ends = []
    for end in (found.low, found.high):
        if end is None:
            ends.append("no bound")
        else:
            ends.append(f"{100 * end:+.1f} %" if found.is_relative else value_of(finding.metric, end, sign="+"))
    low, high = ends
    unit = " points"
    return f"{low.removesuffix(unit) if high.endswith(unit) else low} to {high}"


def _part(number: int, calls: int) -> str:
    return f" ({100 * number / calls:.1f} %)" if calls and number != calls else ""


def _number(treated: Arm, control: Arm, kind: str) -> int:
    return treated.errors.get(kind, 0) + control.errors.get(kind, 0)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
