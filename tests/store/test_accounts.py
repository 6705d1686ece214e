"""Accounts over a real file: what they hold when made, when their rule comes back, and when they are let go."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.decide.caps import Rule, rules_of
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.store.accounts import KEPT_S, ids_of, make_account, prune, register, retire
from gateway.store.counting import count_rows, insert_row, load_rules
from gateway.store.schema import open_database
from gateway.store.store import Ask, Spot

T0 = 1_800_000_000
ON = Dimensions("qa_agent", "", "ann", "inference", "sim/a", "baseline")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    found = open_database(tmp_path / "ledger.db")
    yield found
    found.close()


def rule_of(**cap: object) -> Rule:
    (rule,) = rules_of([Cap(**{"per": "hour", "usd": Usd(1_000), **cap})], "dev")
    return rule


def ask(rule: Rule, on: Dimensions = ON, now_s: float = T0) -> Ask:
    window = rule.window(now_s)
    return Ask(rule, on, Spot(rule.account(on), window.start_s), window.end_s, 1, 1)


def bring(database: sqlite3.Connection, id: str, nusd: int, *, on: Dimensions = ON, state: str = "posted") -> None:
    row = LedgerRow(id=id, at_ms=T0 * 1000, env="dev", on=on, amounts=Amounts(nusd, 1, 0), state=state)
    assert insert_row(database, row)
    count_rows(database, load_rules(database), [row])


def held(database: sqlite3.Connection) -> list[tuple[object, ...]]:
    return database.execute("SELECT account, posted, in_doubt FROM accounts ORDER BY account").fetchall()


def test_an_account_is_made_with_what_the_ledger_already_has(database: sqlite3.Connection) -> None:
    rule = rule_of(scope="user")
    bring(database, "1", 70)
    bring(database, "2", 30, state="in_doubt")
    bring(database, "3", 500, on=ON._replace(user="bob"))
    make_account(database, ask(rule))
    assert held(database) == [(rule.account(ON), 100, 30)]


def test_a_rule_that_comes_back_has_missed_nothing(database: sqlite3.Connection) -> None:
    rule = rule_of()
    register(database, [rule])
    make_account(database, ask(rule))
    bring(database, "1", 70)
    retire(database, [rule_of(per="day")], [rule.id])
    assert load_rules(database) == []
    bring(database, "2", 30)
    assert held(database) == [(rule.id, 70, 0)]
    register(database, [rule])
    assert held(database) == [(rule.id, 100, 0)]


def test_a_rule_that_a_living_process_goes_by_is_kept(database: sqlite3.Connection) -> None:
    rule = rule_of()
    register(database, [rule])
    database.execute("INSERT INTO holders (holder, seen_ms, rule_ids) VALUES ('b', ?, ?)", (T0 * 1000, ids_of([rule])))
    retire(database, [rule_of(per="day")], [rule.id])
    assert load_rules(database) == [rule]


@pytest.mark.parametrize(("later_s", "is_kept"), [(3600 + KEPT_S, True), (3601 + KEPT_S, False)])
def test_sums_of_a_window_are_let_go_two_days_after_its_end(
    database: sqlite3.Connection, later_s: int, is_kept: bool
) -> None:
    rule = rule_of()
    make_account(database, ask(rule))
    prune(database, (rule.window(T0).start_s + later_s) * 1000)
    assert bool(held(database)) is is_kept


def test_what_somebody_leases_is_never_let_go(database: sqlite3.Connection) -> None:
    rule = rule_of()
    make_account(database, ask(rule))
    spot = ask(rule).spot
    database.execute("INSERT INTO leases VALUES (?, ?, 'a', 5, 0)", spot)
    prune(database, (T0 + 10 * KEPT_S) * 1000)
    assert held(database)


@pytest.mark.parametrize(("days", "is_kept"), [(59, True), (61, False)])
def test_a_process_that_has_gone_is_remembered_for_sixty_days(
    database: sqlite3.Connection, days: int, is_kept: bool
) -> None:
    database.execute("INSERT INTO holders (holder, seen_ms, is_lost, rule_ids) VALUES ('a', ?, 1, '[]')", (T0 * 1000,))
    prune(database, (T0 + days * 86_400) * 1000)
    assert bool(database.execute("SELECT 1 FROM holders").fetchone()) is is_kept
