"""The ledger on a terminal: balances, spend by group, what is in doubt, who did what. Prints; computes nothing.

Amounts are never cut: where the terminal is too narrow for a table, its lines wrap.
"""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd, nusd_from_usd
from gateway.domain.spans import format_duration, format_time
from gateway.lab.reconcile import Difference
from gateway.store.ledger import AuditEntry
from gateway.store.statement import AccountLine, Amount, Spend, Statement, StopLine

_WIDTH = 140
_ROUGH_NUSD = 100_000
_BAR = 10
_MOST_DOUBTS = 200
_ALARMING_PERCENT = 83


def console() -> Console:
    """Where tables are shown: never so narrow that a figure would be cut."""
    found = Console(highlight=False)
    return found if found.is_terminal and found.width >= _WIDTH else Console(highlight=False, width=_WIDTH)


def show_statement(statement: Statement, screen: Console) -> None:
    """Kill switches, accounts, what is in doubt, and spend where it was asked for."""
    _say(screen, f"{statement.env} at {statement.at}")
    for stop in statement.stops:
        _say(screen, f"STOPPED: {stop_text(stop)}")
    if statement.accounts:
        screen.print(_accounts_table(statement, is_plain=screen.options.ascii_only))
    for label, left_out in statement.accounts_left_out.items():
        _say(screen, f"and {_counted(left_out, 'account')} more, less used, under: {label}")
    for label in statement.idle:
        _say(screen, f"Nobody has called yet under: {label}")
    if not statement.accounts and not statement.idle:
        _say(screen, f"No cap is in force in {statement.env}; [[caps]] in policies/{statement.env}.toml makes one.")
    if statement.in_doubt_rows:
        number = _counted(statement.in_doubt_rows, "attempt")
        _say(screen, f"In doubt: {statement.in_doubt_usd} usd in {number}; see them with `gateway costs release`.")
    if statement.spend is not None:
        show_spend(statement.spend, screen)


def stop_text(stop: StopLine) -> str:
    """A kill switch in words, and how to take it back."""
    what = f"{stop.dimension}={stop.value}" if stop.dimension else "everything"
    scope = f" {what if stop.dimension != 'user' else f'user-hash={stop.value}'}" if stop.dimension else ""
    return f"{what}, by {stop.by} at {stop.at}: {stop.why} (`gateway costs resume{scope}` takes it back)"


def show_spend(spend: Spend, screen: Console) -> None:
    """Spend by group, and all of it."""
    table = _table(spend.by, "usd", "in doubt", "requests", "tokens", "rows", names=1)
    for group in spend.groups:
        _row(table, group.group or "-", group.usd, group.in_doubt_usd, group.requests, group.tokens, group.rows)
    _say(screen, f"\nSpent from {spend.since} to {spend.until}, in doubt included:")
    screen.print(table) if spend.groups else _say(screen, "  nothing")
    if spend.groups_left_out:
        _say(screen, f"and {spend.groups_left_out:,} more, each with less")


def show_doubts(rows: Sequence[LedgerRow], screen: Console) -> None:
    """What is in doubt, row by row, and what may be done about it."""
    table = _table("id", "at", "agent", "model", "operation", "usd", "tokens", "note", names=5)
    for row in rows[:_MOST_DOUBTS]:
        usd = format_usd(row.amounts.nusd)
        _row(
            table, row.id, format_time(row.at_ms), row.on.agent or "-", row.on.model or "-", row.on.operation, usd,
            row.amounts.tokens, row.note,
        )  # fmt: skip
    screen.print(table)
    if len(rows) > _MOST_DOUBTS:
        _say(screen, f"and {len(rows) - _MOST_DOUBTS:,} more")
    total = format_usd(sum(row.amounts.nusd for row in rows))
    _say(screen, f"{total} usd in {_counted(len(rows), 'row')}: each may have cost its whole hold, and counts until")
    _say(screen, "somebody knows better. `gateway costs reconcile` compares with the provider's own figures;")
    _say(screen, '`gateway costs release ID --why "..."` frees one, and `--actual USD` books what it did cost.')


def show_audit(entries: Iterable[AuditEntry], screen: Console) -> None:
    """Who did what, latest first."""
    table = _table("at", "who", "what", "details", names=4)
    for entry in entries:
        _row(table, format_time(entry.at_ms), entry.who, entry.what, entry.details)
    screen.print(table)


def show_differences(differences: Sequence[Difference], screen: Console) -> None:
    """Our figures beside the provider's, by day and model."""
    table = _table(
        "day", "model", "our tokens", "theirs", "our usd", "theirs", "in doubt or estimated", "verdict", names=2
    )
    for found in differences:
        ours, theirs = found.ours, found.theirs
        model = f"{found.model} (booked as {', '.join(found.booked_as)})" if found.booked_as else found.model
        _row(
            table, found.day, model, ours.sure.tokens, theirs.prompt_tokens + theirs.completion_tokens,
            format_usd(ours.sure.nusd), "-" if theirs.nusd is None else format_usd(theirs.nusd),
            f"{ours.unsure.tokens} tokens, {format_usd(ours.unsure.nusd)} usd" if any(ours.unsure) else "-",
            found.verdict,
        )  # fmt: skip
    screen.print(table)


def _accounts_table(statement: Statement, *, is_plain: bool) -> Table:
    table = _table("cap", "posted", "held", "in doubt", "remaining", "used", "per hour", "lasts", "resets", names=1)
    for account in statement.accounts:
        scope = ", ".join(f"{name}={value}" for name, value in account.scope.items())
        amounts = (account.posted, account.held, account.in_doubt, account.remaining)
        name = f"{account.cap}\n  {scope}" if scope else account.cap
        _row(
            table, name, *(_shown(account, amount) for amount in amounts),
            _bar(account.used_percent, is_plain=is_plain),
            _rough(account, account.burn_per_hour), _lasts(account), _resets(account),
            style="bold" if account.used_percent >= _ALARMING_PERCENT else "",
        )  # fmt: skip
    return table


def _shown(account: AccountLine, amount: Amount) -> str:
    return f"${amount}".replace("$-", "-$") if account.unit == "usd" else f"{amount:,}"


def _rough(account: AccountLine, rate: Amount) -> str:
    """A rate to a hundredth of a cent: what is behind it is chance."""
    if isinstance(rate, int):
        return _shown(account, rate)
    nusd = nusd_from_usd(rate)
    return _shown(account, format_usd(nusd - nusd % _ROUGH_NUSD if nusd > _ROUGH_NUSD else nusd))


def _resets(account: AccountLine) -> str:
    return "never" if account.resets_in_s is None else f"in {format_duration(account.resets_in_s)}"


def _bar(percent: float, *, is_plain: bool) -> str:
    """Ten places, full only at the limit."""
    full = min(_BAR, max(0, int(percent * _BAR / 100)))
    done, left = "#-" if is_plain else "█░"
    return f"{done * full}{left * (_BAR - full)} {percent:5.1f} %"


def _lasts(account: AccountLine) -> str:
    if account.exhausted_in_s is None:
        return "-" if account.resets is None else "to its reset"
    return "used up" if account.exhausted_in_s == 0 else format_duration(account.exhausted_in_s)


def _table(*columns: str, names: int) -> Table:
    """A table whose first columns are names, and the others figures."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(columns):
        is_figure = index >= names and column not in ("note", "verdict", "resets")
        table.add_column(
            column,
            justify="right" if is_figure else "left",
            overflow="fold",
            no_wrap=is_figure or column in ("at", "resets"),
        )
    return table


def _row(table: Table, *cells: object, style: str = "") -> None:
    # As Text: names may hold brackets, which are markup elsewhere.
    table.add_row(*(Text(str(cell)) for cell in cells), style=style)


def _say(screen: Console, text: str) -> None:
    screen.print(text, markup=False, soft_wrap=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
