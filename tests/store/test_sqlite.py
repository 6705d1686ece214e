"""The store on a real file: nothing is counted twice or lost, and leases never add up to more than a cap has left."""

import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.decide.budget import Balance
from gateway.decide.caps import Rule, rules_of
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.policy import Cap
from gateway.store.experiments import Experiments
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Ask, Batch, Spot, StoreError, Synced
from tests.outcomes import outcome
from tests.rolling import first

T0 = 1_800_000_000.0  # An hour begins, and it is 08:00 UTC.
ON = Dimensions(agent="qa_agent", user="u1", model="m1")
HOURLY = Cap(per="hour", usd=1_000)
TOTAL = Cap(per="total", requests=100)
PER_AGENT = Cap(scope="agent", per="day", tokens=500)


class File:
    """One ledger on a clock that the test moves, and a window into it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger.db"
        self.now_s = T0
        self.opened: list[SqliteStore] = []

    def open(self, holder: str = "", rules: Sequence[Rule] = (), *, keep_calls_ms: int = 0) -> SqliteStore:
        store = SqliteStore(self.path, clock=lambda: self.now_s, busy_s=0.05, keep_calls_ms=keep_calls_ms)
        self.opened.append(store)
        if holder:
            store.join(holder, rules)
            store.sync(Batch())
        return store

    def close(self) -> None:
        for store in self.opened:
            store.close()

    def read(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        database = sqlite3.connect(self.path)
        try:
            return database.execute(sql, values).fetchall()
        finally:
            database.close()

    def write(self, sql: str, *values: object) -> None:
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
            database.execute(sql, values)
        finally:
            database.close()

    def spot(self, rule: Rule, on: Dimensions = ON) -> Spot:
        return Spot(rule.account(on), rule.window(self.now_s).start_s)

    def ask(self, rule: Rule, needed: int, wanted: int = 0, on: Dimensions = ON) -> Ask:
        return Ask(rule, on, self.spot(rule, on), rule.window(self.now_s).end_s, needed, wanted)

    def row(self, id: str, nusd: int = 10, *, on: Dimensions = ON, **fields: object) -> LedgerRow:
        values = {"at_ms": int(self.now_s * 1000), "env": "dev", "amounts": Amounts(nusd, 1, 5)} | fields
        return LedgerRow(id=id, on=on, **values)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path)
    yield file
    file.close()


def rules_from(*caps: Cap) -> tuple[Rule, ...]:
    return rules_of(caps, "dev")


def figures(balance: Balance) -> tuple[int, int, int, int]:
    return balance.posted, balance.in_doubt, balance.leased, balance.elsewhere


# --- leases -----------------------------------------------------------------


def test_alone_a_process_leases_all_that_is_left(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    synced = store.sync(Batch(asks=[file.ask(rule, 10)]))
    assert synced.accounts == {file.spot(rule): Balance(1_000, 0, 0, 0)}
    assert synced.holders == 1


@pytest.mark.parametrize("needed, leased", [(1_000, 1_000), (1_001, 0)])
def test_a_need_is_met_up_to_the_limit_and_not_above(file: File, needed: int, leased: int) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    assert store.sync(Batch(asks=[file.ask(rule, needed)])).accounts[file.spot(rule)].leased == leased


def test_two_share_and_what_is_posted_or_leased_is_not_leased_again(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    assert figures(a.sync(Batch(asks=[file.ask(rule, 10, 400)])).accounts[spot]) == (0, 0, 250, 0)
    assert figures(b.sync(Batch(asks=[file.ask(rule, 700)])).accounts[spot]) == (0, 0, 700, 250)
    assert figures(a.sync(Batch(rows=[file.row("1", 200)])).accounts[spot]) == (200, 0, 50, 700)
    assert figures(b.sync(Batch(asks=[file.ask(rule, 51)])).accounts[spot]) == (200, 0, 700, 50)
    assert figures(b.sync(Batch(asks=[file.ask(rule, 50)])).accounts[spot]) == (200, 0, 750, 50)


def test_what_is_given_back_another_may_have(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a = file.open("a", [rule])
    a.sync(Batch(asks=[file.ask(rule, 1)]))
    b = file.open("b", [rule])
    spot = file.spot(rule)
    refused = b.sync(Batch(asks=[file.ask(rule, 300)])).accounts[spot]
    assert figures(refused) == (0, 0, 0, 1_000)
    assert a.sync(Batch()).accounts[spot].is_wanted
    assert a.sync(Batch(returns=[(spot, 900)])).accounts[spot].leased == 100
    # Somebody was refused a moment ago, so nobody gets more than the call.
    assert b.sync(Batch(asks=[file.ask(rule, 300, 500)])).accounts[spot].leased == 300
    file.now_s += 1.0
    assert not a.sync(Batch()).accounts[spot].is_wanted


def test_more_cannot_be_given_back_than_there_is(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 600)]))
    b.sync(Batch(asks=[file.ask(rule, 300)]))
    assert figures(a.sync(Batch(returns=[(spot, 10_000)])).accounts[spot]) == (0, 0, 0, 300)
    assert figures(b.sync(Batch()).accounts[spot]) == (0, 0, 300, 0)


def test_leaving_gives_every_lease_back(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a = file.open("a", [rule])
    a.sync(Batch(asks=[file.ask(rule, 1)]))
    b = file.open("b", [rule])
    a.leave()
    synced = b.sync(Batch(asks=[file.ask(rule, 1)]))
    assert figures(synced.accounts[file.spot(rule)]) == (0, 0, 1_000, 0)
    assert synced.holders == 1
    assert file.read("SELECT holder FROM holders WHERE NOT is_lost") == [("b",)]


def test_how_far_a_journal_was_told_outlasts_its_process(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a = file.open("a", [rule])
    a.sync(Batch(told=(3, 4_711)))
    a.leave()
    assert file.open().join("a", [rule]) == (3, 4_711)


def test_what_calls_in_flight_hold_is_shown(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    spot = file.spot(rule)
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    for held in (70, 30):
        store.sync(Batch(held=[(spot, held)]))
        assert file.read("SELECT amount, held FROM leases") == [(1_000, held)]
    store.sync(Batch())
    assert file.read("SELECT amount, held FROM leases") == [(1_000, 0)]


def test_each_window_has_its_own_lease(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    first = file.spot(rule)
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    early = file.row("1", 100)
    file.now_s += 3600
    second = file.spot(rule)
    accounts = store.sync(Batch(rows=[early, file.row("2", 7)], asks=[file.ask(rule, 1)])).accounts
    # The call belongs to the hour it was reserved in, whenever it ends.
    assert figures(accounts[first]) == (100, 0, 900, 0)
    assert figures(accounts[second]) == (7, 0, 993, 0)


# --- a limit that changes ---------------------------------------------------


def test_a_lowered_limit_grants_nothing_and_calls_leases_home(file: File) -> None:
    (high,) = rules_from(HOURLY)
    (low,) = rules_from(Cap(per="hour", usd=500))
    a = file.open("a", [high])
    a.sync(Batch(asks=[file.ask(high, 1)], rows=[file.row("1", 300)]))
    assert a.join("a", [low]) == (0, 0)
    balance = a.sync(Batch(asks=[file.ask(low, 1)])).accounts[file.spot(low)]
    assert balance == Balance(700, 300, 0, 0, is_wanted=True)
    balance = a.sync(Batch(returns=[(file.spot(low), 500)])).accounts[file.spot(low)]
    assert balance == Balance(200, 300, 0, 0)


def test_a_raised_limit_keeps_what_is_spent(file: File) -> None:
    (low,) = rules_from(HOURLY)
    (high,) = rules_from(Cap(per="hour", usd=3_000))
    store = file.open("a", [low])
    store.sync(Batch(asks=[file.ask(low, 1_000)]))
    store.sync(Batch(rows=[file.row("1", 1_000)]))
    store.join("a", [high])
    assert figures(store.sync(Batch(asks=[file.ask(high, 1)])).accounts[file.spot(high)]) == (1_000, 0, 2_000, 0)


def test_what_is_billed_above_a_lease_is_posted_in_full(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    accounts = store.sync(Batch(rows=[file.row("1", 1_500)])).accounts
    assert figures(accounts[file.spot(rule)]) == (1_500, 0, 0, 0)
    assert store.sync(Batch(asks=[file.ask(rule, 1)])).accounts[file.spot(rule)].leased == 0


def test_an_entry_by_hand_takes_no_lease_and_calls_leases_home(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    balance = store.sync(Batch(rows=[file.row("1", 400, source="manual")])).accounts[file.spot(rule)]
    assert balance == Balance(1_000, 400, 0, 0, is_wanted=True)


# --- rows -------------------------------------------------------------------


def test_a_row_counts_once_however_often_and_by_whomever_it_is_brought(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 300)]))
    b.sync(Batch(asks=[file.ask(rule, 300)]))
    row = file.row("1", 100)
    assert figures(a.sync(Batch(rows=[row, row])).accounts[spot]) == (100, 0, 200, 300)
    for store in (a, b, a):
        store.sync(Batch(rows=[row]))
    assert figures(a.sync(Batch()).accounts[spot]) == (100, 0, 200, 300)
    assert figures(b.sync(Batch()).accounts[spot]) == (100, 0, 300, 200)


@pytest.mark.parametrize(
    "state, posted, in_doubt, leased",
    [("posted", 40, 0, 960), ("in_doubt", 40, 40, 960), ("void", 0, 0, 1_000), ("released", 0, 0, 1_000)],
)
def test_what_each_state_counts(file: File, state: str, posted: int, in_doubt: int, leased: int) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    store.sync(Batch(rows=[file.row("1", 40, state=state)]))
    assert figures(store.sync(Batch()).accounts[file.spot(rule)]) == (posted, in_doubt, leased, 0)
    assert file.read("SELECT state, nusd FROM ledger") == [(state, 40)]


def test_a_row_is_kept_whole(file: File) -> None:
    store = file.open("a")
    on = Dimensions("a", "k", "u", "benchmark", "m", "finetuned")
    store.sync(
        Batch(
            rows=[
                LedgerRow(
                    id="x.1", at_ms=5, env="dev", on=on, amounts=Amounts(2**53, 1, 9), basis="bound",
                    prompt_tokens=4, completion_tokens=5, note="it's; a \N{SNOWMAN}",
                )
            ]
        )
    )  # fmt: skip
    assert file.read("SELECT * FROM ledger") == [
        ("x.1", 5, "dev", "a", "k", "u", "benchmark", "m", "finetuned", 2**53, 1, 9, 4, 5,
         "posted", "bound", "gateway", "it's; a \N{SNOWMAN}", None, None)
    ]  # fmt: skip


def test_a_new_account_begins_with_what_the_ledger_says(file: File) -> None:
    (rule,) = rules_from(Cap(scope="agent+user", per="day", usd=1_000, only={"operation": ["benchmark", "finetune"]}))
    store = file.open("a", [rule])
    on = ON._replace(operation="finetune")
    rows = [
        file.row("counts", 1, on=on),
        file.row("counts too", 2, on=on._replace(operation="benchmark", model="other"), state="in_doubt"),
        file.row("void", 4, on=on, state="void"),
        file.row("released", 8, on=on, state="released"),
        file.row("other operation", 16),
        file.row("other agent", 32, on=on._replace(agent="x")),
        file.row("other user", 64, on=on._replace(user="")),
        file.row("other day", 128, on=on, at_ms=int((T0 - 86_400) * 1000)),
        file.row("other environment", 256, on=on, env="staging"),
    ]
    assert store.sync(Batch(rows=rows)).accounts == {}
    assert figures(store.sync(Batch(asks=[file.ask(rule, 1, on=on)])).accounts[file.spot(rule, on)]) == (3, 2, 997, 0)


def test_a_value_that_is_missing_shares_the_account_of_a_dash(file: File) -> None:
    (rule,) = rules_from(PER_AGENT)
    store = file.open("a", [rule])
    nobody, dash = ON._replace(agent=""), ON._replace(agent="-")
    store.sync(Batch(rows=[file.row("1", on=nobody), file.row("2", on=dash)]))
    assert store.sync(Batch(asks=[file.ask(rule, 1, on=nobody)])).accounts[file.spot(rule, dash)].posted == 10
    store.sync(Batch(rows=[file.row("3", on=nobody), file.row("4", on=dash)]))
    assert store.sync(Batch()).accounts[file.spot(rule, dash)].posted == 20


def test_a_row_counts_under_the_rules_of_others_too(file: File) -> None:
    ours, theirs = rules_from(HOURLY, TOTAL)
    a, b = file.open("a", [ours]), file.open("b", [theirs])
    b.sync(Batch(asks=[file.ask(theirs, 1)]))
    a.sync(Batch(rows=[file.row("1")]))
    assert b.sync(Batch()).accounts[file.spot(theirs)].posted == 1


def test_a_rule_that_was_gone_for_a_while_has_missed_nothing(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)], rows=[file.row("1", 10)]))
    store.sync(Batch(returns=[(file.spot(rule), 10_000)]))
    store.join("a", [])
    assert file.read("SELECT rule_id FROM rules") == []
    store.sync(Batch(rows=[file.row("2", 20), file.row("3", 30, state="in_doubt")]))
    store.join("a", [rule])
    assert figures(store.sync(Batch(asks=[file.ask(rule, 1)])).accounts[file.spot(rule)]) == (60, 30, 940, 0)


def test_a_rule_stays_while_anybody_alive_goes_by_it(file: File) -> None:
    one, other = rules_from(HOURLY, TOTAL)
    a, _ = file.open("a", [one]), file.open("b", [one])
    a.join("a", [other])
    assert {id for (id,) in file.read("SELECT rule_id FROM rules")} == {one.id, other.id}
    file.now_s += 20
    a.sync(Batch())
    a.join("a", [other])
    assert file.read("SELECT rule_id FROM rules") == [(other.id,)]


def test_how_far_the_journal_is_told_comes_back(file: File) -> None:
    store = file.open("a")
    store.sync(Batch(rows=[file.row("1")], told=(3, 1_700)))
    store.sync(Batch(rows=[file.row("2")]))
    assert file.open().join("a", []) == (3, 1_700)
    store.sync(Batch(told=(4, 0)))
    assert file.open().join("a", []) == (4, 0)
    assert file.open().join("b", []) == (0, 0)


# --- crashes and sleepers ---------------------------------------------------


def test_the_leases_of_a_crashed_process_end_with_its_first_sync_and_its_rows(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 900)]))
    again = file.open()
    again.join("a", [rule])
    # It has not told its rows: nobody may have what it had.
    assert b.sync(Batch(asks=[file.ask(rule, 200)])).accounts[spot].leased == 0
    rows = [file.row("a.1", 100), file.row("a.2", 50, state="in_doubt")]
    accounts = again.sync(Batch(rows=rows)).accounts
    assert figures(accounts[spot]) == (150, 50, 0, 0)
    assert figures(b.sync(Batch(asks=[file.ask(rule, 850)])).accounts[spot]) == (150, 50, 850, 0)


def test_joining_again_with_other_rules_keeps_leases(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    store.join("a", rules_from(HOURLY, TOTAL))
    assert store.sync(Batch(rows=[file.row("1")])).accounts[file.spot(rule)].leased == 990


def test_a_lease_of_one_that_vanished_stays_counted(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    a.sync(Batch(asks=[file.ask(rule, 900)]))
    file.now_s += 14.9
    b.sync(Batch())
    assert b.sync(Batch(asks=[file.ask(rule, 200)])).holders == 2
    file.now_s += 0.1
    synced = b.sync(Batch(asks=[file.ask(rule, 200)]))
    assert synced.holders == 1
    assert figures(synced.accounts[file.spot(rule)]) == (900, 900, 0, 0)
    assert file.read("SELECT id, nusd, state, source, agent, user, model FROM ledger") == [
        (f"lease:a:{rule.id}:{int(T0)}", 900, "in_doubt", "lease", "", "", "")
    ]


def test_a_lost_lease_counts_in_its_own_account_alone(file: File) -> None:
    hourly, per_agent, total = rules_from(HOURLY, PER_AGENT, Cap(per="total", usd=5_000))
    a, b = file.open("a", [hourly, per_agent, total]), file.open("b", [hourly, per_agent, total])
    a.sync(Batch(asks=[file.ask(hourly, 300), file.ask(per_agent, 40)]))
    file.now_s += 20
    accounts = b.sync(Batch(asks=[file.ask(total, 1), file.ask(hourly, 1), file.ask(per_agent, 1)])).accounts
    assert accounts[file.spot(total)].posted == 0
    assert b.sync(Batch()).accounts[file.spot(hourly)].posted == 300
    # Whoever folds the account anew finds the same.
    file.write("DELETE FROM accounts")
    asks = [file.ask(total, 1), file.ask(hourly, 1), file.ask(per_agent, 1)]
    accounts = b.sync(Batch(asks=asks)).accounts
    assert [accounts[file.spot(each)].posted for each in (total, hourly, per_agent)] == [0, 300, 40]


@pytest.mark.parametrize("is_new_life", [True, False])
def test_one_that_was_taken_for_dead_puts_it_right_once(file: File, is_new_life: bool) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 800)]))
    row = file.row("a.1", 100)
    file.now_s += 60
    assert figures(b.sync(Batch(asks=[file.ask(rule, 150)])).accounts[spot]) == (800, 800, 200, 0)
    held = [(spot, 70)]
    if is_new_life:
        a, held = file.open(), []
        a.join("a", [rule])
    synced = a.sync(Batch(rows=[row], held=held, returns=[(spot, 630)]))
    assert synced.was_lost
    assert figures(synced.accounts[spot]) == (100, 0, 0 if is_new_life else 70, 200)
    assert file.read("SELECT id, state FROM ledger ORDER BY id") == [
        ("a.1", "posted"),
        (f"lease:a:{rule.id}:{int(T0)}", "released"),
    ]
    again = a.sync(Batch(rows=[row]))
    assert not again.was_lost
    assert again.holders == 2
    assert figures(b.sync(Batch()).accounts[spot])[:2] == (100, 0)


def test_calls_in_flight_of_one_taken_for_dead_are_leased_even_above_the_limit(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 800)]))
    file.now_s += 60
    b.sync(Batch(asks=[file.ask(rule, 200)]))
    # An admin believes that nothing was spent, and b goes on.
    file.write("UPDATE ledger SET state = 'released'")
    file.write("UPDATE accounts SET posted = 0, in_doubt = 0")
    b.sync(Batch(asks=[file.ask(rule, 800)]))
    balance = a.sync(Batch(held=[(spot, 70)])).accounts[spot]
    assert balance == Balance(70, 0, 0, 1_000, is_wanted=True)


def test_one_taken_for_dead_hears_of_every_lease_it_has_no_more(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    a.sync(Batch(asks=[file.ask(rule, 800)]))
    file.now_s += 60
    b.sync(Batch())
    file.write("UPDATE ledger SET state = 'released'")
    file.write("UPDATE accounts SET posted = 0, in_doubt = 0")
    assert figures(a.sync(Batch()).accounts[file.spot(rule)]) == (0, 0, 0, 0)


def test_one_that_is_lost_between_two_joins_is_still_put_right(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    a.sync(Batch(asks=[file.ask(rule, 800)]))
    file.now_s += 60
    b.sync(Batch())
    a.join("a", [rule])
    synced = a.sync(Batch(held=[(file.spot(rule), 5)]))
    assert synced.was_lost
    assert figures(synced.accounts[file.spot(rule)]) == (0, 0, 5, 0)


def test_the_clock_may_jump_ahead_and_back(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    spot = file.spot(rule)
    a.sync(Batch(asks=[file.ask(rule, 400)]))
    b.sync(Batch(asks=[file.ask(rule, 400)]))
    file.now_s += 7_200
    b.sync(Batch())  # Takes a for dead.
    file.now_s -= 7_200
    assert figures(b.sync(Batch(asks=[file.ask(rule, 1)])).accounts[spot])[:2] == (400, 400)
    synced = a.sync(Batch(rows=[file.row("1", 100)], held=[(spot, 10)]))
    assert synced.was_lost
    assert figures(synced.accounts[spot])[:3] == (100, 0, 10)


# --- thresholds -------------------------------------------------------------


def shares(synced: Synced) -> list[float]:
    return [crossing.share for crossing in synced.crossings]


def test_a_share_of_a_limit_is_told_once_to_one_process(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    a, b = file.open("a", [rule]), file.open("b", [rule])
    a.sync(Batch(asks=[file.ask(rule, 1)]))
    assert shares(a.sync(Batch(rows=[file.row("1", 249)]))) == []
    (crossing,) = b.sync(Batch(rows=[file.row("2", 1)])).crossings
    assert crossing == (
        rule.id, rule.label, rule.id, (int(T0), int(T0) + 3600), 0.25, "usd", 250, 1_000,
    )  # fmt: skip
    assert shares(a.sync(Batch(rows=[file.row("3", 1)]))) == []
    again = file.open("a", [rule])
    assert shares(again.sync(Batch(rows=[file.row("4", 579)]))) == [0.5, 0.83]
    assert shares(again.sync(Batch(rows=[file.row("5", 170)]))) == [1.0]
    assert shares(again.sync(Batch(rows=[file.row("6", 1)]))) == []
    file.now_s += 3600
    assert shares(again.sync(Batch(asks=[file.ask(rule, 1)], rows=[file.row("7", 300)]))) == [0.25]


def test_a_new_account_tells_the_shares_it_begins_with(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(rows=[file.row("1", 600)]))
    assert shares(store.sync(Batch(asks=[file.ask(rule, 1)]))) == [0.25, 0.5]


# --- kill switches ----------------------------------------------------------


def test_stops_of_all_are_told_to_all(file: File) -> None:
    store = file.open("a")
    file.write("INSERT INTO stops VALUES ('dev', 'agent', 'qa_agent', 'ops', 'drill', 7)")
    assert store.sync(Batch()).stops == [("dev", "agent", "qa_agent", "ops", "drill", 7)]
    file.write("DELETE FROM stops")
    assert store.sync(Batch()).stops == []


# --- calls and rollouts ----------------------------------------------------


def test_calls_come_in_with_the_rows_or_not_at_all_and_each_once(file: File) -> None:
    one, other = file.open("a"), file.open("b")
    rows, calls = [file.row("c1.1")], [outcome("c1"), outcome("c2")]
    file.write("CREATE TRIGGER full BEFORE INSERT ON calls BEGIN SELECT RAISE(ABORT, 'no room'); END")
    with pytest.raises(StoreError, match="no room"):
        one.sync(Batch(rows=rows, outcomes=calls, told=(1, 50)))
    assert file.read("SELECT id FROM ledger UNION SELECT id FROM calls") == []
    assert file.read("SELECT told_offset FROM holders WHERE holder = 'a'") == [(0,)]
    file.write("DROP TRIGGER full")
    for store in (one, other, one):
        store.sync(Batch(rows=rows, outcomes=calls, told=(1, 50)))
    assert file.read("SELECT id FROM ledger") == [("c1.1",)]
    assert file.read("SELECT id, user, is_success FROM calls") == [("c1", "u1", 1), ("c2", "u1", 1)]


def test_calls_go_when_they_are_too_old_as_others_come(file: File) -> None:
    ids = "SELECT id FROM calls ORDER BY id"
    store = file.open("a", keep_calls_ms=1_000)
    now_ms = int(file.now_s * 1000)
    first = [outcome(f"a{n}", at_ms=now_ms - 2_000 + n) for n in range(4)]
    store.sync(Batch(outcomes=[*first, outcome("b", at_ms=now_ms), outcome("c", env="elsewhere", at_ms=1)]))
    assert file.read(ids) == [("b",)]
    file.now_s += 1
    store.sync(Batch(outcomes=[outcome("d", at_ms=now_ms + 1_000)]))
    assert file.read(ids) == [("b",), ("d",)]
    file.now_s += 0.001
    store.sync(Batch())
    assert file.read(ids) == [("b",), ("d",)]
    store.sync(Batch(outcomes=[outcome("e", at_ms=now_ms + 1_001)]))
    assert file.read(ids) == [("d",), ("e",)]


def test_rollouts_of_all_are_told_to_all_with_every_sync(file: File) -> None:
    one, other = file.open("a"), file.open("b")
    assert one.sync(Batch()).rollouts == []
    change = first().change
    assert change is not None
    with Experiments(file.path, clock=lambda: file.now_s) as experiments:
        state = experiments.begin("dev", change)
        elsewhere = experiments.begin("production", change)
    for store in (one, other, one):
        assert store.sync(Batch()).rollouts == [("dev", state), ("production", elsewhere)]


# --- economy ----------------------------------------------------------------


def test_without_news_nothing_is_written_until_the_next_sign_of_life(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)], held=[(file.spot(rule), 5)], told=(1, 5)))
    watcher = sqlite3.connect(file.path)

    def version() -> int:
        return watcher.execute("PRAGMA data_version").fetchone()[0]

    before = version()
    idle = Batch(held=[(file.spot(rule), 5)], told=(1, 5))
    for _ in range(4):
        file.now_s += 0.49
        assert figures(store.sync(idle).accounts[file.spot(rule)]) == (0, 0, 1_000, 0)
    assert version() == before
    file.now_s += 0.05
    store.sync(idle)
    assert version() != before
    watcher.close()


def test_sums_of_old_windows_go_and_can_be_had_again(file: File) -> None:
    hourly, total = rules_from(HOURLY, TOTAL)
    store = file.open("a", [hourly, total])
    early = file.spot(hourly)
    store.sync(Batch(asks=[file.ask(hourly, 1), file.ask(total, 1)], rows=[file.row("1", 300)]))
    store.sync(Batch(returns=[(early, 10_000)]))
    file.now_s += 2 * 86_400 + 3_500
    store.sync(Batch())
    assert (early.account, early.start_s) in file.read("SELECT account, start_s FROM accounts")
    file.now_s += 3_600
    store.sync(Batch())
    assert file.read("SELECT account FROM accounts") == [(total.id,)]
    file.now_s = T0
    synced = store.sync(Batch(asks=[file.ask(hourly, 1)]))
    assert synced.accounts[early].posted == 300
    assert synced.crossings == []


def test_a_window_that_somebody_leases_is_kept(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    file.now_s += 5 * 86_400
    assert store.sync(Batch()).was_lost is False
    assert len(file.read("SELECT 1 FROM accounts")) == 1


# --- a store that cannot be used --------------------------------------------


def test_a_locked_file_is_told_and_the_next_sync_makes_up_for_it(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    batch = Batch(rows=[file.row("1", 100)], told=(1, 9))
    other = sqlite3.connect(file.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"the ledger at .* cannot be used: another process keeps it locked"):
        store.sync(batch)
    with pytest.raises(StoreError, match="locked"):
        store.join("a", [rule])
    # Reading goes on beside a writer, and a process without news only reads.
    assert figures(store.sync(Batch()).accounts[file.spot(rule)]) == (0, 0, 1_000, 0)
    other.execute("ROLLBACK")
    other.close()
    assert figures(store.sync(batch).accounts[file.spot(rule)]) == (100, 0, 900, 0)


def test_a_first_sync_that_fails_is_still_the_first_when_it_is_tried_again(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    file.open("a", [rule]).sync(Batch(asks=[file.ask(rule, 1)]))
    again = file.open()
    again.join("a", [rule])
    other = sqlite3.connect(file.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        again.sync(Batch())
    other.close()
    again.sync(Batch())
    assert file.read("SELECT * FROM leases") == []


def test_a_full_disk_is_told_and_nothing_is_half_done(file: File) -> None:
    (rule,) = rules_from(HOURLY)
    store = file.open("a", [rule])
    store.sync(Batch(asks=[file.ask(rule, 1)]))
    database = store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    rows = [file.row(f"{number}", 1, note="x" * 200) for number in range(500)]
    with pytest.raises(StoreError, match="the disk is full"):
        store.sync(Batch(rows=rows, told=(7, 7)))
    assert file.read("SELECT count(*) FROM ledger") == [(0,)]
    assert file.read("SELECT posted FROM accounts") == [(0,)]
    assert file.read("SELECT told_segment FROM holders") == [(0,)]
    database.execute("PRAGMA max_page_count = 1000000")
    assert figures(store.sync(Batch(rows=rows)).accounts[file.spot(rule)]) == (500, 0, 500, 0)


def test_a_file_that_turns_read_only_is_told(file: File) -> None:
    store = file.open("a")
    store._database.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreError, match="cannot be written to"):
        store.sync(Batch(rows=[file.row("1")]))
    store._database.execute("PRAGMA query_only = OFF")
    store.sync(Batch(rows=[file.row("1")]))


def test_a_store_that_is_closed_says_so(file: File) -> None:
    store = file.open("a")
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.sync(Batch())


# --- whatever happens -------------------------------------------------------

FLEET_RULES = rules_from(
    Cap(per="hour", usd=1_000),
    Cap(scope="user", per="day", requests=6),
    Cap(scope="agent+model", per="total", tokens=900, only={"operation": ["inference", "benchmark"]}),
)
CALLERS = [
    Dimensions(agent=agent, user=user, model="m", operation=operation)
    for agent in ("x", "")
    for user in ("u1", "u2")
    for operation in ("inference", "finetune")
]


class Process:
    """A gateway as the store sees it: leases in memory, calls in flight, and a journal that survives it."""

    def __init__(self, file: File, name: str) -> None:
        self.file, self.name = file, name
        self.calls: dict[str, tuple[int, Dimensions, Amounts]] = {}
        self.journal: list[LedgerRow] = []
        self.crossings: list[tuple[str, int, float]] = []
        self.begin()

    def begin(self) -> None:
        self.store = self.file.open()
        self.leased: dict[Spot, int] = {}
        self.unsent = 0  # Where the part of the journal that was not told begins.
        self.store.join(self.name, FLEET_RULES)

    def held(self) -> dict[Spot, int]:
        held: dict[Spot, int] = {}
        for at_ms, on, amounts in self.calls.values():
            for spot, amount in touched_by(at_ms, on, amounts).items():
                held[spot] = held.get(spot, 0) + amount
        return held

    def sync(self, asks: Sequence[Ask] = (), returns: Sequence[tuple[Spot, int]] = (), retold: int = 0) -> Synced:
        rows = self.journal[max(self.unsent - retold, 0) :]
        synced = self.store.sync(
            Batch(rows=rows, asks=asks, returns=returns, held=list(self.held().items()), told=(1, len(self.journal)))
        )
        self.unsent = len(self.journal)
        self.crossings += [(each.account, each.window.start_s, each.share) for each in synced.crossings]
        self.leased = {spot: balance.leased for spot, balance in synced.accounts.items() if balance.leased}
        return synced

    def free(self, spot: Spot) -> int:
        unsent = sum(touched_by(row.at_ms, row.on, row.amounts).get(spot, 0) for row in self.journal[self.unsent :])
        return self.leased.get(spot, 0) - self.held().get(spot, 0) - unsent

    def call(self, id: str, on: Dimensions, amounts: Amounts, draw: int) -> None:
        at_ms = int(self.file.now_s * 1000)
        needs = touched_by(at_ms, on, amounts)
        asks = [
            Ask(rule, on, spot, rule.window(self.file.now_s).end_s, needs[spot] - self.free(spot), draw)
            for rule in FLEET_RULES
            for spot in [self.file.spot(rule, on)]
            if rule.applies(on) and self.free(spot) < needs[spot]
        ]
        if asks:
            self.sync(asks)
        if all(self.free(spot) >= amount for spot, amount in needs.items()):
            self.calls[id] = (at_ms, on, amounts)

    def end(self, state: str, part: float) -> None:
        id, (at_ms, on, amounts) = next(iter(self.calls.items()))
        del self.calls[id]
        spent = Amounts(*(int(amount * part) for amount in amounts)) if state == "posted" else amounts
        self.journal.append(
            LedgerRow(
                id=id, at_ms=at_ms, env="dev", on=on, state=state,
                amounts=Amounts() if state == "void" else spent,
            )
        )  # fmt: skip

    def crash(self) -> None:
        self.store.close()
        while self.calls:
            self.end("in_doubt", 1)
        self.begin()


def touched_by(at_ms: int, on: Dimensions, amounts: Amounts) -> dict[Spot, int]:
    return {
        Spot(rule.account(on), rule.window(at_ms / 1000).start_s): rule.amount(amounts)
        for rule in FLEET_RULES
        if rule.applies(on)
    }


class Fleet(RuleBasedStateMachine):
    """One to four processes on one file; they call, sleep, crash and come back in any order."""

    @initialize(size=st.integers(1, 4))
    def begin(self, size: int) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.file = File(Path(self.directory.name))
        self.processes = [Process(self.file, f"p{number}") for number in range(size)]
        self.calls = 0

    def one(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    @rule(
        number=st.integers(0, 3),
        on=st.sampled_from(CALLERS),
        sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 300)), min_size=1, max_size=5),
        draw=st.sampled_from([0, 5, 50, 5_000]),
    )
    def call(self, number: int, on: Dimensions, sizes: list[tuple[int, int]], draw: int) -> None:
        for nusd, tokens in sizes:
            self.calls += 1
            self.one(number).call(f"c{self.calls}", on, Amounts(nusd, 1, tokens), draw)

    @rule(
        number=st.integers(0, 3),
        ends=st.lists(st.tuples(st.sampled_from(["posted", "void", "in_doubt"]), st.floats(0.5, 1)), min_size=1),
        is_told=st.booleans(),
    )
    def end(self, number: int, ends: list[tuple[str, float]], is_told: bool) -> None:
        process = self.one(number)
        for state, part in ends:
            if process.calls:
                process.end(state, part)
        if is_told:
            process.sync()

    @rule(number=st.integers(0, 3), retold=st.integers(0, 5), is_returning=st.booleans())
    def sync(self, number: int, retold: int, is_returning: bool) -> None:
        process = self.one(number)
        returns = [(spot, free) for spot in process.leased if (free := process.free(spot)) > 0] if is_returning else []
        process.sync(returns=returns, retold=retold)

    @rule(
        number=st.integers(0, 3),
        is_crash=st.booleans(),
        seconds=st.sampled_from([0.3, 3, 16, 40, 3_600, 90_000, -1_800]),
    )
    def suffer(self, number: int, is_crash: bool, seconds: float) -> None:
        if is_crash:
            self.one(number).crash()
        else:
            self.file.now_s += seconds

    @precondition(lambda self: hasattr(self, "file"))
    @invariant()
    def no_cap_is_overdrawn(self) -> None:
        limits = {each.id: each.limit for each in FLEET_RULES}
        for account, start_s, rule_id, posted, in_doubt, leased in self.file.read(
            "SELECT a.account, a.start_s, rule_id, posted, in_doubt, coalesce(sum(amount), 0) "
            "FROM accounts a LEFT JOIN leases l ON l.account = a.account AND l.start_s = a.start_s GROUP BY 1, 2"
        ):
            assert 0 <= in_doubt <= posted
            assert posted + leased <= limits[rule_id], (account, start_s, posted, leased)

    @precondition(lambda self: hasattr(self, "file"))
    @invariant()
    def what_was_really_spent_or_is_held_fits_every_cap(self) -> None:
        real: dict[Spot, int] = {}
        for process in self.processes:
            spent = [(row.at_ms, row.on, row.amounts) for row in process.journal]
            for at_ms, on, amounts in [*spent, *process.calls.values()]:
                for spot, amount in touched_by(at_ms, on, amounts).items():
                    real[spot] = real.get(spot, 0) + amount
        limits = {each.id: each.limit for each in FLEET_RULES}
        for spot, amount in real.items():
            (limit,) = [limit for id, limit in limits.items() if spot.account.startswith(id)]
            assert amount <= limit, spot

    @precondition(lambda self: hasattr(self, "file"))
    @invariant()
    def every_account_is_the_sum_of_its_rows(self) -> None:
        sums: dict[tuple[str, int], tuple[int, int]] = {}
        rule_of = dict(self.file.read("SELECT account, rule_id FROM accounts"))
        for at_ms, agent, key, user, operation, model, variant, *figures, state, account in self.file.read(
            "SELECT at_ms, agent, key, user, operation, model, variant, nusd, requests, tokens, state, account "
            "FROM ledger WHERE state IN ('posted', 'in_doubt')"
        ):
            on = Dimensions(agent, key, user, operation, model, variant)
            for each in FLEET_RULES:
                # The row of a lost lease counts in the account it was in, and nowhere else.
                if not (each.applies(on) if account is None else rule_of.get(account) == each.id):
                    continue
                name = account or each.account(on)
                amount = each.amount(Amounts(*figures))
                spot = (name, each.window(at_ms / 1000).start_s)
                posted, in_doubt = sums.get(spot, (0, 0))
                sums[spot] = (posted + amount, in_doubt + (amount if state == "in_doubt" else 0))
        for account, start_s, posted, in_doubt in self.file.read(
            "SELECT account, start_s, posted, in_doubt FROM accounts"
        ):
            assert (posted, in_doubt) == sums.get((account, start_s), (0, 0)), (account, start_s)

    def teardown(self) -> None:
        if not hasattr(self, "file"):
            return
        # All come back and tell what they know: the ledger is what was spent, and nothing else is counted.
        for process in self.processes:
            while process.calls:
                process.end("posted", 0.5)
            process.sync(retold=1_000)
        journal = {row.id: row for process in self.processes for row in process.journal}
        found = self.file.read(
            "SELECT id, nusd, requests, tokens, state FROM ledger WHERE source = 'gateway' ORDER BY id"
        )
        assert found == sorted((row.id, *row.amounts, row.state) for row in journal.values())
        for process in self.processes:
            process.sync()
        told = [crossing for process in self.processes for crossing in process.crossings]
        assert len(told) == len(set(told))
        for process in self.processes:
            process.store.leave()
        assert self.file.read("SELECT * FROM leases") == []
        self.file.close()
        self.directory.cleanup()


Fleet.TestCase.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFleet = Fleet.TestCase
