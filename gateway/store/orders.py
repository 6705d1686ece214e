"""What people order of a rollout, carried out on the store: decided and written, by one way for CLI and API.

Takes no look itself: a command may compare where it stands, a gateway that serves may not (look_process.py). The
invariant: what is refused has changed nothing, and what somebody else changed meanwhile is not overwritten.
"""

from typing import Literal, NamedTuple, get_args

from gateway.decide.rollout import Decision, begin
from gateway.decide.rollout_by_hand import Order, Refusal, next_stage, pause, rearm, resume, roll_back, set_share
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.rollout import RolloutState
from gateway.domain.rollout_policy import ALL_BPS
from gateway.store.experiments import Conflict, Experiments

Action = Literal["set", "advance", "pause", "resume", "rollback", "rearm"]
ACTIONS: tuple[Action, ...] = get_args(Action)
# With these the evidence can be overruled.
FORCED: tuple[Action, ...] = ("set", "advance")


class Wish(NamedTuple):
    """What is wanted; `percent` with `set` only."""

    action: Action
    percent: float = 0.0


def state_of(
    experiments: Experiments, env: str, agent: str, plan: RolloutPlan, *, now_ms: int, by: str
) -> RolloutState:
    """Where a rollout stands; one that no gateway has begun yet begins, by who orders. Raises `StoreError`."""
    state = experiments.states(env).get(agent)
    if state is not None:
        return state
    change = begin(agent, plan=plan, now_ms=now_ms, by=by).change
    assert change is not None, "BUG: a beginning is a change"
    return experiments.begin(env, change)


def carry_out(
    experiments: Experiments,
    env: str,
    plan: RolloutPlan,
    wish: Wish,
    order: Order,
    *,
    state: RolloutState,
    look: Look | None,
) -> Decision | Refusal:
    """Do as ordered from this state, or say why not. Raises `StoreError`."""
    decided = _decide(state, look, plan, wish, order)
    if isinstance(decided, Refusal) or decided.change is None:
        return decided
    try:
        experiments.apply(env, decided.change)
    except Conflict:
        return Refusal(("somebody else has just changed it; look at its status and order again",))
    return decided


def rests_on_evidence(state: RolloutState, wish: Wish) -> bool:
    """Whether this order may be refused by what the calls say; for others the evidence is only noted."""
    if wish.action == "set":
        return wish.percent * ALL_BPS / 100 > state.share_bps
    return wish.action in ("advance", "resume")


def _decide(state: RolloutState, look: Look | None, plan: RolloutPlan, wish: Wish, order: Order) -> Decision | Refusal:
    match wish.action:
        case "set":
            return set_share(state, wish.percent, order, look=look, plan=plan)
        case "advance":
            return next_stage(state, order, look=look, plan=plan)
        case "pause":
            return pause(state, order)
        case "resume":
            return resume(state, order, look=look, plan=plan)
        case "rollback":
            return roll_back(state, order, look=look)
        case "rearm":
            return rearm(state, order)
