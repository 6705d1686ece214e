"""What people and the pilot ask of experiments, through two connections and two processes at once, on a real file."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from gateway.decide.rollout import Cause, change_by
from gateway.domain.outcome import Feedback, Outcome
from gateway.domain.rollout import Change, Event, RolloutState, replay
from gateway.store.experiments import Conflict, Experiments
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, StoreError
from tests.outcomes import AT_MS, outcome
from tests.rolling import NOW_MS, first


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def experiments(path: Path) -> Iterator[Experiments]:
    with Experiments(path, clock=time.time) as found:
        yield found


def told(path: Path, *outcomes: Outcome) -> None:
    """A gateway has served these calls."""
    store = SqliteStore(path, clock=time.time)
    store.join("gateway-1", ())
    store.sync(Batch(outcomes=outcomes))
    store.leave()
    store.close()


def begun() -> Change:
    change = first().change
    assert change is not None
    return change


def raised(state: RolloutState, by: str) -> Change:
    change = change_by(state, Event.RAISED, 2_500, Cause(NOW_MS, by, ("because",))).change
    assert change is not None
    return change


def test_what_a_gateway_told_is_found(path: Path, experiments: Experiments) -> None:
    calls = [
        outcome("c1"),
        outcome("c2", at_ms=AT_MS + 1, user="u3", variant="baseline", bucket=1_000, is_success=False),
        outcome("c3", at_ms=AT_MS + 2, is_success=None),
        outcome("c4", at_ms=AT_MS + 3, agent="legal_agent"),
    ]
    told(path, *calls)
    assert list(experiments.outcomes("dev")) == calls
    assert list(experiments.outcomes("dev", agent="qa_agent", since_ms=AT_MS + 1, until_ms=AT_MS + 2)) == calls[1:2]
    assert experiments.outcome("c3") == calls[2]
    assert experiments.outcome("c5") is None
    rows = experiments.user_sums("dev", "qa_agent", experiment=1)
    assert [(row.user, row.stage, row.is_treated, row.calls, row.successes) for row in rows] == [
        ("u1", "qa_agent/1", True, 1, 1),
        ("u3", "qa_agent/1", False, 1, 0),
    ]
    assert experiments.user_sums("dev", "qa_agent", until_ms=AT_MS + 1) == rows[:1]
    assert experiments.arrivals("dev", "qa_agent", experiment=1) == [("qa_agent/1", 0.1, 1, 1)]
    assert experiments.users_at_stage("dev", "qa_agent", experiment=1, stage=1) == (1, 1)
    assert experiments.left("dev", "qa_agent", experiment=1) == (1, 0)
    assert experiments.newest_ms("dev", "qa_agent", experiment=1) == AT_MS + 2
    assert experiments.newest_ms("dev", "qa_agent", experiment=2) is None


def test_late_feedback_counts_and_that_of_unknown_calls_is_not_kept(path: Path, experiments: Experiments) -> None:
    said = Feedback("c1", "web", AT_MS + 10**9, -0.5, "rude")
    assert not experiments.give_feedback(said)
    told(path, outcome("c1"))
    assert experiments.feedback("c1") == []
    assert experiments.give_feedback(said)
    assert experiments.feedback("c1") == [said]
    (row,) = experiments.user_sums("dev", "qa_agent", until_ms=AT_MS + 1)
    assert (row.scores, row.score_sum) == (1, -0.5)


def test_a_beginning_is_made_once_and_then_told(path: Path, experiments: Experiments) -> None:
    assert experiments.states("dev") == {}
    state = experiments.begin("dev", begun())
    after = experiments.apply("dev", raised(state, "ann"))
    with Experiments(path, clock=time.time) as other:
        assert other.begin("dev", begun()) == after
        assert other.states("dev") == {"qa_agent": after}
        assert replay(other.changes("dev", "qa_agent")) == after
        assert [change.by for change in other.changes("dev", limit=1)] == ["ann"]


def test_of_two_that_change_the_same_version_one_wins_and_one_hears_of_it(path: Path, experiments: Experiments) -> None:
    state = experiments.begin("dev", begun())
    threads = 4
    barrier = Barrier(threads)

    def apply(name: str) -> str:
        with Experiments(path, clock=time.time) as mine:
            barrier.wait()
            try:
                return mine.apply("dev", raised(state, name)).by
            except Conflict:
                return ""

    with ThreadPoolExecutor(threads) as pool:
        (winner,) = filter(None, pool.map(apply, "abcd"))
    assert experiments.states("dev")["qa_agent"].by == winner
    assert [change.by for change in experiments.changes("dev")] == ["pilot", winner]


def lead_often(path: Path, holder: str) -> int:
    """How often a process of its own was given the lead."""
    with Experiments(path, clock=lambda: 1_800_000_000.0) as mine:
        return sum(mine.lead("dev", holder) for _ in range(50))


def test_of_two_processes_one_leads(path: Path, experiments: Experiments) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(lead_often, [path] * 2, ["one", "other"]))
    assert sorted(found) == [0, 50]


def test_the_lead_is_taken_over_when_it_is_over_or_given_back(path: Path) -> None:
    now_s = 1_800_000_000.0
    with Experiments(path, clock=lambda: now_s) as one, Experiments(path, clock=lambda: now_s) as other:
        assert [one.lead("dev", "one"), other.lead("dev", "other")] == [True, False]
        now_s += 20
        assert [other.lead("dev", "other"), one.lead("dev", "one")] == [True, False]
        one.resign("dev", "one")
        assert not one.lead("dev", "one")
        other.resign("dev", "other")
        assert one.lead("dev", "one")


def test_who_reads_keeps_no_gateway_waiting_and_sees_one_moment(path: Path, experiments: Experiments) -> None:
    told(path, outcome("c1"), outcome("c2", at_ms=AT_MS + 1))
    reading = experiments.outcomes("dev")
    assert next(reading).id == "c1"
    told(path, outcome("c3", at_ms=AT_MS + 2))
    assert [call.id for call in reading] == ["c2"]
    with experiments._reading() as database:
        before = database.execute("SELECT count(*) FROM calls").fetchone()
        told(path, outcome("c4"))
        assert database.execute("SELECT count(*) FROM calls").fetchone() == before == (3,)


def test_where_there_is_no_store_that_is_said_and_none_is_made(path: Path) -> None:
    with pytest.raises(StoreError, match="there is no ledger"):
        Experiments(path, clock=time.time, is_new_allowed=False)
    assert not path.exists()


def test_what_sqlite_cannot_do_is_a_store_error(path: Path) -> None:
    experiments = Experiments(path, clock=time.time)
    experiments.close()
    for ask in (
        lambda: experiments.states("dev"),
        lambda: list(experiments.outcomes("dev")),
        lambda: experiments.lead("dev", "one"),
    ):
        with pytest.raises(StoreError, match=f"the ledger at {path} cannot be used"):
            ask()
