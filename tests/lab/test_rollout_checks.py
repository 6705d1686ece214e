"""A week is judged by what was left behind: every check passes where all agree, and fails as soon as one does not."""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from gateway.decide.assign import bucket_of, hash_user, is_treated
from gateway.decide.rollout import Cause, begin, change_by
from gateway.decide.rollout_plan import rollout_plan
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.outcome import Feedback, outcome_of
from gateway.domain.policy import Policy
from gateway.domain.rollout import PILOT, Event, Phase
from gateway.lab.rollout_checks import Seen, Verdict, judge_week, leader_of, show
from gateway.store.experiments import Experiments
from gateway.store.journal import Journal, claim
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch

AGENT = "qa_agent"
BEGAN_MS, RAISED_MS, DAY_S = 1_795_262_400_000, 1_795_262_420_000, 10.0
SHARES = (3_000, 6_000)
USERS = 400
# In the control for good, so that nobody can have been told otherwise.
NEVER = next(f"user-{user}" for user in range(USERS) if bucket_of(AGENT, f"user-{user}") >= SHARES[1])
POLICY: dict[str, Any] = {
    "ab_testing": {"enabled": True, "rollout_percentage": 30},
    "rollout": {"mode": "automatic", "stages": [30, 60, 100], "guardrails": {"success_rate": 0.05}},
}
WANTED = {AGENT: ("better", (Phase.RAMPING,))}


def record(user: int, stage: int) -> CallRecord:
    """A user's call in a stage."""
    bucket = bucket_of(AGENT, f"user-{user}")
    arm = "finetuned" if is_treated(bucket, SHARES[stage - 1]) else "baseline"
    at_ms = (BEGAN_MS, RAISED_MS)[stage - 1] + 1 + user
    is_success = user % 10 > 0
    return CallRecord(
        id=f"req-{stage}-{user}", at_ms=at_ms, env="week", agent=AGENT, variant=arm, bucket=bucket, stage=stage,
        share_bps=SHARES[stage - 1], experiment=1, user=hash_user(f"user-{user}", ""),
        status=200 if is_success else 502, error="" if is_success else "server_error",
        duration_ms=100.0 + user % 37, cost_nusd=1_000 + user,
        attempts=[Attempt(ref="m/a", started_ms=0, cost_nusd=1_000 + user)],
    )  # fmt: skip


def leave(folder: Path) -> Seen:
    """A rollout from 30 to 60 %, with a call of each user at either share, as a gateway would leave it."""
    records = [record(user, stage) for stage in (1, 2) for user in range(USERS)]
    claimed = claim(folder / "journal" / "first")
    assert claimed is not None
    directory, lock = claimed
    journal = Journal(directory, fsync=False)
    journal.append(*records)
    journal.close()
    os.close(lock)
    store = folder / "gateway.db"
    opened = SqliteStore(store, clock=lambda: RAISED_MS / 1000)
    opened.join("first", ())
    opened.sync(Batch(outcomes=[outcome for one in records if (outcome := outcome_of(one))]))
    opened.close()
    plan = rollout_plan(msgspec.convert(POLICY, Policy), AGENT)
    seen = Seen(Counter(), {}, Counter())
    with Experiments(store, clock=lambda: RAISED_MS / 1000) as experiments:
        began = begin(AGENT, plan=plan, now_ms=BEGAN_MS)
        raised = change_by(began.state, Event.RAISED, 6_000, Cause(RAISED_MS, PILOT, ("it has baked",)))
        assert began.change is not None
        assert raised.change is not None
        experiments.begin("week", began.change)
        experiments.apply("week", raised.change)
        assert experiments.lead("week", "first")
        for number, one in enumerate(records):
            user = f"user-{number % USERS}"
            seen.told[AGENT, user, one.variant or ""] += 1
            seen.words["answered" if one.status == 200 else "status 502"] += 1
            if number % 3 == 0:
                seen.scores[one.id] = 0.5 if one.variant == "finetuned" else -0.5
                experiments.give_feedback(Feedback(one.id, "", RAISED_MS, seen.scores[one.id], ""))
    return seen


def judged(
    folder: Path, seen: Seen, *, killed_at_ms: int = BEGAN_MS + 1, leaders: tuple[str, ...] = ("a", "b")
) -> Verdict:
    return judge_week(
        folder, "week", WANTED, seen, policy=POLICY, day_s=DAY_S, killed_at_ms=killed_at_ms, leaders=leaders
    )


def sql(text: str) -> Callable[[Path, Seen], object]:
    """Something that changes the store behind everybody's back."""

    def change(folder: Path, _: Seen) -> None:
        with closing(sqlite3.connect(folder / "gateway.db")) as database, database:
            assert database.execute(text).rowcount

    return change


def failed(verdict: Verdict) -> list[str]:
    return [check.what for check in verdict.checks if not check.holds]


def test_a_week_of_which_all_tell_the_same_holds(tmp_path: Path) -> None:
    verdict = judged(tmp_path, leave(tmp_path))
    assert failed(verdict) == []
    assert verdict.holds
    assert len(verdict.checks) == 7
    (course,) = verdict.courses
    assert course.steps == "0.0: 30 %, 2.0: 60 %"
    assert (course.phase, course.days, course.why) == (Phase.RAMPING, 2.0, "it has baked")
    # Until the raise there was one call of each user.
    treated = sum(bucket_of(AGENT, f"user-{user}") < 3_000 for user in range(USERS))
    assert course.calls == course.users == (USERS, treated)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (sql("DELETE FROM calls WHERE id = 'req-1-7'"), "but qa_agent False calls"),
        (sql("UPDATE calls SET cost_nusd = cost_nusd + 1 WHERE id = 'req-2-8'"), "nusd"),
        (sql("UPDATE calls SET is_success = 0 WHERE id = 'req-1-1'"), "successes"),
        (sql("UPDATE calls SET latency_cell = 200 WHERE stage = 1"), "but not qa_agent p95_latency"),
        (sql("DELETE FROM rollout_changes WHERE version = 1"), "does not follow"),
        (sql("DELETE FROM feedback WHERE call_id = 'req-1-0'"), "scores count"),
        (lambda _, seen: seen.scores.pop("req-1-3"), "scores count"),
        (lambda _, seen: seen.words.update(answered=9_999), "whole answers are with callers"),
        (lambda _, seen: seen.told.update({(AGENT, NEVER, "finetuned"): 1}), "1 were in an arm that was never"),
    ],
    ids=["lost", "dearer", "failed", "slower", "gap", "feedback", "unheard", "unrecorded", "wrong arm"],
)
def test_one_figure_that_differs_is_found(tmp_path: Path, spoil: Callable[[Path, Seen], object], said: str) -> None:
    seen = leave(tmp_path)
    spoil(tmp_path, seen)
    verdict = judged(tmp_path, seen)
    assert not verdict.holds
    assert any(said in what for what in failed(verdict)), failed(verdict)


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "finetuned", "bucket": 9_999},
        {"variant": "baseline", "bucket": 10},
        {"bucket": 2_000, "variant": "finetuned"},
    ],
)
def test_a_call_in_the_wrong_arm_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    seen = leave(tmp_path)
    claimed = claim(tmp_path / "journal" / "second")
    assert claimed is not None
    journal = Journal(claimed[0], fsync=False)
    journal.append(msgspec.structs.replace(record(1, 2), id="req-odd", **change))
    journal.close()
    os.close(claimed[1])
    assert any("users in" in what for what in failed(judged(tmp_path, seen)))


@pytest.mark.parametrize(
    "killed_at_ms, leaders", [(RAISED_MS + 1, ("a", "b")), (BEGAN_MS, ("a", "a")), (BEGAN_MS + 1, ())]
)
def test_a_lead_that_nobody_took_or_that_changed_nothing_is_found(
    tmp_path: Path, killed_at_ms: int, leaders: tuple[str, ...]
) -> None:
    seen = leave(tmp_path)
    (what,) = failed(judged(tmp_path, seen, killed_at_ms=killed_at_ms, leaders=leaders))
    assert what.startswith("the leader was killed")


def test_a_rollout_that_came_out_otherwise_is_found_and_shown(tmp_path: Path) -> None:
    seen = leave(tmp_path)
    wanted = {AGENT: ("worse", (Phase.ROLLED_BACK,))}
    verdict = judge_week(tmp_path, "week", wanted, seen, policy=POLICY, day_s=DAY_S, killed_at_ms=0, leaders=())
    assert not verdict.holds
    screen = Console(file=StringIO(), width=160)
    show(verdict, screen)
    assert isinstance(screen.file, StringIO)
    text = screen.file.getvalue()
    assert "ramping  WRONG" in text
    assert text.count("\nok ") == 6


def test_the_leader_is_whoever_the_store_says(tmp_path: Path) -> None:
    leave(tmp_path)
    assert leader_of(tmp_path / "gateway.db", "week") == "first"
    assert leader_of(tmp_path / "gateway.db", "dev") == ""
