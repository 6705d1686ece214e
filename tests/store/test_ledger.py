"""What people ask of a ledger and do to it: sums that agree with its rows, changes that are whole and are audited."""

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.decide.caps import Rule, rules_of
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.domain.money import MAX_NUSD
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.store.experiments import Experiments
from gateway.store.leases import TTL_S
from gateway.store.ledger import Added, AuditEntry, By, Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Ask, Batch, Spot, Stop, StoreError, Total
from tests.outcomes import outcome

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
SINCE_MS, UNTIL_MS = NOON_MS - 2 * DAY_MS, NOON_MS + 2 * DAY_MS
QA = Dimensions(agent="qa_agent", key="web", user="u1", model="mistral/small", variant="finetuned")
LEGAL = QA._replace(agent="legal_agent", user="u2", operation="benchmark")
RULES = rules_of(
    [
        Cap(per="hour", usd=Usd(1_000_000)),
        Cap(scope="agent", per="day", usd=Usd(1_000_000)),
        Cap(scope="user", per="total", requests=1_000_000),
        Cap(per="day", timezone="Asia/Kathmandu", tokens=1_000_000),
    ],
    "dev",
)


class World:
    """A gateway's store with an account of every rule, the ledger over the same file, and a clock that is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now_ms = NOON_MS
        self.store = SqliteStore(path, clock=self.clock)
        self.store.join("gateway-1", RULES)
        self.store.sync(Batch(asks=[ask(rule, on) for rule in RULES for on in (QA, LEGAL)]))
        self.ledger = Ledger(path, clock=self.clock)

    def clock(self) -> float:
        return self.now_ms / 1000

    def posted(self) -> dict[str, tuple[int, int]]:
        """What every account holds, straight from the file."""
        with sqlite3.connect(self.path) as database:
            found = database.execute("SELECT account, posted, in_doubt FROM accounts").fetchall()
        database.close()
        return {account: (posted, in_doubt) for account, posted, in_doubt in found}

    def spoil(self, statement: str) -> None:
        with sqlite3.connect(self.path) as database:
            database.execute(statement)
        database.close()


def ask(rule: Rule, on: Dimensions, needed: int = 1) -> Ask:
    window = rule.window(NOON_MS / 1000)
    return Ask(rule, on, Spot(rule.account(on), window.start_s), window.end_s, needed, needed)


def row(id: str, nusd: int = 100, **changes: object) -> LedgerRow:
    known = LedgerRow(id=id, at_ms=NOON_MS, env="dev", on=QA, amounts=Amounts(nusd, 1, 10), source="manual")
    return msgspec.structs.replace(known, **changes)


def rows_of(ledger: Ledger) -> list[LedgerRow]:
    return list(ledger.rows("dev"))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "ledger.db")
    yield made
    made.ledger.close()
    made.store.close()


@pytest.fixture
def ledger(world: World) -> Ledger:
    return world.ledger


# --- Sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("agent", {"legal_agent": 400, "qa_agent": 300}),
        ("model", {"mistral/small": 700}),
        ("variant", {"finetuned": 700}),
        ("operation", {"benchmark": 400, "inference": 300}),
        ("key", {"web": 700}),
        ("user", {"u2": 400, "u1": 300}),
        ("day", {"2026-11-20": 100, "2026-11-21": 600}),
    ],
)
def test_totals_are_by_any_dimension_and_the_largest_comes_first(
    ledger: Ledger, by: By, groups: dict[str, int]
) -> None:
    ledger.add([row("a", at_ms=NOON_MS - DAY_MS), row("b", 200), row("c", 400, on=LEGAL)], who="ann")
    found = ledger.totals("dev", by, since_ms=SINCE_MS, until_ms=UNTIL_MS)
    assert [(total.group, total.amounts.nusd) for total in found] == list(groups.items())
    assert sum(total.rows for total in found) == 3
    assert sum(total.amounts.tokens for total in found) == 30


def test_totals_leave_out_what_cost_nothing_and_name_what_is_in_doubt(ledger: Ledger) -> None:
    states = ["posted", "void", "in_doubt", "released"]
    ledger.add([row(state, 10**number, state=state) for number, state in enumerate(states)], who="ann")
    found = ledger.totals("dev", "agent", since_ms=SINCE_MS, until_ms=UNTIL_MS)
    assert found == [Total("qa_agent", Amounts(101, 2, 20), 100, 2)]


def test_totals_of_a_time_hold_its_first_millisecond_and_not_its_end(ledger: Ledger) -> None:
    ledger.add(
        [row("a", 1, at_ms=NOON_MS), row("b", 10, at_ms=NOON_MS + 9), row("c", 100, at_ms=NOON_MS + 10)], who="ann"
    )
    (found,) = ledger.totals("dev", "agent", since_ms=NOON_MS, until_ms=NOON_MS + 10)
    assert found.amounts.nusd == 11
    assert ledger.totals("staging", "agent", since_ms=0, until_ms=UNTIL_MS) == []


@pytest.mark.parametrize(
    ("zone", "days"),
    [
        ("UTC", ["2026-03-29", "2026-03-30"]),
        ("America/New_York", ["2026-03-28", "2026-03-29", "2026-03-30"]),
        ("Asia/Kathmandu", ["2026-03-29", "2026-03-30", "2026-03-31"]),
    ],
)
def test_days_are_those_of_the_zone_in_order(ledger: Ledger, zone: str, days: list[str]) -> None:
    midnight_ms = 1_774_742_400_000  # 2026-03-29T00:00:00Z, when Europe's clocks change
    at_ms = [midnight_ms, midnight_ms + DAY_MS - 1, midnight_ms + DAY_MS, midnight_ms + 2 * DAY_MS - 1]
    ledger.add([row(f"r{at}", at_ms=at) for at in at_ms], who="ann")
    found = ledger.totals("dev", "day", since_ms=0, until_ms=UNTIL_MS, zone=zone)
    assert [total.group for total in found] == days
    assert sum(total.rows for total in found) == 4


def test_nothing_else_can_be_grouped_by(ledger: Ledger) -> None:
    with pytest.raises(StoreError, match="nothing to group by"):
        ledger.totals("dev", "nusd) --", since_ms=0, until_ms=1)  # type: ignore[arg-type]


def test_a_series_has_a_figure_for_every_step_and_group(ledger: Ledger) -> None:
    ledger.add([row("a", 1), row("b", 10, at_ms=NOON_MS + 2 * HOUR_MS), row("c", 100, on=LEGAL)], who="ann")
    found = ledger.series("dev", since_ms=NOON_MS, until_ms=NOON_MS + 2 * HOUR_MS + 1, step_s=3600, by="agent")
    assert found.starts_ms == [NOON_MS, NOON_MS + HOUR_MS, NOON_MS + 2 * HOUR_MS]
    assert list(found.groups.items()) == [("legal_agent", [100, 0, 0]), ("qa_agent", [1, 0, 10])]
    whole = ledger.series("dev", since_ms=NOON_MS, until_ms=NOON_MS + 2 * HOUR_MS + 1, step_s=3600)
    assert whole.groups == {"": [101, 0, 10]}


@pytest.mark.parametrize(("until_ms", "step_s"), [(NOON_MS, 60), (NOON_MS - 1, 60), (NOON_MS + 1, 0), (UNTIL_MS, 1)])
def test_a_series_that_has_no_steps_or_too_many_is_refused(ledger: Ledger, until_ms: int, step_s: int) -> None:
    with pytest.raises(StoreError, match="steps"):
        ledger.series("dev", since_ms=NOON_MS, until_ms=until_ms, step_s=step_s)


def test_series_and_totals_and_rows_agree(ledger: Ledger) -> None:
    dice = random.Random(4)
    some = [row(f"r{n}", dice.randrange(10**6), at_ms=NOON_MS + dice.randrange(DAY_MS)) for n in range(300)]
    ledger.add(some, who="ann")
    span = {"since_ms": NOON_MS + HOUR_MS, "until_ms": NOON_MS + 20 * HOUR_MS}
    expected = sum(known.amounts.nusd for known in some if span["since_ms"] <= known.at_ms < span["until_ms"])
    assert sum(total.amounts.nusd for total in ledger.totals("dev", "day", **span, zone="Asia/Tokyo")) == expected
    assert sum(map(sum, ledger.series("dev", **span, step_s=700, by="user").groups.values())) == expected
    assert sum(found.amounts.nusd for found in ledger.rows("dev", **span)) == expected


# --- Rows ------------------------------------------------------------------------------------------------------------


def test_rows_come_in_order_of_time_and_only_those_asked_for(ledger: Ledger) -> None:
    ledger.add(
        [row("late", at_ms=NOON_MS + 1), row("b", state="void"), row("a"), row("other", env="staging")], who="ann"
    )
    assert [found.id for found in ledger.rows("dev")] == ["a", "b", "late"]
    assert [found.id for found in ledger.rows("dev", states=["void"])] == ["b"]
    assert [found.id for found in ledger.rows("dev", since_ms=NOON_MS + 1)] == ["late"]
    assert [found.id for found in ledger.rows("dev", until_ms=NOON_MS + 1)] == ["a", "b"]


def test_rows_are_those_of_the_moment_the_first_was_read(world: World) -> None:
    world.ledger.add([row("a"), row("b")], who="ann")
    found = world.ledger.rows("dev")
    first = next(found)
    world.store.sync(Batch(rows=[row("c", source="gateway", at_ms=NOON_MS + 1)]))
    assert [first.id, *[later.id for later in found]] == ["a", "b"]
    assert [later.id for later in world.ledger.rows("dev")] == ["a", "b", "c"]


# --- Entries ---------------------------------------------------------------------------------------------------------


def test_an_entry_counts_in_every_account_it_touches_and_in_no_other(world: World) -> None:
    world.ledger.add([row("a", 500)], who="ann")
    hourly, agent, user, tokens = RULES
    posted = world.posted()
    assert posted[hourly.id] == (500, 0)
    assert posted[agent.account(QA)] == (500, 0)
    assert posted[agent.account(LEGAL)] == (0, 0)
    assert posted[user.account(QA)] == (1, 0)
    assert posted[tokens.id] == (10, 0)
    assert world.ledger.verify("dev") == []


def test_an_entry_of_another_hour_leaves_this_hour_alone(world: World) -> None:
    world.ledger.add([row("a", 500, at_ms=NOON_MS - 1)], who="ann")
    posted = world.posted()
    assert posted[RULES[0].id] == (0, 0)
    assert posted[RULES[1].account(QA)] == (500, 0)


def test_an_entry_above_a_cap_counts_in_full_and_leaves_nothing(world: World) -> None:
    world.ledger.add([row("a", 5_000_000)], who="ann")
    (status,) = (found for found in world.ledger.accounts("dev", RULES, NOON_MS / 1000) if found.rule_id == RULES[0].id)
    assert (status.posted, status.remaining) == (5_000_000, -4_000_000)
    synced = world.store.sync(Batch(asks=[ask(RULES[0], QA)]))
    assert synced.accounts[ask(RULES[0], QA).spot].posted == 5_000_000


def test_entries_that_are_added_twice_count_once(world: World) -> None:
    some = [row("a"), row("b", 200, state="in_doubt")]
    assert world.ledger.add(some, who="ann") == Added(2, 0)
    before = world.posted()
    assert world.ledger.add([*some, row("c"), row("c")], who="ann") == Added(1, 3)
    assert world.ledger.add(some, who="ann") == Added(0, 2)
    assert world.posted()[RULES[0].id] == (400, 200)
    assert before[RULES[0].id] == (300, 200)
    assert [(entry.what, msgspec.json.decode(entry.details)["added"]) for entry in world.ledger.audit()] == [
        ("entries added", 1),
        ("entries added", 2),
    ]


@pytest.mark.parametrize(
    "other", [row("a", 101), row("a", at_ms=NOON_MS + 1), row("a", note="x"), row("a", env="staging")]
)
def test_the_same_id_with_other_content_books_nothing_at_all(world: World, other: LedgerRow) -> None:
    world.ledger.add([row("a")], who="ann")
    before = world.posted(), rows_of(world.ledger), world.ledger.audit()
    with pytest.raises(StoreError, match=r"in the ledger with other content: a; nothing was booked"):
        world.ledger.add([row("new"), other], who="ann")
    assert (world.posted(), rows_of(world.ledger), world.ledger.audit()) == before


def test_two_entries_that_contradict_each_other_book_nothing(world: World) -> None:
    with pytest.raises(StoreError, match="other content: a"):
        world.ledger.add([row("a", 1), row("a", 2)], who="ann")
    assert rows_of(world.ledger) == []


def test_many_conflicts_are_counted_and_a_few_named(ledger: Ledger) -> None:
    ledger.add([row(f"r{n}") for n in range(9)], who="ann")
    with pytest.raises(StoreError, match=r"r0, r1, r2, r3, r4 and 4 more;"):
        ledger.add([row(f"r{n}", 7) for n in range(9)], who="ann")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (row("a", -1), "nusd is -1"),
        (row("a", MAX_NUSD), "nusd is 9007199254740992"),
        (row("a", amounts=Amounts(0, -1, 0)), "requests is -1"),
        (row("a", amounts=Amounts(0, 0, 2**63)), "tokens is"),
        (row("a", at_ms=-1), "at_ms is -1"),
        (row("a", at_ms=253_402_300_800_000), "at_ms is"),
        (row(""), "needs an id"),
        (row("a", env=""), "needs an id and an environment"),
        (row("a", source="lease"), "only the store itself books leases"),
    ],
)
def test_what_would_spoil_the_sums_is_refused(ledger: Ledger, wrong: LedgerRow, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        ledger.add([row("right"), wrong], who="ann")
    assert rows_of(ledger) == []


def test_entries_whose_sum_is_absurd_are_refused(ledger: Ledger) -> None:
    with pytest.raises(StoreError, match="nusd of these entries"):
        ledger.add([row(f"r{n}", MAX_NUSD // 2) for n in range(2)], who="ann")


def test_what_was_added_before_a_gateway_came_is_in_its_accounts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.db"
    with Ledger(path, clock=lambda: NOON_MS / 1000) as ledger:
        ledger.add([row("a", 700)], who="ann")
    store = SqliteStore(path, clock=lambda: NOON_MS / 1000)
    store.join("gateway-1", RULES)
    synced = store.sync(Batch(asks=[ask(RULES[0], QA)]))
    assert synced.accounts[ask(RULES[0], QA).spot].posted == 700
    store.close()


ENTRIES = st.lists(
    st.builds(
        row,
        id=st.sampled_from([f"r{n}" for n in range(6)]),
        nusd=st.sampled_from([0, 1, 50_000]),
        at_ms=st.sampled_from([NOON_MS, NOON_MS - 1, NOON_MS + DAY_MS]),
        on=st.sampled_from([QA, LEGAL]),
        state=st.sampled_from(["posted", "void", "in_doubt"]),
    ),
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(ENTRIES, max_size=5), releases=st.lists(st.sampled_from([f"r{n}" for n in range(6)]), max_size=4)
)
def test_whatever_is_added_and_released_accounts_are_the_fold_of_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[LedgerRow]], releases: list[str]
) -> None:
    world = World(tmp_path_factory.mktemp("fold") / "ledger.db")
    expected: dict[str, LedgerRow] = {}
    for batch in batches:
        wanted: dict[str, LedgerRow] = {}
        conflict = any(
            (expected | wanted).setdefault(new.id, new) != new or wanted.setdefault(new.id, new) != new for new in batch
        )
        if conflict:
            with pytest.raises(StoreError):
                world.ledger.add(batch, who="ann")
        else:
            known = len(expected)
            expected |= wanted
            assert world.ledger.add(batch, who="ann").added == len(expected) - known
    for number, id in enumerate(releases):
        actual = {id: Amounts(7, 1, 7)} if number % 2 else None
        if id in expected and expected[id].state == "in_doubt":
            (expected[id],) = world.ledger.release("dev", [id], who="ann", why="checked", actual=actual)
        else:
            with pytest.raises(StoreError, match="not in doubt"):
                world.ledger.release("dev", [id], who="ann", why="checked", actual=actual)
    assert {found.id: found for found in rows_of(world.ledger)} == expected
    assert world.ledger.verify("dev") == []
    world.ledger.close()
    world.store.close()


# --- Doubt -----------------------------------------------------------------------------------------------------------


def test_a_release_frees_the_hold_everywhere_and_keeps_the_row(world: World) -> None:
    world.ledger.add([row("a", 500, state="in_doubt", basis="bound"), row("b", 30)], who="ann")
    assert [found.id for found in world.ledger.in_doubt("dev")] == ["a"]
    (ended,) = world.ledger.release("dev", ["a"], who="ann", why="the provider never saw it")
    assert (ended.state, ended.amounts) == ("released", Amounts(500, 1, 10))
    assert world.posted()[RULES[0].id] == (30, 0)
    assert world.posted()[RULES[1].account(QA)] == (30, 0)
    assert world.ledger.in_doubt("dev") == []
    assert rows_of(world.ledger)[0] == ended


def test_a_release_with_the_amount_known_posts_that(world: World) -> None:
    world.ledger.add([row("a", 500, state="in_doubt"), row("b", 500, state="in_doubt")], who="ann")
    ended = world.ledger.release("dev", ["a", "b"], who="ann", why="bill", actual={"b": Amounts(120, 1, 6)})
    assert [(found.state, found.basis, found.amounts.nusd) for found in ended] == [
        ("released", "exact", 500),
        ("posted", "manual", 120),
    ]
    assert world.posted()[RULES[0].id] == (120, 0)
    assert world.posted()[RULES[3].id] == (6, 0)


def test_what_an_attempt_did_cost_after_all_is_its_calls_too(world: World) -> None:
    world.store.sync(Batch(outcomes=[outcome("req-1", cost_nusd=70), outcome("req-2", cost_nusd=70)]))
    rows = [row("req-1.1", 500, state="in_doubt"), row("req-1.2", 70), row("req-2.1", 500, state="in_doubt")]
    world.ledger.add(rows, who="ann")
    world.ledger.release("dev", ["req-1.1", "req-2.1"], who="ann", why="bill", actual={"req-1.1": Amounts(120, 1, 6)})
    with Experiments(world.path, clock=lambda: NOON_MS / 1000) as experiments:
        found = {id: experiments.outcome(id) for id in ("req-1", "req-2")}
    assert {id: call.cost_nusd for id, call in found.items() if call} == {"req-1": 190, "req-2": 70}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["a", "nobody"], r"not in doubt in dev: nobody \(unknown\); nothing was released"),
        (["a", "b"], r"b \(posted\)"),
        (["a", "elsewhere"], r"elsewhere \(unknown\)"),
    ],
)
def test_a_release_with_one_wrong_id_releases_nothing(world: World, ids: list[str], said: str) -> None:
    some = [row("a", state="in_doubt"), row("b"), row("elsewhere", env="staging", state="in_doubt")]
    world.ledger.add(some, who="ann")
    before = world.posted(), rows_of(world.ledger), world.ledger.audit()
    with pytest.raises(StoreError, match=said):
        world.ledger.release("dev", ids, who="ann", why="bill")
    assert (world.posted(), rows_of(world.ledger), world.ledger.audit()) == before


def test_a_release_happens_once(ledger: Ledger) -> None:
    ledger.add([row("a", state="in_doubt")], who="ann")
    assert len(ledger.release("dev", ["a", "a"], who="ann", why="bill")) == 1
    with pytest.raises(StoreError, match=r"a \(released\)"):
        ledger.release("dev", ["a"], who="ann", why="again")


def test_an_amount_without_its_release_or_that_is_absurd_is_refused(world: World) -> None:
    world.ledger.add([row("a", 500, state="in_doubt")], who="ann")
    with pytest.raises(StoreError, match="no release, is given for b"):
        world.ledger.release("dev", ["a"], who="ann", why="bill", actual={"b": Amounts(1)})
    with pytest.raises(StoreError, match="nusd is -1"):
        world.ledger.release("dev", ["a"], who="ann", why="bill", actual={"a": Amounts(-1)})
    assert world.posted()[RULES[0].id] == (500, 500)


def lose_a_process(world: World) -> LedgerRow:
    """A process leases, vanishes, and is taken for dead; the row of what it had leased."""
    gone = SqliteStore(world.path, clock=world.clock)
    gone.join("gateway-2", RULES)
    world.store.sync(Batch(returns=[(ask(RULES[0], QA).spot, 10**6)]))
    gone.sync(Batch(asks=[ask(RULES[0], QA, 1_000)]))
    gone.close()
    for _ in range(3):
        world.now_ms += int(TTL_S * 500)
        world.store.sync(Batch())
    (lost,) = world.ledger.in_doubt("dev")
    assert lost.source == "lease"
    return lost


def test_the_rest_of_a_lost_lease_counts_in_its_account_until_it_is_released(world: World) -> None:
    lost = lose_a_process(world)
    amount = lost.amounts.nusd
    assert world.posted()[RULES[0].id] == (amount, amount)
    assert world.ledger.verify("dev") == []
    assert world.ledger.totals("dev", "agent", since_ms=SINCE_MS, until_ms=UNTIL_MS) == []
    with pytest.raises(StoreError, match="the rest of a lease"):
        world.ledger.release("dev", [lost.id], who="ann", why="bill", actual={lost.id: Amounts(1)})
    (freed,) = world.ledger.release("dev", [lost.id], who="ann", why="the machine is gone")
    assert freed.state == "released"
    assert world.posted()[RULES[0].id] == (0, 0)
    assert world.posted()[RULES[1].account(QA)] == (0, 0)
    assert world.ledger.verify("dev") == []


# --- Kill switches and the audit -------------------------------------------------------------------------------------


def test_a_kill_switch_is_seen_by_gateways_until_it_is_taken_back(world: World) -> None:
    stop = Stop("dev", "agent", "qa_agent", "ann", "runaway", NOON_MS)
    world.ledger.stop(stop)
    assert world.ledger.stops("dev") == world.store.sync(Batch()).stops == [stop]
    assert world.ledger.stops("production") == []
    assert world.ledger.resume("dev", "agent", "qa_agent", who="bob", why="fixed")
    assert world.ledger.stops("dev") == world.store.sync(Batch()).stops == []
    assert not world.ledger.resume("dev", "agent", "qa_agent", who="bob", why="again")


def test_a_kill_switch_that_is_thrown_again_has_the_new_reason(ledger: Ledger) -> None:
    ledger.stop(Stop("dev", "", "", "ann", "bill", NOON_MS))
    ledger.stop(Stop("dev", "", "", "bob", "still", NOON_MS + 1))
    ledger.stop(Stop("dev", "user", "u1", "ann", "abuse", NOON_MS - 1))
    assert [(stop.dimension, stop.why) for stop in ledger.stops("dev")] == [("user", "abuse"), ("", "still")]


@pytest.mark.parametrize(("dimension", "value"), [("agnet", "qa_agent"), ("agent", ""), ("", "qa_agent")])
def test_a_kill_switch_for_nothing_that_is_there_is_refused(ledger: Ledger, dimension: str, value: str) -> None:
    with pytest.raises(StoreError):
        ledger.stop(Stop("dev", dimension, value, "ann", "why", NOON_MS))
    with pytest.raises(StoreError):
        ledger.resume("dev", dimension, value, who="ann", why="why")
    assert ledger.stops("dev") == []


def test_everything_by_hand_is_audited_with_who_and_why_latest_first(world: World) -> None:
    ledger = world.ledger
    ledger.add([row("a", 500, state="in_doubt")], who="ann")
    world.now_ms += 1
    ledger.release("dev", ["a"], who="bob", why="bill of May")
    ledger.stop(Stop("dev", "", "", "cleo", "freeze", NOON_MS))
    ledger.resume("dev", "", "", who="dan", why="thaw")
    found = ledger.audit()
    assert [(entry.who, entry.what) for entry in found] == [
        ("dan", "resumed"), ("cleo", "stopped"), ("bob", "doubt released"), ("ann", "entries added"),
    ]  # fmt: skip
    assert found[-1] == AuditEntry(NOON_MS, "ann", "entries added", '{"added":1,"known":0,"nusd":500,"ids":"a"}')
    assert found[2].at_ms == NOON_MS + 1
    released = msgspec.json.decode(found[2].details)
    assert released == {"env": "dev", "why": "bill of May", "ids": ["a"], "freed_nusd": 500, "posted": {}}
    assert ledger.audit(1) == found[:1]
    assert ledger.audit(0) == []


# --- When it is not well ---------------------------------------------------------------------------------------------


def test_verify_names_accounts_that_somebody_changed(world: World) -> None:
    world.ledger.add([row("a", 500)], who="ann")
    world.spoil("UPDATE accounts SET posted = posted + 1 WHERE account LIKE '%hour%'")
    (wrong,) = world.ledger.verify("dev")
    assert wrong == (
        f"{RULES[0].id} since 2026-11-21T12:00:00+00:00: holds 501, of it 0 in doubt; "
        "the ledger says 500, of it 0 in doubt"
    )
    assert world.ledger.verify("production") == []


def test_a_ledger_that_another_process_keeps_locked_says_so_and_changes_nothing(world: World) -> None:
    blocker = sqlite3.connect(world.path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    world.ledger._database.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(StoreError, match="locked"):
        world.ledger.add([row("a")], who="ann")
    # Who only reads is not kept waiting.
    assert rows_of(world.ledger) == []
    blocker.execute("ROLLBACK")
    blocker.close()
    assert world.ledger.add([row("a")], who="ann").added == 1


def test_a_closed_ledger_fails_as_a_store_does(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db", clock=lambda: 0.0) as ledger:
        pass
    with pytest.raises(StoreError):
        ledger.stops("dev")
    with pytest.raises(StoreError):
        list(ledger.rows("dev"))


def test_where_there_is_no_ledger_and_none_is_wanted_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no ledger"):
        Ledger(tmp_path / "ledger.db", clock=lambda: 0.0, is_new_allowed=False)
    assert list(tmp_path.iterdir()) == []
