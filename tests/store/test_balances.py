"""How accounts stand, as a store that serves has left them: what is posted, held, left, and how long that lasts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.decide.caps import Rule, rules_of
from gateway.decide.windows import Window
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow, State
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.store.ledger import AccountStatus, Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Ask, Batch, Spot

HOUR_S = 3600
NOON_S = 1_795_262_400  # 2026-11-21T12:00:00Z
DOLLAR = 10**9
HOURLY, PER_AGENT, TOTAL, TOKENS = RULES = rules_of(
    [
        Cap(per="hour", usd=Usd(20 * DOLLAR)),
        Cap(scope="agent+user", per="day", usd=Usd(5 * DOLLAR)),
        Cap(per="total", usd=Usd(30 * DOLLAR), only={"operation": ["benchmark"]}),
        Cap(per="hour", tokens=1_000),
    ],
    "production",
)
QA = Dimensions(agent="qa_agent", user="u1")


class World:
    """A gateway's store and the ledger over one file, with a clock that is told."""

    def __init__(self, path: Path) -> None:
        self.now_s = float(NOON_S)
        self.store = SqliteStore(path, clock=lambda: self.now_s)
        self.store.join("gateway-1", RULES)
        self.ledger = Ledger(path, clock=lambda: self.now_s)
        self.count = 0

    def row(self, nusd: int, *, at_s: float = NOON_S, on: Dimensions = QA, state: State = "posted") -> LedgerRow:
        self.count += 1
        amounts = Amounts(nusd, 1, 10)
        return LedgerRow(
            id=f"r{self.count}", at_ms=int(at_s * 1000), env="production", on=on, amounts=amounts, state=state
        )

    def ask(self, rule: Rule, on: Dimensions = QA, needed: int = 1) -> Ask:
        window = rule.window(self.now_s)
        return Ask(rule, on, Spot(rule.account(on), window.start_s), window.end_s, needed, needed)

    def statuses(self, now_s: float | None = None) -> dict[str, AccountStatus]:
        found = self.ledger.accounts("production", RULES, self.now_s if now_s is None else now_s)
        return {status.account: status for status in found}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "ledger.db")
    yield made
    made.ledger.close()
    made.store.close()


def test_a_global_account_is_there_before_anybody_used_it(world: World) -> None:
    found = world.ledger.accounts("production", RULES, NOON_S)
    assert [status.account for status in found] == [HOURLY.id, TOTAL.id, TOKENS.id]
    assert found[0] == AccountStatus(
        rule_id=HOURLY.id, label=HOURLY.label, account=HOURLY.id, scope=(), unit="usd", limit=20 * DOLLAR, posted=0,
        in_doubt=0, leased=0, held=0, remaining=20 * DOLLAR, window=Window(NOON_S, NOON_S + HOUR_S), burn_per_hour=0,
        exhausted_in_s=None, warn_at=(0.25, 0.5, 0.83, 1.0),
    )  # fmt: skip


def test_a_global_account_without_a_row_is_what_the_ledger_says(world: World) -> None:
    world.store.sync(Batch(rows=[world.row(DOLLAR), world.row(2 * DOLLAR, state="in_doubt")]))
    status = world.statuses()[HOURLY.id]
    assert (status.posted, status.in_doubt, status.remaining) == (DOLLAR, 2 * DOLLAR, 17 * DOLLAR)
    assert world.statuses()[TOTAL.id].posted == 0


def test_what_is_posted_in_doubt_leased_and_held_stand_apart(world: World) -> None:
    world.store.sync(Batch(asks=[world.ask(HOURLY, needed=4 * DOLLAR)]))
    spot = world.ask(HOURLY).spot
    world.store.sync(Batch(rows=[world.row(DOLLAR), world.row(2 * DOLLAR, state="in_doubt")], held=[(spot, DOLLAR)]))
    status = world.statuses()[HOURLY.id]
    assert (status.posted, status.in_doubt, status.leased, status.held) == (DOLLAR, 2 * DOLLAR, 17 * DOLLAR, DOLLAR)
    assert status.remaining == 16 * DOLLAR


def test_the_accounts_of_a_scope_name_their_values(world: World) -> None:
    other = Dimensions(agent="legal_agent", key="web", user="")
    world.store.sync(Batch(asks=[world.ask(PER_AGENT), world.ask(PER_AGENT, other)]))
    world.store.sync(Batch(rows=[world.row(DOLLAR, on=other)]))
    found = [status for status in world.statuses().values() if status.rule_id == PER_AGENT.id]
    assert [(dict(status.scope), status.posted) for status in found] == [
        ({"agent": "legal_agent", "user": "-"}, DOLLAR),
        ({"agent": "qa_agent", "user": "u1"}, 0),
    ]


def test_only_the_window_that_holds_now_is_shown(world: World) -> None:
    world.store.sync(Batch(rows=[world.row(DOLLAR)], asks=[world.ask(HOURLY)]))
    assert world.statuses(NOON_S + HOUR_S - 1)[HOURLY.id].posted == DOLLAR
    later = world.statuses(NOON_S + HOUR_S)[HOURLY.id]
    assert (later.posted, later.leased, later.window.start_s) == (0, 0, NOON_S + HOUR_S)


def test_two_processes_are_added_up(world: World, tmp_path: Path) -> None:
    other = SqliteStore(tmp_path / "ledger.db", clock=lambda: world.now_s)
    other.join("gateway-2", RULES)
    spot = world.ask(HOURLY).spot
    for store in (world.store, other):
        store.sync(Batch(asks=[world.ask(HOURLY, needed=DOLLAR)]))
    for store in (world.store, other):
        store.sync(Batch(held=[(spot, DOLLAR)]))
    status = world.statuses()[HOURLY.id]
    assert status.held == 2 * DOLLAR
    assert status.leased >= 2 * DOLLAR
    other.close()


def test_a_cap_lowered_below_what_is_spent_shows_the_overhang(world: World) -> None:
    world.store.sync(Batch(rows=[world.row(8 * DOLLAR)], asks=[world.ask(HOURLY)]))
    lower = HOURLY._replace(limit=5 * DOLLAR)
    (status,) = world.ledger.accounts("production", [lower], NOON_S)
    assert (status.limit, status.posted, status.remaining, status.exhausted_in_s) == (
        5 * DOLLAR,
        8 * DOLLAR,
        -3 * DOLLAR,
        0,
    )


def test_rules_of_another_environment_are_left_out(world: World) -> None:
    assert world.ledger.accounts("staging", RULES, NOON_S) == []


@pytest.mark.parametrize(
    ("minutes", "dollars", "burn", "exhausted_in_s"),
    [
        (30, 10, 20, None),  # 10 left at 20 an hour last until the window ends, and not a second less
        (30, 11, 22, 9 * 3600 // 22),
        (30, 1, 2, None),
        (30, 20, 40, 0),
        (0, 5, 300, 15 * 3600 // 300),  # the first second is taken for a minute
    ],
)
def test_burn_and_exhaustion_follow_from_the_ledger(
    world: World, minutes: int, dollars: int, burn: int, exhausted_in_s: int | None
) -> None:
    world.store.sync(Batch(rows=[world.row(dollars * DOLLAR)], asks=[world.ask(HOURLY)]))
    status = world.statuses(NOON_S + minutes * 60)[HOURLY.id]
    assert status.burn_per_hour == burn * DOLLAR
    assert status.exhausted_in_s == exhausted_in_s


def test_burn_of_a_long_window_is_that_of_the_last_hour(world: World) -> None:
    bench = QA._replace(operation="benchmark")
    rows = [
        world.row(10 * DOLLAR, at_s=NOON_S - HOUR_S - 1, on=bench),
        world.row(2 * DOLLAR, at_s=NOON_S - HOUR_S, on=bench),
        world.row(DOLLAR, at_s=NOON_S, on=bench, state="in_doubt"),
    ]
    world.store.sync(Batch(rows=rows, asks=[world.ask(TOTAL, bench)]))
    status = world.statuses()[TOTAL.id]
    assert status.burn_per_hour == 3 * DOLLAR
    assert status.exhausted_in_s == 17 * HOUR_S // 3


def test_units_are_the_rule_s_own(world: World) -> None:
    world.store.sync(Batch(rows=[world.row(DOLLAR), world.row(DOLLAR)], asks=[world.ask(TOKENS)]))
    status = world.statuses()[TOKENS.id]
    assert (status.unit, status.limit, status.posted) == ("tokens", 1_000, 20)
