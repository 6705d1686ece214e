"""The ledger on a terminal: balances, spend by group, what is in doubt, who did what. Prints; computes nothing.

Amounts are never cut: where the terminal is too narrow for a table, its lines wrap.
"""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd, nusd_from_usd
from gateway.domain.spans import format_duration, format_time
from gateway.domain.words import counted
from gateway.lab.reconcile import Difference
from gateway.lab.screen import add_row, say, table_of
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
    say(screen, f"{statement.env} at {statement.at}")
    for stop in statement.stops:
        say(screen, f"STOPPED: {stop_text(stop)}")
    if statement.accounts:
        screen.print(_accounts_table(statement, is_plain=screen.options.ascii_only))
    for label, left_out in statement.accounts_left_out.items():
        say(screen, f"and {counted(left_out, 'account')} more, less used, under: {label}")
    for label in statement.idle:
        say(screen, f"Nobody has called yet under: {label}")
    if not statement.accounts and not statement.idle:
        say(screen, f"No cap is in force in {statement.env}; [[caps]] in policies/{statement.env}.toml makes one.")
    if statement.in_doubt_rows:
        number = counted(statement.in_doubt_rows, "attempt")
        say(screen, f"In doubt: {statement.in_doubt_usd} usd in {number}; see them with `gateway costs release`.")
    if statement.spend is not None:
        show_spend(statement.spend, screen)


def stop_text(stop: StopLine) -> str:
    """A kill switch in words, and how to take it back."""
    what = f"{stop.dimension}={stop.value}" if stop.dimension else "everything"
    scope = f" {what if stop.dimension != 'user' else f'user-hash={stop.value}'}" if stop.dimension else ""
    return f"{what}, by {stop.by} at {stop.at}: {stop.why} (`gateway costs resume{scope}` takes it back)"


def show_spend(spend: Spend, screen: Console) -> None:
    """Spend by group, and all of it."""
    table = table_of(spend.by, "usd", "in doubt", "requests", "tokens", "rows", names=1)
    for group in spend.groups:
        add_row(table, group.group or "-", group.usd, group.in_doubt_usd, group.requests, group.tokens, group.rows)
    say(screen, f"\nSpent from {spend.since} to {spend.until}, in doubt included:")
    screen.print(table) if spend.groups else say(screen, "  nothing")
    if spend.groups_left_out:
        say(screen, f"and {spend.groups_left_out:,} more, each with less")


def show_doubts(rows: Sequence[LedgerRow], screen: Console) -> None:
    """What is in doubt, row by row, and what may be done about it."""
    table = table_of(
        "id", "at", "agent", "model", "operation", "usd", "tokens", "note", names=5, words={"note"}, whole={"at"}
    )
    for row in rows[:_MOST_DOUBTS]:
        usd = format_usd(row.amounts.nusd)
        add_row(
            table, row.id, format_time(row.at_ms), row.on.agent or "-", row.on.model or "-", row.on.operation, usd,
            row.amounts.tokens, row.note,
        )  # fmt: skip
    screen.print(table)
    if len(rows) > _MOST_DOUBTS:
        say(screen, f"and {len(rows) - _MOST_DOUBTS:,} more")
    total = format_usd(sum(row.amounts.nusd for row in rows))
    say(screen, f"{total} usd in {counted(len(rows), 'row')}: each may have cost its whole hold, and counts until")
    say(screen, "somebody knows better. `gateway costs reconcile` compares with the provider's own figures;")
    say(screen, '`gateway costs release ID --why "..."` frees one, and `--actual USD` books what it did cost.')


def show_audit(entries: Iterable[AuditEntry], screen: Console) -> None:
    """Who did what, latest first."""
    table = table_of("at", "who", "what", "details", names=4, whole={"at"})
    for entry in entries:
        add_row(table, format_time(entry.at_ms), entry.who, entry.what, entry.details)
    screen.print(table)


def show_differences(differences: Sequence[Difference], screen: Console) -> None:
    """Our figures beside the provider's, by day and model."""
    table = table_of(
        "day", "model", "our tokens", "theirs", "our usd", "theirs", "in doubt or estimated", "verdict",
        names=2, words={"verdict"},
    )  # fmt: skip
    for found in differences:
        ours, theirs = found.ours, found.theirs
        model = f"{found.model} (booked as {', '.join(found.booked_as)})" if found.booked_as else found.model
        add_row(
            table, found.day, model, ours.sure.tokens, theirs.prompt_tokens + theirs.completion_tokens,
            format_usd(ours.sure.nusd), "-" if theirs.nusd is None else format_usd(theirs.nusd),
            f"{ours.unsure.tokens} tokens, {format_usd(ours.unsure.nusd)} usd" if any(ours.unsure) else "-",
            found.verdict,
        )  # fmt: skip
    screen.print(table)


def _accounts_table(statement: Statement, *, is_plain: bool) -> Table:
    table = table_of(
        "cap", "posted", "held", "in doubt", "remaining", "used", "per hour", "lasts", "resets",
        names=1, words={"resets"}, whole={"resets"},
    )  # fmt: skip
    for account in statement.accounts:
        scope = ", ".join(f"{name}={value}" for name, value in account.scope.items())
        amounts = (account.posted, account.held, account.in_doubt, account.remaining)
        name = f"{account.cap}\n  {scope}" if scope else account.cap
        add_row(
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
