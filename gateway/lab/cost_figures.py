"""The figures of a cost report, gathered from the ledger at one moment: totals, series, curves against caps.

Reads, and writes nothing. The invariant: every group of totals, and the series, add up to the same sum.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway.decide.caps import Rule
from gateway.decide.windows import Window
from gateway.domain.ledger import Amounts, LedgerRow
from gateway.domain.spans import Span
from gateway.store.ledger import AccountStatus, Group, Ledger, Series
from gateway.store.store import Stop, Total

GROUPS: tuple[Group, ...] = ("agent", "model", "variant", "operation")
_HOUR_S, _DAY_S = 3_600, 86_400
_MOST_STEPS = 100
_MOST_HOURS = 72
# Points of a curve that are closer than this share of the whole time fall together.
_POINTS = 600
_MOST_LINES = 5

Points = list[tuple[int, int]]


class Curve(NamedTuple):
    """A cap in dollars, and for each of its accounts what had been spent in its window, as (unix ms, nUSD) steps."""

    label: str
    limit_nusd: int
    warn_at: tuple[float, ...]
    lines: dict[str, Points]


class Figures(NamedTuple):
    """All that a report shows. `before` are the totals of as long a time right before `span`."""

    env: str
    now_ms: int
    span: Span
    step_s: int
    whole: Total
    totals: dict[Group, list[Total]]
    whole_before: Total
    before: dict[Group, list[Total]]
    days: list[Total]
    series: Series
    accounts: list[AccountStatus]
    curves: list[Curve]
    doubts: list[LedgerRow]
    stops: list[Stop]


def gather(ledger: Ledger, env: str, rules: Sequence[Rule], now_s: float, span: Span) -> Figures:
    """The figures of a time, which is widened so that it begins on a whole hour or day. Raises `StoreError`."""
    step_s = step_of(span)
    align_ms = min(step_s, _DAY_S) * 1000
    span = Span(span.since_ms - span.since_ms % align_ms, span.until_ms)
    length_ms = span.until_ms - span.since_ms
    before = Span(max(0, span.since_ms - length_ms), span.since_ms)
    totals = {by: _totals(ledger, env, by, span) for by in GROUPS}
    totals_before = {by: _totals(ledger, env, by, before) for by in GROUPS}
    return Figures(
        env=env,
        now_ms=int(now_s * 1000),
        span=span,
        step_s=step_s,
        whole=_sum(totals["agent"]),
        totals=totals,
        whole_before=_sum(totals_before["agent"]),
        before=totals_before,
        days=ledger.totals(env, "day", since_ms=span.since_ms, until_ms=span.until_ms),
        series=ledger.series(env, since_ms=span.since_ms, until_ms=span.until_ms, step_s=step_s, by="agent"),
        accounts=ledger.accounts(env, rules, now_s),
        curves=curves_of(ledger, env, rules, span),
        doubts=ledger.in_doubt(env),
        stops=ledger.stops(env),
    )


def step_of(span: Span) -> int:
    """The width of a bar in seconds: an hour up to three days, a day, or whole days where the time is long."""
    length_s = (span.until_ms - span.since_ms) // 1000
    if length_s <= _MOST_HOURS * _HOUR_S:
        return _HOUR_S
    days = -(-length_s // _DAY_S)
    return -(-days // _MOST_STEPS) * _DAY_S


def curves_of(ledger: Ledger, env: str, rules: Sequence[Rule], span: Span) -> list[Curve]:
    """How spend climbed through the windows of each cap in dollars, for its accounts with the highest peaks.

    Rests of lost leases, which belong to no call, are left out.
    """
    wanted = [rule for rule in rules if rule.unit == "usd"]
    if not wanted:
        return []
    # What was spent in a window before the time begins is where its curve begins.
    since_ms = min(rule.window(span.since_ms / 1000).start_s for rule in wanted) * 1000
    tracers = [_Tracer(rule, span) for rule in wanted]
    for row in ledger.rows(env, since_ms=since_ms, until_ms=span.until_ms, states=["posted", "in_doubt"]):
        if row.source != "lease":
            for tracer in tracers:
                tracer.add(row)
    return [tracer.curve() for tracer in tracers]


class _Tracer:
    """One cap's curves while rows go by, in order of time."""

    def __init__(self, rule: Rule, span: Span) -> None:
        self._rule = rule
        self._span = span
        self._grain_ms = max(1, (span.until_ms - span.since_ms) // _POINTS)
        self._lines: dict[str, Points] = {}
        self._windows: dict[str, Window] = {}
        self._spent: dict[str, int] = {}

    def add(self, row: LedgerRow) -> None:
        """Count a row where it falls under the cap."""
        rule = self._rule
        if not rule.applies(row.on):
            return
        name = ", ".join(getattr(row.on, scope) or "-" for scope in rule.scope) or "all"
        window = rule.window(row.at_ms / 1000)
        if self._windows.get(name) != window:
            self._end_window(name)
            self._windows[name], self._spent[name] = window, 0
        self._spent[name] += row.amounts.nusd
        self._mark(name, row.at_ms)

    def curve(self) -> Curve:
        """What came of it."""
        for name in list(self._lines):
            self._end_window(name)
            points = self._lines[name]
            points.append((self._span.until_ms, points[-1][1]))
        ranked = sorted(self._lines, key=lambda name: (-max(nusd for _, nusd in self._lines[name]), name))
        lines = {name: self._lines[name] for name in ranked[:_MOST_LINES]}
        return Curve(self._rule.label, self._rule.limit, self._rule.warn_at, lines)

    def _mark(self, name: str, at_ms: int) -> None:
        points = self._lines.setdefault(name, [(self._span.since_ms, 0)])
        spent = self._spent[name]
        if at_ms <= self._span.since_ms:
            points[0] = (self._span.since_ms, spent)
        elif points[-1][0] // self._grain_ms == at_ms // self._grain_ms and points[-1][1]:
            points[-1] = (points[-1][0], spent)
        else:
            points.append((at_ms, spent))

    def _end_window(self, name: str) -> None:
        """Back to zero where the window of this account ends, if that is within the time."""
        window = self._windows.get(name)
        if window is None or window.end_s is None or window.end_s * 1000 >= self._span.until_ms:
            return
        if window.end_s * 1000 <= self._span.since_ms:
            self._lines[name] = [(self._span.since_ms, 0)]
        else:
            self._lines[name].append((window.end_s * 1000, 0))


def _totals(ledger: Ledger, env: str, by: Group, span: Span) -> list[Total]:
    return ledger.totals(env, by, since_ms=span.since_ms, until_ms=span.until_ms)


def _sum(totals: Iterable[Total]) -> Total:
    found = list(totals)
    amounts = Amounts(*(sum(getattr(total.amounts, unit) for total in found) for unit in Amounts._fields))
    return Total("", amounts, sum(total.in_doubt_nusd for total in found), sum(total.rows for total in found))


def busiest(days: Sequence[Total], number: int) -> list[Total]:
    """The days on which the most was spent."""
    return sorted(days, key=lambda day: (-day.amounts.nusd, day.group))[:number]
