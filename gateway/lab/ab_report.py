"""The report on A/B tests: Markdown that begins with what to do and why, then tables, plots, and the audit log's story.

The invariant: the same store and the same `now` give the same bytes, and nothing is recommended that the pilot's own
judgement (decide/rollout.py:recommendation) does not say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gateway.decide.rollout_plan import RolloutPlan
from gateway.decide.rollout_words import percent
from gateway.domain.rollout import Phase
from gateway.domain.spans import format_time
from gateway.lab.ab_figures import AgentFigures, Figures
from gateway.lab.ab_tables import (
    arrivals_words,
    calls_table,
    dollars,
    errors_table,
    metrics_table,
    story_table,
    summary_table,
    windows_table,
)
from gateway.lab.markdown import Plot, code, image, plots_of, prose, put, why_no_plots

_OURS = ("*-intervals.svg", "*-share.svg", "*-days.svg")
_METHOD = (
    "Each user is in one arm and stays there; users, not calls, are compared, within times of one share, and a call "
    "counts in the arm it was assigned to, whoever answered it in the end (intention to treat). "
    "An interval holds the true difference at every look at once: over a whole experiment, however often one looks, "
    "the chance that any interval of a metric with a guardrail ever misses it is {alpha:g} % at most. "
    "So *better*, *worse*, and a guardrail that *holds* or is *breached*, may be acted upon the moment they are there; "
    "*undecided* says only that the interval still holds zero. "
    "The method, its sources and what was measured: `docs/statistics.md`."
)
_WINDOWS = (
    "To see what changed of late. The decision rests on the whole experiment: among many windows, one says something "
    "by chance."
)
_POOLED = (
    "Every agent's users, compared within their own agent and share, and then put together. It has no guardrails: each "
    "agent's rollout is decided by its own figures."
)


def write_report(figures: Figures, out: Path) -> list[Path]:
    """Write the report to `out` and its plots into a folder beside it; what was written, the report first.

    Without matplotlib it has no plots, and says so. Raises OSError.
    """
    missing = why_no_plots()
    plots = [] if missing else [plot for found in figures.agents for plot in _plots(found)]
    text = markdown(figures, plots, plots_of(out).name, note=missing)
    return put(out, text, plots, ours=_OURS)


def markdown(figures: Figures, plots: Sequence[Plot], folder: str, *, note: str = "") -> str:
    """The report as text, with a note of what it lacks."""
    shown = {plot.name: image(plot, folder) for plot in plots}
    sections = [
        f"# A/B tests of {figures.env}",
        f"Fine-tuned models against their baselines, written {format_time(figures.now_ms)}.",
        f"Without plots: {note}." if note else "",
        *_summary(figures),
    ]
    for found in figures.agents:
        sections += _agent_sections(found, shown)
    if figures.pooled is not None:
        sections += [
            "## All agents together",
            _POOLED,
            metrics_table(figures.pooled),
        ]
    if figures.agents:
        sections += ["## How to read this", _METHOD.format(alpha=100 * figures.alpha)]
    return "\n\n".join(section for section in sections if section) + "\n"


def as_json(figures: Figures) -> bytes:
    """The same for machines: names as in the sources, so costs in nUSD, times in unix ms, shares of 10,000."""
    return msgspec.json.format(msgspec.json.encode(_plain(figures)))


def _summary(figures: Figures) -> list[str]:
    """What a person wants to know first."""
    if not figures.agents:
        why = (
            "a gateway that serves begins one for each agent"
            if figures.is_experiment
            else "`ab_testing.enabled` is false"
        )
        return [f"**No rollout has begun in {figures.env}**: {why}. There is nothing to compare."]
    return [summary_table(figures), "\n".join(_headline(found) for found in figures.agents)]


def _headline(found: AgentFigures) -> str:
    """What to do with one agent, and each reason below it."""
    if found.advice is None or found.plan is None:
        return f"- {code(found.agent)}: {found.why_not}"
    reasons = "".join(f"\n  - {prose(reason)}" for reason in found.advice.reasons)
    what = _what_to_do(found, found.advice.word, found.plan)
    return f"- {code(found.agent)}: **{found.advice.word}.** {what} Why:{reasons}"


def _what_to_do(found: AgentFigures, word: str, plan: RolloutPlan) -> str:
    """The recommendation as one sentence, with who carries it out."""
    state = found.state
    share = percent(state.share_bps)
    if word == "roll back":
        by_itself = plan.rollback_on != "nothing" and state.phase not in (Phase.PAUSED, Phase.BASELINE)
        who = "the gateway does so by itself" if by_itself else _command("rollback", found)
        return f"Take the fine-tuned model back from the {share} of users who have it: {who}."
    if word == "hold":
        return f"Leave the share at {share}."
    upcoming = plan.next_bps(state.share_bps)
    if state.phase is Phase.COMPLETED:
        return f"The rollout is complete, and all is well at {share}."
    by_itself = plan.is_automatic and state.phase in (Phase.RAMPING, Phase.HOLD)
    who = "the gateway does so by itself" if by_itself else _command("advance", found)
    step = (
        "The rollout can be completed" if upcoming is None else f"Raise the share from {share} to {percent(upcoming)}"
    )
    return f"{step}: {who}."


def _command(order: str, found: AgentFigures) -> str:
    return f"`gateway rollout {order} --agent {found.agent}`"


def _agent_sections(found: AgentFigures, shown: Mapping[str, str]) -> list[str]:
    state, arms = found.state, found.arms
    since, until = format_time(found.span.since_ms), format_time(found.span.until_ms)
    outside = ""
    if arms.outside.calls:
        outside = (
            f"{arms.outside.calls:,} more calls, of {dollars(arms.outside.cost_nusd)}, are in no comparison: they have "
            "no user, their arm was forced or did not come from the rollout, or they are of an earlier experiment."
        )
    # The whole time alone has its table already.
    is_windowed = any(evidence is not found.evidence for _, evidence in found.windows)
    has_calls = arms.treated.calls + arms.control.calls > 0
    seen = [
        metrics_table(found.evidence),
        arrivals_words(found.evidence.mismatch),
        shown.get(f"{found.agent}-intervals.svg", ""),
        shown.get(f"{found.agent}-days.svg", ""),
        "### What became of the calls",
        calls_table(arms.treated, arms.control),
        errors_table(arms.treated, arms.control),
    ]
    return [
        f"## {found.agent}",
        f"Experiment {state.experiment}, from {since} to {until}; {state.phase.replace('_', ' ')} at "
        f"{percent(state.share_bps)} since {format_time(state.share_since_ms)}.",
        found.why_not,
        *(seen if has_calls else ["No call of this experiment was seen in that time."]),
        outside,
        *(["### Over time windows", _WINDOWS, windows_table(found.windows)] if has_calls and is_windowed else []),
        "### How it came here",
        shown.get(f"{found.agent}-share.svg", ""),
        story_table(found.changes),
    ]


def _plots(found: AgentFigures) -> list[Plot]:
    # Only here: matplotlib is an extra, and takes a second to import.
    from gateway.lab import ab_charts as charts

    plots = []
    if charts.metrics_with_bands(found.track):
        drawing = charts.draw_intervals(found.track, found.changes, found.span)
        shows = f"{found.agent}: differences between the arms with their intervals, as the evidence grew"
        plots.append(Plot(f"{found.agent}-intervals.svg", shows, drawing))
    if found.arms.steps:
        drawing = charts.draw_steps(found.arms.steps, found.step_s, found.span)
        plots.append(Plot(f"{found.agent}-days.svg", f"{found.agent}: success rate and latency of both arms", drawing))
    if found.changes:
        drawing = charts.draw_share(found.changes, found.span.until_ms)
        plots.append(Plot(f"{found.agent}-share.svg", f"{found.agent}: share of users over time", drawing))
    return plots


def _plain(value: Any) -> Any:
    """Named tuples as objects, which JSON would have as lists."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, msgspec.Struct):
        return msgspec.to_builtins(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
