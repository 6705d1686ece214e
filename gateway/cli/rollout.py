"""`gateway rollout`: where the rollouts stand, and what people order of them. It needs no gateway that runs.

Gateways see a change in the store within half a second.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from gateway.cli import ledger
from gateway.cli.ledger import Chosen, for_configuration, note, say, signed, tell_slack
from gateway.cli.options import fail, share_or_exit
from gateway.config import Loaded
from gateway.decide.rollout_plan import RolloutPlan

if TYPE_CHECKING:
    from gateway.domain.rollout import Change
    from gateway.store.experiments import Experiments
    from gateway.store.orders import Action, Wish

Command = Callable[..., Any]


class _Desk(NamedTuple):
    """The open store, and the rollouts that are meant."""

    loaded: Loaded
    experiments: "Experiments"
    plans: dict[str, RolloutPlan]
    now_ms: int

    @property
    def env(self) -> str:
        return self.loaded.env


def for_agents(command: Command) -> Command:
    """The option that says which rollouts are meant."""
    return click.option("--agent", "agents", multiple=True, help="Only this agent's; repeatable.  [default: all]")(
        command
    )


def with_reason(command: Command) -> Command:
    """The option that says why."""
    return click.option("--why", default="", help="For the audit log.")(command)


@click.group()
def rollout() -> None:
    """Show and steer the rollouts of fine-tuned models.

    The policy's [rollout] says how the share of users rises, and what holds it or takes it back.
    """


@rollout.command()
@for_agents
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@for_configuration
def status(agents: tuple[str, ...], as_json: bool, chosen: Chosen) -> None:
    """Show where each rollout stands, what its calls say, and what they recommend.

    Changes nothing.
    """
    from gateway.store.looks import look_at
    from gateway.store.rollout_status import status_of

    found, missing = [], []
    with _desk(chosen, agents) as desk:
        states = desk.experiments.states(desk.env)
        for agent, plan in desk.plans.items():
            if agent not in states:
                missing.append(agent)
                continue
            look = look_at(desk.experiments, desk.env, states[agent], plan, now_ms=desk.now_ms)
            found.append(status_of(states[agent], look, plan, now_ms=desk.now_ms))
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(found)).decode())
    elif found:
        say("\n\n".join(map(_as_lines, found)))
    for agent in missing:
        note(f"{agent}: has not begun; a gateway begins it when it next starts or reloads")


@rollout.command("set")
@click.argument("percent", type=click.FloatRange(0, 100), callback=share_or_exit)
@click.option("--force", is_flag=True, help="Also against the evidence; wants --why.")
@with_reason
@for_agents
@signed
@for_configuration
def set_command(percent: float, force: bool, why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Set the share of users, in percent.

    Raising is refused where the evidence speaks against it; lowering never is. Exit status 1 where one was refused.
    """
    _order(chosen, agents, _wish("set", percent), who=who, why=why, force=force)


@rollout.command()
@click.option("--force", is_flag=True, help="Also against the evidence; wants --why.")
@with_reason
@for_agents
@signed
@for_configuration
def advance(force: bool, why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Go to the next stage, or complete the last one.

    Refused where the evidence speaks against it. Exit status 1 where one was refused.
    """
    _order(chosen, agents, _wish("advance"), who=who, why=why, force=force)


@rollout.command()
@with_reason
@for_agents
@signed
@for_configuration
def pause(why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Let nothing move by itself, neither up nor back."""
    _order(chosen, agents, _wish("pause"), who=who, why=why)


@rollout.command()
@with_reason
@for_agents
@signed
@for_configuration
def resume(why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Give it back to the policy."""
    _order(chosen, agents, _wish("resume"), who=who, why=why)


@rollout.command()
@with_reason
@for_agents
@signed
@for_configuration
def rollback(why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Give everybody the baseline, until it is re-armed."""
    _order(chosen, agents, _wish("rollback"), who=who, why=why)


@rollout.command()
@with_reason
@for_agents
@signed
@for_configuration
def rearm(why: str, agents: tuple[str, ...], who: str, chosen: Chosen) -> None:
    """Begin a new experiment, after a rollback or a pause.

    What earlier experiments saw no longer counts, and nobody is in the new one until it advances.
    """
    _order(chosen, agents, _wish("rearm"), who=who, why=why)


@rollout.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 100_000), help="The last so many.")
@for_agents
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@for_configuration
def history(limit: int, agents: tuple[str, ...], as_json: bool, chosen: Chosen) -> None:
    """Show who changed what, when, why, and on which evidence."""
    from gateway.store.rollout_status import change_line

    # What came of it is told when nothing is tested any more, too.
    with _desk(chosen, (), wants_experiment=False) as desk:
        changes = desk.experiments.changes(desk.env)
    # One that left the configuration has a history still.
    for agent in set(agents) - {change.agent for change in changes}:
        _check_agent(agent, desk.plans)
    changes = [change for change in changes if not agents or change.agent in agents][-limit:]
    if as_json:
        say(msgspec.json.format(msgspec.json.encode([change_line(change) for change in changes])).decode())
        return
    for change in changes:
        _show(change)
    if not changes:
        note("no rollout has begun here")


def _wish(action: "Action", percent: float = 0.0) -> "Wish":
    from gateway.store.orders import Wish

    return Wish(action, percent)


@contextmanager
def _desk(chosen: Chosen, agents: tuple[str, ...], *, wants_experiment: bool = True) -> Iterator[_Desk]:
    from gateway.store.experiments import Experiments
    from gateway.store.store import StoreError
    from gateway.treasury import ledger_path

    loaded = chosen.load()
    rollouts = loaded.plan.rollouts
    if wants_experiment and not rollouts:
        key = "ab_testing.enabled" if not loaded.policy.ab_testing.enabled else "models.use_finetuned"
        fail(f"the policy of {loaded.env!r} makes no experiment: {key} is false")
    for agent in agents:
        _check_agent(agent, rollouts)
    plans = {agent: plan for agent, plan in rollouts.items() if not agents or agent in agents}
    try:
        # Only a gateway makes a store: where there is none, most likely another folder was meant.
        with Experiments(ledger_path(loaded.settings), clock=ledger.clock, is_new_allowed=False) as experiments:
            yield _Desk(loaded, experiments, plans, int(ledger.clock() * 1000))
    except StoreError as error:
        fail(str(error))


def _check_agent(agent: str, rollouts: Mapping[str, RolloutPlan]) -> None:
    from gateway.domain.reading import nearest

    if agent not in rollouts:
        known = f"known: {', '.join(rollouts)}{nearest(agent, rollouts)}"
        raise click.BadParameter(f"there is no agent {agent!r}; {known}", param_hint="--agent")


def _order(
    chosen: Chosen, agents: tuple[str, ...], wish: "Wish", *, who: str, why: str, force: bool = False
) -> None:  # fmt: skip
    """Order it of each; what one refuses keeps it from no other."""
    from gateway.decide.rollout_by_hand import MAX_WHY, Order, Refusal
    from gateway.domain.rollout import PILOT
    from gateway.edge.pilot import tell as told_change
    from gateway.store.looks import look_at
    from gateway.store.orders import carry_out, rests_on_evidence, state_of

    if len(why) > MAX_WHY:
        raise click.BadParameter(f"is longer than {MAX_WHY} characters", param_hint="--why")
    if force and not why.strip():
        raise click.BadParameter("--force wants a reason, which the audit log keeps", param_hint="--why")
    if not who.strip() or who.strip() == PILOT:
        raise click.BadParameter(f"the audit log wants a name, and {PILOT} is the gateway's own", param_hint="--who")
    is_refused = False
    with _desk(chosen, agents) as desk:
        for agent, plan in desk.plans.items():
            # Of each at its own time: a comparison of many calls takes a while.
            order = Order(who, int(ledger.clock() * 1000), why, force)
            state = state_of(desk.experiments, desk.env, agent, plan, now_ms=order.now_ms, by=who)
            look = None
            # Whoever takes back does not wait for figures.
            if rests_on_evidence(state, wish):
                look = look_at(desk.experiments, desk.env, state, plan, now_ms=order.now_ms)
            done = carry_out(desk.experiments, desk.env, plan, wish, order, state=state, look=look)
            if isinstance(done, Refusal):
                is_refused = True
                note(f"{agent}: refused: {done.reasons[0]}")
                for reason in done.reasons[1:]:
                    note(f"  {reason}")
                if done.can_force:
                    note("  --force --why '...' overrules it")
            elif done.change is not None:
                _show(done.change)
                tell_slack(desk.loaded, partial(told_change, change=done.change))
    if is_refused:
        sys.exit(1)


def _as_lines(one: dict[str, Any]) -> str:
    upcoming = "" if one["next_percent"] is None else f", next {one['next_percent']:g} %"
    users = one["users"]
    lines = (
        f"{one['agent']}: {one['phase']} at {one['share_percent']:g} % since {one['since']} "
        f"({one['mode']}, experiment {one['experiment']}{upcoming})",
        f"  last change by {one['last_change']['by']}: {one['last_change']['why']}",
        f"  users: {users['finetuned']:,} with the fine-tuned model, {users['baseline']:,} with the baseline",
        f"  recommendation: {one['recommendation']}",
        *(f"    {reason}" for reason in one["reasons"]),
        *(f"  {metric['words']}  [{metric['verdict']}]" for metric in one["metrics"]),
    )
    return "\n".join(lines)


def _show(change: "Change") -> None:
    from gateway.decide.rollout_words import percent
    from gateway.domain.spans import format_time

    moved = f"{percent(change.from_bps)} -> {percent(change.share_bps)}"
    forced = ", forced" if change.is_forced else ""
    why = f" ({change.why})" if change.why else ""
    say(f"{format_time(change.at_ms)}  {change.agent}: {change.event} by {change.by}{forced}, {moved}{why}")
    say(*(f"    {reason}" for reason in change.reasons))
