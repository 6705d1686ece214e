"""What is counted of calls is what a plain count in Python finds, on a real file."""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from statistics import fmean

import pytest
from hypothesis import given

from gateway.decide.mismatch import chance_of
from gateway.domain.experiment import Arrivals, UserSums, bucket_of_ms
from gateway.domain.outcome import Feedback, Outcome, outcome_of
from gateway.store.outcomes import (
    Scope,
    arrivals,
    forget_outcomes,
    insert_outcomes,
    left,
    load_feedback,
    load_outcome,
    load_outcomes,
    newest_ms,
    put_feedback,
    user_sums,
    users_at_stage,
)
from gateway.store.schema import open_database
from tests.outcomes import AT_MS, SHARES, histories, outcome, record

SCOPES = (
    Scope("dev", "qa_agent", 1),
    Scope("dev", "qa_agent"),
    Scope("dev", "legal_agent", 1),
    Scope("dev", "qa_agent", 2, AT_MS + 3, AT_MS + 17),
    Scope("dev", "nobody", 1),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    database = open_database(tmp_path_factory.mktemp("store") / "ledger.db")
    yield database
    database.close()


@contextmanager
def filled(
    database: sqlite3.Connection, calls: Iterable[Outcome] = (), said: Iterable[Feedback] = ()
) -> Iterator[sqlite3.Connection]:
    """The file holds these calls and nothing else; for this time only."""
    database.execute("BEGIN")
    try:
        insert_outcomes(database, calls)
        for feedback in said:
            put_feedback(database, feedback)
        yield database
    finally:
        database.execute("ROLLBACK")


def within(calls: Iterable[Outcome], scope: Scope) -> list[Outcome]:
    """The calls of a scope that a comparison counts, in order of time."""
    env, agent, experiment, since_ms, until_ms = scope
    return sorted(
        (
            call
            for call in calls
            if (call.env, call.agent) == (env, agent)
            and (call.experiment == experiment if experiment is not None else call.experiment > 0)
            and since_ms <= call.at_ms < (until_ms or 2**60)
            and call.user
            and call.is_success is not None
        ),
        key=lambda call: (call.at_ms, call.stage),
    )


def plain_sums(calls: Sequence[Outcome], said: Iterable[Feedback]) -> list[UserSums]:
    latest = {(feedback.call_id, feedback.caller): feedback.score for feedback in said}
    found = []
    for user, stage, is_treated in sorted({(c.user, c.stage, c.variant == "finetuned") for c in calls}):
        mine = [c for c in calls if (c.user, c.stage, c.variant == "finetuned") == (user, stage, is_treated)]
        scores = [[score for (id, _), score in latest.items() if id == call.id] for call in mine]
        means = [fmean(each) for each in scores if each]
        found.append(
            UserSums(
                user=user,
                stage=f"{mine[0].agent}/{stage}",
                is_treated=is_treated,
                calls=len(mine),
                successes=sum(call.is_success is True for call in mine),
                latency_ms=pytest.approx(sum(call.latency_ms for call in mine)),
                cost_nusd=sum(call.cost_nusd for call in mine),
                scores=len(means),
                score_sum=pytest.approx(sum(means)),
                latencies=Counter(bucket_of_ms(call.latency_ms) for call in mine),
            )
        )
    return found


def plain_arrivals(calls: Sequence[Outcome]) -> list[Arrivals]:
    found: dict[tuple[int, float], list[int]] = {}
    seen: dict[str, list[tuple[int, int, bool]]] = {}
    for call in calls:
        before = seen.setdefault(call.user, [])
        if call.stage in [stage for stage, _, _ in before]:
            continue
        chance = chance_of(call.share_bps, [(share, is_treated) for _, share, is_treated in before])
        before.append((call.stage, call.share_bps, call.variant == "finetuned"))
        if chance is not None:
            found.setdefault((call.stage, chance), [0, 0])[call.variant == "finetuned"] += 1
    return [
        Arrivals(f"{calls[0].agent}/{stage}", chance, treated, control)
        for (stage, chance), (control, treated) in sorted(found.items())
    ]


@given(history=histories())
def test_the_sums_of_users_are_those_of_a_plain_count(
    file: sqlite3.Connection, history: tuple[list[Outcome], list[Feedback]]
) -> None:
    calls, said = history
    with filled(file, calls, said) as database:
        for scope in SCOPES:
            assert user_sums(database, scope) == plain_sums(within(calls, scope), said)


@given(history=histories())
def test_the_arrivals_are_those_of_a_plain_walk_through_time(
    file: sqlite3.Connection, history: tuple[list[Outcome], list[Feedback]]
) -> None:
    calls, _ = history
    with filled(file, calls) as database:
        for scope in SCOPES:
            assert arrivals(database, scope) == plain_arrivals(within(calls, scope))


@given(history=histories())
def test_users_leavers_and_the_newest_are_those_of_a_plain_count(
    file: sqlite3.Connection, history: tuple[list[Outcome], list[Feedback]]
) -> None:
    calls, _ = history
    with filled(file, calls) as database:
        for scope in SCOPES[:3]:
            counted = within(calls, scope)
            for stage in SHARES:
                users = {(call.user, call.variant) for call in counted if call.stage == stage}
                arms = Counter(variant for _, variant in users)
                assert users_at_stage(database, scope, stage) == (arms["finetuned"], arms["baseline"])
            all_ = [
                call
                for call in calls
                if (call.env, call.agent) == scope[:2] and scope.experiment in (None, call.experiment)
            ]
            gone = Counter(call.variant for call in all_ if call.experiment and call.is_success is None)
            assert left(database, scope) == (gone["finetuned"], gone["baseline"])
            assert newest_ms(database, scope) == max((call.at_ms for call in all_), default=None)


@given(history=histories())
def test_a_call_is_read_as_it_was_written(
    file: sqlite3.Connection, history: tuple[list[Outcome], list[Feedback]]
) -> None:
    calls, _ = history
    with filled(file, calls) as database:
        assert [load_outcome(database, call.id) for call in calls] == calls
        ordered = sorted((call for call in calls if call.env == "dev"), key=lambda call: (call.at_ms, call.id))
        assert list(load_outcomes(database, "dev", None, 0, None)) == ordered
        some = [call for call in ordered if call.agent == "qa_agent" and AT_MS + 3 <= call.at_ms < AT_MS + 9]
        assert list(load_outcomes(database, "dev", "qa_agent", AT_MS + 3, AT_MS + 9)) == some


def test_the_record_of_these_tests_has_the_outcome_of_these_tests() -> None:
    assert outcome_of(record("c7")) == outcome("c7")


def test_a_call_that_is_brought_again_stays_as_it_was_first(file: sqlite3.Connection) -> None:
    with filled(file, [outcome("c1")]) as database:
        insert_outcomes(database, [outcome("c1", is_success=False, cost_nusd=7), outcome("c2")])
        assert [load_outcome(database, id) for id in ("c1", "c2", "c3")] == [outcome("c1"), outcome("c2"), None]


def test_a_user_that_was_moved_counts_in_both_arms(file: sqlite3.Connection) -> None:
    calls = [outcome("c1"), outcome("c2", variant="baseline")]
    with filled(file, calls) as database:
        assert [row.is_treated for row in user_sums(database, SCOPES[0])] == [False, True]
        assert users_at_stage(database, SCOPES[0], 1) == (1, 1)


def test_what_a_caller_says_last_is_what_it_says_for_each_caller(file: sqlite3.Connection) -> None:
    with filled(file, [outcome("c1")]) as database:
        assert put_feedback(database, Feedback("c1", "web", AT_MS, 1.0, "nice"))
        assert put_feedback(database, Feedback("c1", "batch", AT_MS, 0.5, ""))
        # At the same time the one that comes later counts.
        assert put_feedback(database, Feedback("c1", "web", AT_MS, -1.0, "rude"))
        assert load_feedback(database, "c1") == [
            Feedback("c1", "batch", AT_MS, 0.5, ""),
            Feedback("c1", "web", AT_MS, -1.0, "rude"),
        ]
        (row,) = user_sums(database, SCOPES[0])
        # One call, of which two spoke.
        assert (row.calls, row.scores, row.score_sum) == (1, 1, -0.25)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_in_whichever_order_feedback_is_brought_the_latest_counts(
    file: sqlite3.Connection, order: tuple[int, ...]
) -> None:
    said = [Feedback("c1", "web", AT_MS + after_ms, score, str(after_ms)) for after_ms, score in enumerate((1, -1, 0))]
    with filled(file, [outcome("c1")]) as database:
        # Brought to no avail, it is no call that is not known.
        assert all(put_feedback(database, said[number]) for number in order)
        assert load_feedback(database, "c1") == [said[2]]


def test_nothing_can_be_said_of_a_call_that_is_not_known(file: sqlite3.Connection) -> None:
    with filled(file) as database:
        assert not put_feedback(database, Feedback("c1", "web", AT_MS, 1.0, ""))
        assert load_feedback(database, "c1") == []


def test_the_oldest_go_first_with_what_was_said_of_them_and_no_more_than_so_many(file: sqlite3.Connection) -> None:
    calls = [outcome(id, at_ms=AT_MS + at) for id, at in (("c3", 3), ("c1", 1), ("c4", 4), ("c2", 2))]
    said = [Feedback(call.id, "web", AT_MS, 1.0, "") for call in calls]
    with filled(file, [*calls, outcome("other", env="production", at_ms=1)], said) as database:
        forget_outcomes(database, "dev", before_ms=AT_MS + 4, limit=2)
        assert [one.id for one in load_outcomes(database, "dev", None, 0, None)] == ["c3", "c4"]
        assert database.execute("SELECT call_id FROM feedback").fetchall() == [("c3",), ("c4",)]
        forget_outcomes(database, "dev", before_ms=AT_MS + 4, limit=2)
        assert [one.id for one in load_outcomes(database, "dev", None, 0, None)] == ["c4"]
        assert load_outcome(database, "other") is not None


@pytest.mark.parametrize(
    "where, index",
    [
        ("env = 'dev' AND at_ms < 5 ORDER BY at_ms LIMIT 3", "calls_by_time"),
        ("env = 'dev' AND agent = 'qa_agent' AND experiment = 1", "calls_of_experiment"),
        ("env = 'dev' AND at_ms >= 5 ORDER BY at_ms, id", "calls_by_time"),
    ],
)
def test_calls_are_found_by_an_index_and_not_by_reading_all(file: sqlite3.Connection, where: str, index: str) -> None:
    plan = file.execute(f"EXPLAIN QUERY PLAN SELECT * FROM calls WHERE {where}").fetchall()
    assert plan[0][3].startswith(f"SEARCH calls USING INDEX {index} ")
