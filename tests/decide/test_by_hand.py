"""What people may do by hand: entries that count where they should, switches that stop what they name."""

import pytest

from gateway.decide.by_hand import Entry, Switch, actual_of, doubts_about, read_switch, read_usd, row_of_entry, summary
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.money import MAX_NUSD
from gateway.store.store import Stop
from tests.planning import plan_of

KEYS = '[[keys]]\nname = "web"\nsha256 = "' + "0" * 64 + '"\n'
PLAN = plan_of(KEYS)


def entry(**changes: str) -> Entry:
    return Entry(**{"agent": "qa_agent", "usd": "0.50", **changes})


def test_an_entry_counts_its_dollars_and_no_request() -> None:
    row = row_of_entry(PLAN, entry(operation="finetune", note="job 7"), id="manual-1", at_ms=5)
    assert (row.id, row.at_ms, row.env, row.amounts) == ("manual-1", 5, "test", Amounts(500_000_000, 0, 0))
    assert (row.state, row.basis, row.source, row.note) == ("posted", "manual", "manual", "job 7")
    assert row.on == Dimensions(agent="qa_agent", operation="finetune")
    assert summary(row) == "0.50 usd for qa_agent (finetune)"


def test_a_user_of_an_entry_is_kept_as_calls_keep_him() -> None:
    row = row_of_entry(PLAN, entry(user="ann@example.org"), id="m", at_ms=0)
    assert row.on.user == PLAN.kept_user("ann@example.org")
    assert row_of_entry(PLAN, entry(), id="m", at_ms=0).on.user == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("agent", ""), ("agent", "a b"), ("agent", "x" * 65), ("operation", ""), ("operation", "a b"), ("key", "a|b"),
        ("model", "x" * 513), ("model", "a\nb"), ("user", "a\0b"), ("variant", "fine"), ("note", "x" * 1001),
        ("usd", ""), ("usd", "-1"), ("usd", "1e3"), ("usd", "$1"), ("usd", "1,50"), ("usd", "nan"),
        ("usd", "0.0000000001"), ("usd", "99999999"),
    ],
)  # fmt: skip
def test_what_no_entry_may_hold_is_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(Refused) as refused:
        row_of_entry(PLAN, entry(**{field: value}), id="m", at_ms=0)
    assert (refused.value.code, refused.value.param) == ("invalid_value", field)


def test_the_largest_amount_is_just_below_what_json_readers_hold() -> None:
    assert read_usd("9007199.254740991") == MAX_NUSD - 1
    with pytest.raises(Refused, match="above the largest amount"):
        read_usd("9007199.254740992")


def test_an_agent_that_is_gone_is_booked_and_told() -> None:
    (told,) = doubts_about(PLAN, row_of_entry(PLAN, entry(agent="qa_agnt"), id="m", at_ms=0))
    assert "no agent 'qa_agnt'; did you mean \"qa_agent\"?" in told
    for agent in ("qa_agent", "raw"):
        assert doubts_about(PLAN, row_of_entry(PLAN, entry(agent=agent), id="m", at_ms=0)) == []


def test_what_an_attempt_did_cost_keeps_its_tokens() -> None:
    row = row_of_entry(PLAN, entry(), id="m", at_ms=0)
    assert actual_of(row, "0.2") == row.amounts._replace(nusd=200_000_000)


ANN = PLAN.kept_user("ann")


@pytest.mark.parametrize(
    ("text", "switch", "shown"),
    [
        ("", Switch("", ""), "everything"),
        ("agent=qa_agent", Switch("agent", "qa_agent"), "agent=qa_agent"),
        ("agent=raw", Switch("agent", "raw"), "agent=raw"),
        ("key=web", Switch("key", "web"), "key=web"),
        ("user=ann", Switch("user", ANN), "user=ann"),
        (f"user-hash={ANN}", Switch("user", ANN), f"user={ANN}"),
        ("model=mistral/ft:a=b", Switch("model", "mistral/ft:a=b"), "model=mistral/ft:a=b"),
        ("operation=benchmark", Switch("operation", "benchmark"), "operation=benchmark"),
    ],
)
def test_a_switch_covers_the_calls_it_names_and_no_others(text: str, switch: Switch, shown: str) -> None:
    found = read_switch(PLAN, text)
    assert found == switch
    stop = Stop("test", *found, by="ann", why="", at_ms=0)
    on = Dimensions("qa_agent", "web", ANN, "benchmark", "mistral/ft:a=b")
    other = Dimensions("legal_agent", "app", PLAN.kept_user("bob"), "inference", "mistral/base")
    covers_raw = text == "agent=raw"
    assert stop.covers("test", on) is not covers_raw
    assert stop.covers("test", other) is (text == "")
    assert not stop.covers("production", on)
    if not text.startswith("user"):
        assert str(found) == shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qa_agent", "is none of agent=..., key=..."),
        ("agent=", "is none of"),
        ("=qa_agent", "is none of"),
        ("agnt=qa_agent", 'did you mean "agent"?'),
        ("variant=finetuned", "is none of"),
        ("agent=qa_agnt", 'known: legal_agent, qa_agent, raw; did you mean "qa_agent"?'),
        ("key=app", "known: web"),
        ("model=gpt-4o", "no upstream/model-id"),
        ("model=nobody/gpt-4o", "no upstream/model-id"),
        ("operation=a b", "may hold"),
    ],
)
def test_a_switch_that_would_stop_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        read_switch(PLAN, text)
    assert said in refused.value.message
    assert refused.value.param == "scope"


def test_what_has_left_the_configuration_can_be_resumed_still() -> None:
    assert read_switch(PLAN, "agent=gone", is_known_only=False) == Switch("agent", "gone")
    assert read_switch(PLAN, "user=ann", is_known_only=False) == Switch("user", ANN)
    with pytest.raises(Refused):
        read_switch(PLAN, "agnt=gone", is_known_only=False)
