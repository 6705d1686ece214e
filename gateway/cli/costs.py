"""`gateway costs`: how the caps stand, entries by hand, what is in doubt, and the kill switch. Prints; decides nothing.

It works on the ledger itself, without a gateway and beside running ones. The commands that read and write files are in
cost_files.py.
"""

import secrets
import sys
from typing import TYPE_CHECKING, cast

import click
import msgspec

from gateway.cli.cost_files import export_command, import_command, reconcile_command, report
from gateway.cli.ledger import Chosen, Desk, desk, for_configuration, note, say, signed, span_or_exit, tell_stop
from gateway.decide.by_hand import Entry, actual_of, doubts_about, read_switch, row_of_entry, summary
from gateway.decide.caps import Rule
from gateway.domain.ledger import LedgerRow
from gateway.domain.money import format_usd
from gateway.domain.spans import format_time, read_instant

if TYPE_CHECKING:
    from gateway.store.ledger import By

_BY = ("agent", "model", "variant", "operation", "key", "user", "day")
_RELEASED_NAMED = 20


@click.group(invoke_without_command=True)
@click.option("--by", type=click.Choice(_BY), help="Also what was spent, by this.")
@click.option("--since", help="Spent since: 24h, 7d, today, 2026-11-01, an ISO time.  [default: today; by day: 7d]")
@click.option("--until", default="", help="Spent until; default: now.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@for_configuration
@click.pass_context
def costs(context: click.Context, by: str | None, since: str | None, until: str, as_json: bool, chosen: Chosen) -> None:
    """Show and keep the ledger: caps, spend, doubts, kill switch.

    Without a command: how every cap stands now. It needs no gateway that runs. Exit status 0 also where a cap is used
    up; 1 where there is no ledger yet.
    """
    if context.invoked_subcommand is not None:
        if by or since or until or as_json:
            raise click.UsageError(f"give options behind the command: gateway costs {context.invoked_subcommand} ...")
        # `gateway costs --env production stop` means what it says.
        context.default_map = dict.fromkeys(costs.commands, chosen._asdict())
        return
    from gateway.store.statement import statement_of

    with desk(chosen) as opened:
        wanted = by or ("agent" if since or until else None)
        span = span_or_exit(since or ("7d" if by == "day" else "today"), until, opened.now_ms)
        found = statement_of(
            opened.ledger, opened.env, opened.plan.rules, opened.now_s, cast("By | None", wanted), span
        )  # fmt: skip
    if as_json:
        say(_json(found))
        return
    from gateway.lab.cost_tables import console, show_statement

    show_statement(found, console())


@costs.command()
@click.option("--agent", required=True, help="Whose cost it is; it need not be in the configuration.")
@click.option("--operation", default="inference", show_default=True, help="Such as benchmark or finetune.")
@click.option("--cost", required=True, metavar="USD", help="In dollars, such as 0.50.")
@click.option("--model", default="", help="As upstream/model-id.")
@click.option("--variant", default="", help="finetuned or baseline.")
@click.option("--key", default="", help="The name of a caller's key.")
@click.option("--user", default="", help="A user's id; only its hash is kept.")
@click.option("--note", "text", default="", help="Why, for those who read it later.")
@click.option("--at", default="", help="When: 2026-11-21T06:40:00Z, 2h (ago); default: now.")
@signed
@for_configuration
def log(
    agent: str, operation: str, cost: str, model: str, variant: str, key: str, user: str, text: str, at: str,
    who: str, chosen: Chosen,
) -> None:  # fmt: skip
    """Book money that was spent past the gateway.

    What is spent is spent: it counts in every cap it falls under, also above it.
    """
    entry = Entry(
        agent=agent, usd=cost, operation=operation, model=model, variant=variant, key=key, user=user, note=text
    )  # fmt: skip
    with desk(chosen) as opened:
        try:
            at_ms = read_instant(at, opened.now_ms) if at else opened.now_ms
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--at") from None
        row = row_of_entry(opened.plan, entry, id=f"manual-{secrets.token_hex(8)}", at_ms=at_ms)
        for doubt in doubts_about(opened.plan, row):
            note(f"note: {doubt}; booked all the same")
        opened.ledger.add([row], who=who)
        say(f"booked {summary(row)}, {format_time(row.at_ms)}, as {row.id}")
        say(*(f"  {line}" for line in counted_in(opened, row)))


def counted_in(opened: Desk, row: LedgerRow) -> list[str]:
    """A line for each cap that a row counts in, with what remains."""
    from gateway.store.statement import account_line

    standing = {
        status.account: account_line(status, opened.now_s)
        for status in opened.ledger.accounts(opened.env, opened.plan.rules, opened.now_s)
    }
    lines = []
    for rule in opened.plan.rules:
        if not rule.applies(row.on) or not rule.amount(row.amounts):
            continue
        if rule.window(row.at_ms / 1000) != rule.window(opened.now_s):
            lines.append(f"counts in {rule.label}, in a window that is not the present one")
            continue
        line = standing.get(rule.account(row.on))
        scope = _scope_text(rule, row)
        if line is None:
            # Accounts of a scope are made when a call first asks for them, and find this row in the ledger then.
            lines.append(f"counts in {rule.label}{scope}")
            continue
        left = f"{line.remaining} {line.unit}"
        lines.append(f"counts in {rule.label}{scope}: {left} remain, {line.used_percent:g} % is used")
    return lines or ["counts in no cap"]


@costs.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "is_all", is_flag=True, help="Everything that is in doubt.")
@click.option("--why", default="", help="For the audit log; wanted with an ID or --all.")
@click.option("--actual", default="", metavar="USD", help="It did cost this: book it in the place of the hold.")
@signed
@for_configuration
def release(ids: tuple[str, ...], is_all: bool, why: str, actual: str, who: str, chosen: Chosen) -> None:
    """List what is in doubt, or end the doubt.

    With an ID or --all the money is free again, unless --actual says what the one attempt did cost.
    """
    if (ids or is_all) and not why.strip():
        raise click.UsageError('say why: --why "checked with the provider\'s invoice"')
    if ids and is_all:
        raise click.UsageError("give IDs or --all, not both")
    if actual and len(ids) != 1:
        raise click.UsageError("--actual is for exactly one ID")
    with desk(chosen) as opened:
        rows = opened.ledger.in_doubt(opened.env)
        if not rows and not ids:
            say(f"Nothing is in doubt in {opened.env}.")
            return
        if not ids and not is_all:
            from gateway.lab.cost_tables import console, show_doubts

            show_doubts(rows, console())
            return
        wanted = list(dict.fromkeys(ids)) or [row.id for row in rows]
        actuals = {row.id: actual_of(row, actual) for row in rows if actual and row.id in ids}
        ended = opened.ledger.release(opened.env, wanted, who=who, why=why, actual=actuals)
    before = {row.id: row.amounts.nusd for row in rows}
    freed = 0
    for number, row in enumerate(ended):
        # One that came into doubt while this went on was not among the rows, and has its hold still.
        was = before.get(row.id, row.amounts.nusd)
        kept = row.amounts.nusd if row.state == "posted" else 0
        freed += was - kept
        if number < _RELEASED_NAMED:
            done = f"booked {format_usd(kept)} of" if row.state == "posted" else "freed"
            say(f"{row.id}: {done} {format_usd(was)} usd")
    if len(ended) > _RELEASED_NAMED:
        say(f"and {len(ended) - _RELEASED_NAMED} more")
    say(f"{len(ended)} out of doubt, {format_usd(freed)} usd free again.")


@costs.command()
@click.argument("scope", default="")
@click.option("--why", required=True, help="For the audit log, for `gateway costs`, and for the callers.")
@signed
@for_configuration
def stop(scope: str, why: str, who: str, chosen: Chosen) -> None:
    """Throw the kill switch for all calls, or for a SCOPE.

    SCOPE is agent=NAME, key=NAME, user=ID, user-hash=HASH, model=UPSTREAM/ID or operation=NAME. Calls that it covers
    are refused, and streams under way are cut, by every gateway on this ledger within half a second.
    """
    from gateway.store.store import Stop

    with desk(chosen) as opened:
        switch = read_switch(opened.plan, scope)
        thrown = Stop(opened.env, *switch, by=who, why=why, at_ms=opened.now_ms)
        opened.ledger.stop(thrown)
        tell_stop(opened, thrown)
    say(f"STOPPED in {opened.env}: {switch}. `{_resume_command(scope)}` takes it back.")


@costs.command()
@click.argument("scope", default="")
@click.option("--why", default="", help="For the audit log.")
@signed
@for_configuration
def resume(scope: str, why: str, who: str, chosen: Chosen) -> None:
    """Take a kill switch back; SCOPE as it was thrown.

    Exit status 1 where it was not thrown.
    """
    from gateway.store.store import Stop

    with desk(chosen) as opened:
        # What has left the configuration since can be resumed still.
        switch = read_switch(opened.plan, scope, is_known_only=False)
        was_thrown = opened.ledger.resume(opened.env, *switch, who=who, why=why)
        others = opened.ledger.stops(opened.env)
        if was_thrown:
            tell_stop(opened, Stop(opened.env, *switch, by=who, why=why, at_ms=opened.now_ms), is_lifted=True)
    from gateway.lab.cost_tables import stop_text
    from gateway.store.statement import stop_line

    if was_thrown:
        say(f"{switch} goes on in {opened.env}.")
    else:
        note(f"no kill switch was thrown for {switch} in {opened.env}")
    say(*(f"Still STOPPED: {stop_text(stop_line(other))}" for other in others))
    sys.exit(0 if was_thrown else 1)


@costs.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@for_configuration
def audit(limit: int, as_json: bool, chosen: Chosen) -> None:
    """Show who did what to the ledger by hand, latest first.

    Of all environments that share the ledger.
    """
    with desk(chosen) as opened:
        entries = opened.ledger.audit(limit)
    if as_json:
        say(_json([{**entry._asdict(), "details": msgspec.Raw(entry.details.encode())} for entry in entries]))
    elif not entries:
        say("Nobody has done anything by hand.")
    else:
        from gateway.lab.cost_tables import console, show_audit

        show_audit(entries, console())


@costs.command()
@for_configuration
def verify(chosen: Chosen) -> None:
    """Check every account against the rows of the ledger.

    Exit status 1 where one does not.
    """
    with desk(chosen) as opened:
        problems = opened.ledger.verify(opened.env)
    if problems:
        say(*problems)
        sys.exit(1)
    say(f"Every account of {opened.env} holds what the ledger's rows add up to.")


for command in (report, export_command, import_command, reconcile_command):
    costs.add_command(command)


def _scope_text(rule: Rule, row: LedgerRow) -> str:
    values = [f"{name}={getattr(row.on, name) or '-'}" for name in rule.scope]
    return f" ({', '.join(values)})" if values else ""


def _resume_command(scope: str) -> str:
    return f"gateway costs resume {scope}".rstrip()


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()
