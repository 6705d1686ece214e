"""What a week of rollouts came to: each rollout's course, and whether all who tell of it tell the same.

Reads what gateways left behind, their journal, their store and their audit log, and what callers saw; the sums are
made again here from the journal alone. The invariant: a check that compared nothing does not pass.
"""

import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.decide.assign import bucket_of
from gateway.decide.compare import evidence_of
from gateway.decide.rollout_evidence import Look
from gateway.decide.rollout_plan import RolloutPlan, rollout_plan
from gateway.decide.rollout_words import percent
from gateway.domain.call import CallRecord
from gateway.domain.experiment import Evidence, UserSums, bucket_of_ms
from gateway.domain.outcome import Outcome, outcome_of
from gateway.domain.policy import Policy
from gateway.domain.rollout import PILOT, Change, Phase, RolloutState, replay
from gateway.lab.agreement import Check
from gateway.store.experiments import Experiments
from gateway.store.journal_reader import read_calls
from gateway.store.looks import look_at
from gateway.store.rollout_status import status_of

TREATED = "finetuned"
# The store keeps whole microseconds.
SAME = 1e-6
Wanted = Mapping[str, tuple[str, tuple[Phase, ...]]]


class Seen(NamedTuple):
    """What callers saw: how calls ended, the scores that were taken down by call, calls by agent, user and arm."""

    words: Counter[str]
    scores: dict[str, float]
    told: Counter[tuple[str, str, str]]


class Course(NamedTuple):
    """One rollout. `calls` and `users`, of both arms and of the treated one, are those until its last change.

    `steps` has each change with its day: the share it led to, or its name where the share stayed. `why` is why the last
    change was made; `now` is what its status recommends, and why.
    """

    agent: str
    what: str
    phase: Phase
    is_wanted: bool
    steps: str
    days: float
    calls: tuple[int, int]
    users: tuple[int, int]
    why: str
    now: str


class Verdict(NamedTuple):
    """All courses and all checks."""

    courses: tuple[Course, ...]
    checks: tuple[Check, ...]
    words: Counter[str]

    @property
    def holds(self) -> bool:
        """Whether every rollout came out as it had to, and every check holds."""
        return all(one.is_wanted for one in self.courses) and all(one.holds for one in self.checks)


class Left(NamedTuple):
    """What the gateways left behind. By agent, but for the calls, of which `calls` are those that count."""

    records: list[CallRecord]
    calls: list[Outcome]
    changes: dict[str, list[Change]]
    states: dict[str, RolloutState]
    looks: dict[str, Look]
    statuses: dict[str, dict[str, Any]]
    plans: dict[str, RolloutPlan]
    sums: dict[str, list[UserSums]]


def leader_of(store: Path, env: str) -> str:
    """Whose turn it is to look at the rollouts; "" where it is nobody's."""
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5)) as database:
        found = database.execute("SELECT holder FROM leaders WHERE env = ?", (env,)).fetchone()
    return found[0] if found else ""


def read_left(folder: Path, env: str, agents: Sequence[str], policy: Mapping[str, Any]) -> Left:
    """All of it, once the gateways are gone. Raises `StoreError`."""
    records = [one for one in read_calls(folder / "journal") if isinstance(one, CallRecord)]
    told = (outcome_of(record) for record in records)
    calls = [one for one in told if one and one.experiment and one.user and one.is_success is not None]
    terms = msgspec.convert(policy, Policy)
    plans = {agent: rollout_plan(terms, agent) for agent in agents}
    now_ms = time.time_ns() // 1_000_000
    with Experiments(folder / "gateway.db", clock=time.time) as experiments:
        states = experiments.states(env)
        looks = {agent: look_at(experiments, env, states[agent], plans[agent], now_ms=now_ms) for agent in agents}
        return Left(
            records, calls, {agent: experiments.changes(env, agent) for agent in agents}, states, looks,
            {agent: status_of(states[agent], looks[agent], plans[agent], now_ms=now_ms) for agent in agents}, plans,
            {agent: experiments.user_sums(env, agent, experiment=1) for agent in agents},
        )  # fmt: skip


def judge_week(
    folder: Path, env: str, wanted: Wanted, seen: Seen, *, policy: Mapping[str, Any], day_s: float,
    killed_at_ms: int, leaders: tuple[str, ...],
) -> Verdict:  # fmt: skip
    """What the week came to. `killed_at_ms` is 0 where no leader was to be killed. Raises `StoreError`."""
    left = read_left(folder, env, tuple(wanted), policy)
    courses = [course_of(agent, *wanted[agent], left, day_s) for agent in wanted]
    checks = [check_arms(left), check_told(left, seen), check_audit(left), check_sums(left), check_status(left, seen)]
    if seen.scores:
        checks.append(check_scores(left, seen))
    if killed_at_ms:
        checks.append(check_lead(left, killed_at_ms, leaders))
    return Verdict(tuple(courses), tuple(checks), seen.words)


def course_of(agent: str, what: str, wanted: tuple[Phase, ...], left: Left, day_s: float) -> Course:
    """How one rollout went, from its audit log, and how many calls that took, from the journal."""
    changes, state = left.changes[agent], left.states[agent]
    last = changes[-1]
    calls = [one for one in left.calls if one.agent == agent and one.at_ms <= last.at_ms]
    treated = [one for one in calls if one.variant == TREATED]
    days = [(one.at_ms - changes[0].at_ms) / 1000 / day_s for one in changes]
    steps = [
        f"{at:.1f}: {percent(one.share_bps) if one.share_bps != one.from_bps else one.event.value}"
        for at, one in zip(days, changes, strict=True)
    ]
    return Course(
        agent, what, state.phase, state.phase in wanted, ", ".join(steps), days[-1], (len(calls), len(treated)),
        (len({one.user for one in calls}), len({one.user for one in treated})), last.reasons[0],
        f"{left.statuses[agent]['recommendation']}, {left.statuses[agent]['reasons'][0]}",
    )  # fmt: skip


# --- The checks -------------------------------------------------------------------------------------------------------


def check_arms(left: Left) -> Check:
    """Every call was in the arm that bucket and share say, and no user ever left the treated arm while shares rose."""
    wrong, buckets, stages = 0, defaultdict(set), defaultdict(set)
    for one in left.records:
        if one.bucket is None or not one.experiment:
            continue
        is_treated = one.variant == TREATED
        wrong += is_treated != (one.bucket < (one.share_bps or 0))
        buckets[one.agent, one.user].add(one.bucket)
        stages[one.agent, one.user].add((one.stage, one.share_bps or 0, is_treated))
    wandered = sum(len(found) > 1 for found in buckets.values())
    flips = sum(_has_flip(sorted(seen)) for seen in stages.values())
    moved = sum(len({is_treated for _, _, is_treated in seen}) > 1 for seen in stages.values())
    what = (
        f"{len(stages)} users in {sum(map(len, stages.values()))} stages: {moved} changed arms, {flips} of them "
        f"against the share; {wandered} had two buckets, {wrong} calls were in the wrong arm"
    )
    return Check(bool(stages) and not (wrong or wandered or flips), what)


def _has_flip(seen: Sequence[tuple[int, int, bool]]) -> bool:
    """Whether a user was in both arms of a stage, or left the treated one although the share had not been lowered."""
    return any(
        was_treated and not is_treated and share >= before
        for (_, before, was_treated), (_, share, is_treated) in pairwise(seen)
    ) or len({stage for stage, _, _ in seen}) != len(seen)


def check_told(left: Left, seen: Seen) -> Check:
    """What callers were told of their arms is what anybody can work out from their ids and the audit log."""
    wrong = 0
    for agent, user, variant in seen.told:
        bucket = bucket_of(agent, user)
        shares = [one.share_bps for one in left.changes[agent]]
        wrong += not (any(bucket < share for share in shares) if variant == TREATED else bucket >= min(shares))
    answered = sum(one.status == 200 and not one.client_left for one in left.records)
    what = (
        f"{seen.told.total()} answers to {len(seen.told)} pairs of user and arm: {wrong} were in an arm that was never "
        f"theirs; {seen.words['answered']} whole answers are with callers, {answered} in the journal"
    )
    return Check(bool(seen.told) and not wrong and 0 < seen.words["answered"] <= answered, what)


def check_audit(left: Left) -> Check:
    """Each audit log has no gap and nothing twice, is the pilot's alone, and adds up to the state there is."""
    wrong, count = [], 0
    for agent, changes in left.changes.items():
        count += len(changes)
        times = [one.at_ms for one in changes]
        try:
            adds_up = replay(changes) == left.states[agent]
        except ValueError as error:
            adds_up = False
            wrong.append(str(error))
        is_whole = [one.version for one in changes] == list(range(1, len(changes) + 1))
        if not (adds_up and is_whole and times == sorted(times) and all(one.by == PILOT for one in changes)):
            wrong.append(agent)
    what = f"{count} changes in {len(left.changes)} audit logs add up to the states there are"
    return Check(count > 0 and not wrong, f"{what}; wrong: {', '.join(wrong)}" if wrong else what)


def check_sums(left: Left) -> Check:
    """The store's sums of calls, successes, money and time are the journal's, arm by arm; each call is in once."""
    journal: Counter[tuple[str, bool, str]] = Counter()
    store: Counter[tuple[str, bool, str]] = Counter()
    for one in left.calls:
        arm = (one.agent, one.variant == TREATED)
        journal[*arm, "calls"] += 1
        journal[*arm, "successes"] += bool(one.is_success)
        journal[*arm, "nusd"] += one.cost_nusd
        journal[*arm, "us"] += round(one.latency_ms * 1000)
    for agent, rows in left.sums.items():
        for row in rows:
            store[agent, row.is_treated, "calls"] += row.calls
            store[agent, row.is_treated, "successes"] += row.successes
            store[agent, row.is_treated, "nusd"] += row.cost_nusd
            store[agent, row.is_treated, "us"] += round(row.latency_ms * 1000)
    calls = sum(count for (_, _, name), count in store.items() if name == "calls")
    differ = [" ".join(map(str, key)) for key in journal | store if journal[key] != store[key]]
    what = f"{len(journal | store)} sums over {calls} calls are the same in journal and store"
    return Check(calls > 0 and not differ, f"{what}; but {', '.join(differ)}" if differ else what)


def check_status(left: Left, seen: Seen) -> Check:
    """Each figure of each status is what the comparison makes of the journal and of what callers said."""
    compared, wrong = 0, []
    for agent, status in left.statuses.items():
        made = evidence_of(_rows(left, seen, agent), [], left.plans[agent].terms)
        users = {"finetuned": made.users_treated, "baseline": made.users_control}
        wrong += [f"{agent} users"] if status["users"] != users else []
        for shown, (name, *figures) in zip(status["metrics"], _figures(made), strict=True):
            found = [shown[key] for key in ("finetuned", "baseline", "difference", "low", "high")]
            compared += len(found)
            wrong += [f"{agent} {name}"] if not all(map(_is_same, found, figures)) else []
    what = f"{compared} figures of the status of {len(left.statuses)} rollouts follow from the journal"
    return Check(compared > 0 and not wrong, f"{what}; but not {', '.join(wrong)}" if wrong else what)


def _figures(evidence: Evidence) -> list[tuple[Any, ...]]:
    return [(one.metric, one.treated, one.control, one.difference, one.low, one.high) for one in evidence.findings]


def _is_same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return isclose(one, other, rel_tol=SAME, abs_tol=SAME)


def _rows(left: Left, seen: Seen, agent: str) -> list[UserSums]:
    """A row for each call of the journal; the comparison adds them up."""
    return [
        UserSums(
            one.user, f"{agent}/{one.stage}", one.variant == TREATED, 1, int(bool(one.is_success)), one.latency_ms,
            one.cost_nusd, int(one.id in seen.scores), seen.scores.get(one.id, 0.0), {bucket_of_ms(one.latency_ms): 1},
        )
        for one in left.calls
        if one.agent == agent
    ]  # fmt: skip


def check_scores(left: Left, seen: Seen) -> Check:
    """Every score that was taken down counts, in the arm of its call, and the status shows both means."""
    arms: dict[bool, list[float]] = {True: [], False: []}
    agents = set()
    for one in left.calls:
        if one.id in seen.scores:
            arms[one.variant == TREATED].append(seen.scores[one.id])
            agents.add(one.agent)
    kept = sum(row.scores for rows in left.sums.values() for row in rows)
    shown = [
        metric["words"]
        for agent in sorted(agents)
        for metric in left.statuses[agent]["metrics"]
        if metric["metric"] == "satisfaction" and metric["finetuned"] is not None
    ]
    means = [sum(arm) / len(arm) if arm else 0.0 for arm in (arms[True], arms[False])]
    what = f"{kept} scores count, {means[0]:+.3f} and {means[1]:+.3f} on average; {'; '.join(shown)}"
    return Check(0 < kept == len(arms[True]) + len(arms[False]) and len(shown) == len(agents), what)


def check_lead(left: Left, killed_at_ms: int, leaders: tuple[str, ...]) -> Check:
    """Another process took the lead from the one that was killed, and the rollouts went on."""
    after = [one for changes in left.changes.values() for one in changes if one.at_ms > killed_at_ms]
    first_s = (min(one.at_ms for one in after) - killed_at_ms) / 1000 if after else 0.0
    what = f"the leader was killed; another led, and made {len(after)} changes, the first one {first_s:.1f} s later"
    return Check(len(set(leaders)) == 2 and bool(after), what)


# --- The table --------------------------------------------------------------------------------------------------------


def show(verdict: Verdict, screen: Console) -> None:
    """A row for each rollout, and a line for each check."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for title in ("agent", "its fine-tuned model is", "came out as", "steps"):
        table.add_column(title)
    for title in ("days", "calls", "treated", "users", "treated"):
        table.add_column(title, justify="right")
    for one in verdict.courses:
        table.add_row(
            one.agent, one.what, f"{one.phase}{'' if one.is_wanted else '  WRONG'}", one.steps, f"{one.days:.1f}",
            *(f"{count:,}" for count in (*one.calls, *one.users)),
        )  # fmt: skip
    screen.print(table)
    screen.print("Days, calls and users are those until the rollout's last change; calls whose caller left are out.")
    for one in verdict.courses:
        screen.print(f"{one.agent}: {one.why}. At the end: {one.now}")
    screen.print(", ".join(f"{count} {word}" for word, count in sorted(verdict.words.items())))
    for check in verdict.checks:
        screen.print(f"{'ok    ' if check.holds else 'FAILED'}  {check.what}")
