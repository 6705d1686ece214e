"""A row as it comes and the fold of all rows say the same, for every rule, in whatever order rows come."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.decide.caps import Rule, rules_of
from gateway.decide.windows import Window
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.store.counting import (
    ROW_COLUMNS,
    Counted,
    count_rows,
    fold,
    folds,
    insert_row,
    load_rules,
    row_from,
    spent,
)  # fmt: skip
from gateway.store.schema import open_database

HOUR_MS = 3_600_000
NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
CAPS = [
    Cap(per="hour", usd=Usd(20_000_000_000)),
    Cap(per="day", timezone="Europe/Paris", tokens=1_000_000),
    Cap(scope="agent", per="hour", requests=100),
    Cap(scope="agent+user", per="total", usd=Usd(1)),
    Cap(per="total", usd=Usd(30_000_000_000), only={"operation": ["benchmark", "finetune"]}),
    Cap(per="day", usd=Usd(10**9), only={"operation": ["shadow"]}),
    Cap(scope="operation", per="day", usd=Usd(10**9)),
]
RULES = rules_of(CAPS, "dev")
ROWS = st.builds(
    LedgerRow,
    id=st.uuids().map(str),
    at_ms=st.integers(-3 * HOUR_MS, 3 * HOUR_MS).map(lambda offset: NOON_MS + offset),
    env=st.sampled_from(["dev", "production"]),
    on=st.builds(
        Dimensions,
        agent=st.sampled_from(["qa_agent", "legal_agent"]),
        key=st.just("web"),
        user=st.sampled_from(["", "-", "u1"]),
        operation=st.sampled_from(["inference", "benchmark", "shadow"]),
        model=st.just("mistral/open-mistral-7b"),
    ),
    amounts=st.builds(Amounts, st.integers(0, 10**9), st.integers(0, 2), st.integers(0, 10**6)),
    state=st.sampled_from(["posted", "void", "in_doubt", "released"]),
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    opened = open_database(tmp_path / "ledger.db")
    yield opened
    opened.close()


def row(id: str, **changes: object) -> LedgerRow:
    known = LedgerRow(
        id=id, at_ms=NOON_MS, env="dev", on=Dimensions(agent="qa_agent", user="u1"), amounts=Amounts(1_000, 1, 10)
    )
    return msgspec.structs.replace(known, **changes)


def make_account(database: sqlite3.Connection, rule: Rule, on: Dimensions, window: Window) -> None:
    database.execute(
        "INSERT OR IGNORE INTO accounts (account, start_s, end_s, rule_id, env, unit, dims, posted, in_doubt) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            rule.account(on), *window, rule.id, rule.env, rule.unit, msgspec.json.encode(on).decode(),
            *fold(database, rule, on, window),
        ),
    )  # fmt: skip


def counted(database: sqlite3.Connection, rule: Rule) -> dict[tuple[str, int], Counted]:
    found = database.execute("SELECT account, start_s, posted, in_doubt FROM accounts WHERE rule_id = ?", (rule.id,))
    return {(account, start_s): Counted(*sums) for account, start_s, *sums in found}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=12, unique_by=lambda new: new.id), gone=st.integers(0, 3))
def test_counting_rows_as_they_come_is_folding_them_all(
    database: sqlite3.Connection, rows: list[LedgerRow], gone: int
) -> None:
    database.execute("DELETE FROM ledger")
    database.execute("DELETE FROM accounts")
    for number, new in enumerate(rows):
        insert_row(database, new)
        count_rows(database, RULES, [new])
        if number % 2:
            # Accounts are made at any time, and by a fold.
            for rule in RULES:
                make_account(database, rule, new.on, rule.window(new.at_ms / 1000))
    for old in rows[:gone]:
        database.execute("DELETE FROM ledger WHERE id = ?", (old.id,))
    count_rows(database, RULES, rows[:gone], sign=-1)
    for rule in RULES:
        for (account, start_s), sums in counted(database, rule).items():
            assert folds(database, rule, rule.window(start_s)).get(account, Counted()) == sums


def test_what_is_void_or_released_counts_nowhere(database: sqlite3.Connection) -> None:
    for number, state in enumerate(["posted", "void", "in_doubt", "released"]):
        insert_row(database, row(f"r{number}", state=state))
    assert fold(database, RULES[0], Dimensions(), RULES[0].window(NOON_MS / 1000)) == Counted(2_000, 1_000)


def test_a_row_counts_up_to_the_last_millisecond_of_its_window(database: sqlite3.Connection) -> None:
    rule, on = RULES[0], Dimensions(agent="qa_agent")
    insert_row(database, row("before", at_ms=NOON_MS - 1, amounts=Amounts(1)))
    insert_row(database, row("first", at_ms=NOON_MS, amounts=Amounts(10)))
    insert_row(database, row("last", at_ms=NOON_MS + HOUR_MS - 1, amounts=Amounts(100)))
    insert_row(database, row("after", at_ms=NOON_MS + HOUR_MS, amounts=Amounts(1_000)))
    assert fold(database, rule, on, rule.window(NOON_MS / 1000)).posted == 110
    assert spent(database, rule, NOON_MS, NOON_MS + HOUR_MS) == {rule.id: 110}


def test_nobody_and_the_dash_share_an_account_as_its_name_has_it(database: sqlite3.Connection) -> None:
    rule = RULES[3]
    insert_row(database, row("a", on=Dimensions(agent="qa_agent", user="")))
    insert_row(database, row("b", on=Dimensions(agent="qa_agent", user="-")))
    for user in ("", "-"):
        assert fold(database, rule, Dimensions(agent="qa_agent", user=user), Window(0, None)).posted == 2_000
    assert list(folds(database, rule, Window(0, None))) == [rule.account(Dimensions(agent="qa_agent"))]


def test_an_account_that_nobody_made_is_not_made_by_a_row(database: sqlite3.Connection) -> None:
    insert_row(database, row("a"))
    count_rows(database, RULES, [row("a")])
    assert database.execute("SELECT count(*) FROM accounts").fetchone() == (0,)


def test_rules_come_back_as_they_were_registered(database: sqlite3.Connection) -> None:
    for rule in RULES:
        database.execute("INSERT INTO rules VALUES (?, ?, ?)", (rule.id, rule.env, msgspec.json.encode(rule).decode()))
    assert load_rules(database) == load_rules(database, "dev") == sorted(RULES, key=lambda rule: rule.id)
    assert load_rules(database, "production") == []


@given(written=ROWS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_is_read_as_it_was_written(database: sqlite3.Connection, written: LedgerRow) -> None:
    database.execute("DELETE FROM ledger")
    insert_row(database, written)
    found = database.execute(f"SELECT {ROW_COLUMNS} FROM ledger WHERE id = ?", (written.id,)).fetchone()
    assert row_from(found) == written
