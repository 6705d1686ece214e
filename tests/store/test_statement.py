"""What the ledger says at one moment: the same figures as its rows, dollars exact."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.domain.ledger import Amounts
from gateway.domain.spans import Span
from gateway.store.ledger import Ledger
from gateway.store.statement import row_line, statement_of
from gateway.store.store import Stop
from tests.ledgers import DAY_MS, LEGAL, NOON_MS, NOON_S, QA, USD, row, serve
from tests.planning import plan_of

PLAN = plan_of(
    """
    [[caps]]
    per = "hour"
    usd = "20"
    [[caps]]
    scope = "agent"
    per = "total"
    requests = 10
    [[caps]]
    scope = "user"
    per = "month"
    usd = "1"
    only = { operation = ["finetune"] }
    """,
    env="production",
)
TODAY = Span(NOON_MS - DAY_MS // 2, NOON_MS + 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    rows = [
        row("a", 1_234_567_891),
        row("b", 2 * USD, on=LEGAL),
        row("c", 3 * USD, state="in_doubt"),
        row("d", 9 * USD, state="void", amounts=Amounts()),
        row("e", 9 * USD, env="dev"),
        row("f", 5 * USD, at_ms=NOON_MS - DAY_MS),
    ]
    serve(tmp_path / "ledger.db", PLAN.rules, rows, held=3)
    with Ledger(tmp_path / "ledger.db", clock=lambda: NOON_S) as opened:
        yield opened


def test_accounts_are_as_the_rows_have_it(ledger: Ledger) -> None:
    found = statement_of(ledger, "production", PLAN.rules, NOON_S, None, TODAY)
    first, *agents = found.accounts
    assert (first.limit, first.posted, first.in_doubt, first.held) == ("20.00", "3.234567891", "3.00", "0.000000003")
    assert first.remaining == "13.765432106"
    assert (first.unit, first.scope, first.resets) == ("usd", {}, "2026-11-21T13:00:00Z")
    # Just below a tenth of a percent is not rounded up.
    assert first.used_percent == 31.1
    assert [(line.scope, line.posted, line.in_doubt) for line in agents] == [
        ({"agent": "legal_agent"}, 1, 0), ({"agent": "qa_agent"}, 2, 1),
    ]  # fmt: skip
    assert agents[0].resets is None
    assert agents[0].remaining == 10 - 1 - 3
    assert found.idle == ["user 1.00 usd per month (operation finetune)"]
    assert (found.in_doubt_usd, found.in_doubt_rows, found.spend) == ("3.00", 1, None)


def test_groups_add_up_to_what_was_spent(ledger: Ledger) -> None:
    spend = statement_of(ledger, "production", PLAN.rules, NOON_S, "agent", TODAY).spend
    assert spend is not None
    assert [(group.group, group.usd, group.in_doubt_usd, group.rows) for group in spend.groups] == [
        ("qa_agent", "4.234567891", "3.00", 2), ("legal_agent", "2.00", "0.00", 1),
    ]  # fmt: skip
    assert (spend.since, spend.until) == ("2026-11-21T00:00:00Z", "2026-11-21T12:00:00Z")


def test_a_cap_that_is_used_up_is_100_percent_and_only_then(ledger: Ledger) -> None:
    ledger.add([row("g", 13_765_432_105)], who="ann")
    before = statement_of(ledger, "production", PLAN.rules, NOON_S, None, TODAY).accounts[0]
    assert (before.remaining, before.used_percent) == ("0.000000001", 99.9)
    ledger.add([row("h", 1)], who="ann")
    after = statement_of(ledger, "production", PLAN.rules, NOON_S, None, TODAY).accounts[0]
    assert (after.remaining, after.used_percent, after.exhausted_in_s) == ("0.00", 100.0, 0)
    ledger.add([row("i", USD)], who="ann")
    over = statement_of(ledger, "production", PLAN.rules, NOON_S, None, TODAY).accounts[0]
    assert (over.remaining, over.used_percent) == ("-1.00", 105.0)


def test_switches_are_told_and_all_of_it_is_json(ledger: Ledger) -> None:
    ledger.stop(Stop("production", "agent", "qa_agent", by="ann", why="runs wild", at_ms=NOON_MS))
    ledger.stop(Stop("dev", "", "", by="ann", why="elsewhere", at_ms=NOON_MS))
    found = msgspec.json.decode(
        msgspec.json.encode(statement_of(ledger, "production", PLAN.rules, NOON_S, "day", TODAY))
    )
    assert found["stops"] == [
        {"dimension": "agent", "value": "qa_agent", "by": "ann", "why": "runs wild", "at": "2026-11-21T12:00:00Z"}
    ]
    assert [group["group"] for group in found["spend"]["groups"]] == ["2026-11-21"]


def test_a_row_is_shown_with_all_its_dimensions() -> None:
    line = row_line(row("a", 1, note="why not"))
    assert line["usd"] == "0.000000001"
    assert {name: line[name] for name in QA._fields} == QA._asdict()
    assert (line["id"], line["at"], line["state"], line["note"]) == ("a", "2026-11-21T12:00:00Z", "posted", "why not")


def test_of_a_million_users_only_those_are_shown_that_matter(tmp_path: Path) -> None:
    rules = plan_of('[[caps]]\nscope = "user"\nper = "day"\nusd = "1"', env="production").rules
    callers = [QA._replace(user=f"u{n}") for n in range(1_100)]
    rows = [row(f"r{n}", n, on=on) for n, on in enumerate(callers)]
    serve(tmp_path / "many.db", rules, rows, callers=callers)
    with Ledger(tmp_path / "many.db", clock=lambda: NOON_S) as ledger:
        found = statement_of(ledger, "production", rules, NOON_S, "user", TODAY)
        assert [line.scope["user"] for line in found.accounts] == [f"u{n}" for n in range(1_099, 999, -1)]
        assert found.accounts_left_out == {"user 1.00 usd per day": 1_000}
        assert found.spend is not None
        assert (len(found.spend.groups), found.spend.groups_left_out) == (1_000, 100)
        assert found.spend.groups[0].group == "u1099"
