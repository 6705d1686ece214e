"""The cost dashboard: Markdown that begins with plain words, tables whose figures are the ledger's, and SVG plots.

The invariant: the same ledger and the same `now` give the same bytes, and every figure in a table is exact.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.decide.caps import Rule
from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd
from gateway.domain.spans import Span, format_duration, format_time
from gateway.lab.cost_figures import GROUPS, Figures, busiest, gather
from gateway.lab.markdown import Plot, code, image, plots_of, put, table, why_no_plots
from gateway.store.ledger import AccountStatus, Ledger
from gateway.store.statement import amount_of, fullest_of, used_percent
from gateway.store.store import Total

_DOUBTS_LISTED = 20
_DAYS_LISTED = 10
_BARS = 12


def write_report(ledger: Ledger, env: str, rules: Sequence[Rule], now_s: float, span: Span, out: Path) -> list[Path]:
    """Write the report to `out` and its plots into a folder beside it; what was written, the report first.

    Without matplotlib it has no plots, and says so. Raises `StoreError`, `OSError`.
    """
    missing = why_no_plots()
    figures = gather(ledger, env, rules, now_s, span)
    plots = [] if missing else _plots(figures)
    text = markdown(figures, plots, plots_of(out).name, note=missing)
    return put(out, text, plots, ours=["cap-*.svg"])


def markdown(figures: Figures, plots: Sequence[Plot], folder: str, *, note: str = "") -> str:
    """The report as text, with a note of what it lacks."""
    span = figures.span
    shown = {plot.name: image(plot, folder) for plot in plots}
    caps = [text for name, text in shown.items() if name.startswith("cap-")]
    sections = [
        f"# Costs of {figures.env}",
        f"{format_time(span.since_ms)} to {format_time(span.until_ms)}, written {format_time(figures.now_ms)}. "
        "All amounts in US dollars, exact; what is in doubt is counted in.",
        f"Without plots: {note}." if note else "",
        _summary(figures),
        *(["## Over time", shown["spend.svg"]] if "spend.svg" in shown else []),
        "## Caps",
        _caps_table(figures.accounts),
        *caps,
        *_group_sections(figures, shown),
        "## Largest days",
        _totals_table("day", busiest(figures.days, _DAYS_LISTED)),
        "## In doubt",
        _doubts(figures.doubts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _summary(figures: Figures) -> str:
    """What a person wants to know first."""
    lines = [
        *(
            f"**STOPPED:** {_what(stop.dimension, stop.value)}, by {code(stop.by)}: {code(stop.why)}."
            for stop in figures.stops
        )
    ]
    whole = figures.whole
    if not whole.rows:
        lines.append("Nothing was spent.")
    else:
        lines.append(
            f"**{format_usd(whole.amounts.nusd)} usd** were spent, in {whole.amounts.requests:,} requests and "
            f"{whole.amounts.tokens:,} tokens{_compared(figures)}."
        )
        if whole.amounts.nusd:
            leaders = [_leader(by, figures.totals[by], whole) for by in ("agent", "model")]
            lines.append(" ".join(filter(None, leaders)))
    if figures.doubts:
        usd = format_usd(sum(row.amounts.nusd for row in figures.doubts))
        lines.append(f"**{usd} usd are in doubt**: attempts that may have cost as much, and count until that is known.")
    tightest = max(figures.accounts, key=used_percent, default=None)
    if tightest is None:
        lines.append("No cap is in force.")
    else:
        used = f"{used_percent(tightest):g} % is used{_lasts(tightest)}"
        lines.append(f"The tightest cap is {code(_account_name(tightest))}: {used}.")
    return "\n".join(f"- {line}" for line in lines)


def _compared(figures: Figures) -> str:
    before = figures.whole_before.amounts.nusd
    length = format_duration((figures.span.until_ms - figures.span.since_ms) // 1000)
    if not before:
        return f"; nothing in the {length} before"
    return (
        f": {_change(figures.whole.amounts.nusd, before)} against the {format_usd(before)} usd of the {length} before"
    )


def _leader(by: str, totals: Sequence[Total], whole: Total) -> str:
    first = totals[0]
    if not first.group:  # Entries by hand need not name one.
        return ""
    return f"The dearest {by} was {code(first.group)}, with {first.amounts.nusd / whole.amounts.nusd:.0%} of it."


def _lasts(status: AccountStatus) -> str:
    if status.exhausted_in_s == 0:
        return ", so calls under it are refused"
    if status.exhausted_in_s is not None:
        return f"; at the rate of the last hour it is used up in {format_duration(status.exhausted_in_s)}"
    return "" if status.window.end_s is None else "; at the rate of the last hour it lasts to its reset"


def _group_sections(figures: Figures, shown: Mapping[str, str]) -> list[str]:
    sections = []
    for by in GROUPS:
        before = {total.group: total.amounts.nusd for total in figures.before[by]}
        sections += [f"## By {by}", shown.get(f"{by}.svg", ""), _totals_table(by, figures.totals[by], before)]
    return sections


def _totals_table(name: str, totals: Sequence[Total], before: Mapping[str, int] | None = None) -> str:
    """Groups with what they spent; with `before` also those that spend no more, and how they changed."""
    if not totals and not before:
        return "Nothing was spent."
    head = [name, "usd", "in doubt", "requests", "tokens", "rows"]
    rows = [
        [
            code(total.group), format_usd(total.amounts.nusd), format_usd(total.in_doubt_nusd),
            str(total.amounts.requests), str(total.amounts.tokens), str(total.rows),
        ]
        for total in totals
    ]  # fmt: skip
    if before is not None:
        head += ["before", "change"]
        gone = [group for group in before if group not in {total.group for total in totals}]
        rows += [[code(group), "0.00", "0.00", "0", "0", "0"] for group in gone]
        now = [*((total.group, total.amounts.nusd) for total in totals), *((group, 0) for group in gone)]
        for row, (group, nusd) in zip(rows, now, strict=True):
            row += [format_usd(before.get(group, 0)), _change(nusd, before.get(group, 0))]
    return table(head, rows, names=1)


def _caps_table(accounts: Sequence[AccountStatus]) -> str:
    if not accounts:
        return "No cap is in force."
    accounts, left_out = fullest_of(accounts)
    head = ["cap", "posted", "held", "in doubt", "remaining", "used", "per hour", "resets"]
    rows = []
    for status in accounts:
        amounts = (status.posted, status.held, status.in_doubt, status.remaining)
        resets = "never" if status.window.end_s is None else format_time(status.window.end_s * 1000)
        cells = [str(amount_of(status.unit, amount)) for amount in amounts]
        burn = str(amount_of(status.unit, status.burn_per_hour))
        rows.append([code(_account_name(status)), *cells, f"{used_percent(status):g} %", burn, resets])
    more = [f"\n\nand {number:,} more, less used, under {code(label)}" for label, number in left_out.items()]
    return table(head, rows, names=1) + "".join(more)


def _doubts(rows: Sequence[LedgerRow]) -> str:
    if not rows:
        return "Nothing is in doubt."
    largest = sorted(rows, key=lambda row: (-row.amounts.nusd, row.at_ms, row.id))[:_DOUBTS_LISTED]
    cells = [
        [code(row.id), format_time(row.at_ms), code(row.on.agent), code(row.on.model), format_usd(row.amounts.nusd)]
        for row in largest
    ]
    total = format_usd(sum(row.amounts.nusd for row in rows))
    left = f", the largest {_DOUBTS_LISTED} of them" if len(rows) > _DOUBTS_LISTED else ""
    return f"{total} usd in {len(rows)} rows{left}:\n\n{table(['id', 'at', 'agent', 'model', 'usd'], cells, names=4)}"


def _plots(figures: Figures) -> list[Plot]:
    # Only here: matplotlib is an extra, and takes a second to import.
    from gateway.lab import cost_charts as charts

    plots = []
    span, agents = figures.span, figures.series
    if agents.groups:
        plots.append(
            Plot("spend.svg", "Spend over time by agent", charts.draw_spend(agents, figures.step_s, span, "agent"))
        )
    for by in ("model", "operation"):
        groups = [(total.group, total.amounts.nusd) for total in figures.totals[by][:_BARS]]
        if groups:
            plots.append(Plot(f"{by}.svg", f"Spend by {by}", charts.draw_shares(groups, by)))
    for number, curve in enumerate(figures.curves, start=1):
        shows = f"Spend under the cap {curve.label}"
        plots.append(Plot(f"cap-{number}.svg", shows, charts.draw_cap(curve, span)))
    return plots


def _account_name(status: AccountStatus) -> str:
    scope = ", ".join(f"{name}={value}" for name, value in status.scope)
    return f"{status.label}; {scope}" if scope else status.label


def _what(dimension: str, value: str) -> str:
    return code(f"{dimension}={value}") if dimension else "everything"


def _change(now: int, before: int) -> str:
    if not before:
        return "new" if now else "none"
    return "gone" if not now else f"{(now - before) / before:+.0%}"
