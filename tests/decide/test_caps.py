"""Which account a call counts in: told by what the cap is about, never by how high it is."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.caps import Rule, format_amount, rules_of, rules_that_apply
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.policy import Cap
from gateway.domain.reading import Usd
from gateway.domain.shadow_policy import SHADOW

ON = Dimensions("qa_agent", "k1", "u1", "inference", "sim/small", "baseline")


def rule(**cap: object) -> Rule:
    (found,) = rules_of([Cap(**({"per": "hour", "usd": Usd(20 * 10**9)} | cap))], "prod")  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("cap", "id", "label"),
    [
        ({}, "prod: global usd hour", "global 20.00 usd per hour"),
        ({"scope": "user"}, "prod: user usd hour", "user 20.00 usd per hour"),
        ({"per": "total"}, "prod: global usd total", "global 20.00 usd in total"),
        ({"per": "total", "timezone": "Asia/Kolkata"}, "prod: global usd total", "global 20.00 usd in total"),
        ({"per": "day", "timezone": "Asia/Kolkata"}, "prod: global usd day Asia/Kolkata",
         "global 20.00 usd per day Asia/Kolkata"),
        ({"usd": None, "requests": 5}, "prod: global requests hour", "global 5 requests per hour"),
        ({"usd": None, "tokens": 5}, "prod: global tokens hour", "global 5 tokens per hour"),
        ({"only": {"operation": ["finetune", "benchmark"], "agent": ["a"]}},
         "prod: global usd hour (agent a; operation benchmark, finetune)",
         "global 20.00 usd per hour (agent a; operation benchmark, finetune)"),
    ],
)  # fmt: skip
def test_a_rule_is_named_by_what_it_counts_and_labelled_with_its_limit(
    cap: dict[str, object], id: str, label: str
) -> None:
    found = rule(**cap)
    assert (found.id, found.label) == (id, label)


def test_what_a_cap_allows_and_how_it_warns_are_no_part_of_its_account() -> None:
    others = (
        {"usd": Usd(1)},
        {"warn_at": (0.1,)},
        {"on_store_failure": "open"},
        {"over_pct": 50.0, "use": "sim/small"},
    )
    assert {rule(**other).id for other in others} == {rule().id}
    assert {rule(only={"agent": agents}).id for agents in (["a", "b"], ["b", "a"], ["a", "b", "a"])} == {
        "prod: global usd hour (agent a, b)"
    }


def test_what_a_cap_is_about_is() -> None:
    different = [
        {}, {"per": "day"}, {"per": "total"}, {"usd": None, "tokens": 1}, {"usd": None, "requests": 1},
        {"scope": "user"}, {"scope": "agent+user"}, {"timezone": "Europe/Paris"}, {"only": {"agent": ["a"]}},
        {"only": {"agent": ["b"]}}, {"only": {"key": ["a"]}},
    ]  # fmt: skip
    assert len({rule(**cap).id for cap in different}) == len(different)


@pytest.mark.parametrize(
    ("only", "applies"),
    [
        ({}, True),
        ({"agent": ["qa_agent"]}, True),
        ({"agent": ["legal_agent"]}, False),
        ({"agent": ["legal_agent", "qa_agent"]}, True),
        ({"agent": ["qa_agent"], "operation": ["benchmark"]}, False),
        ({"agent": ["qa_agent"], "operation": ["inference"]}, True),
        ({"user": [""]}, False),
    ],
)
def test_every_dimension_that_is_named_must_hold(only: dict[str, list[str]], applies: bool) -> None:
    found = rule(only=only)
    assert found.applies(ON) is applies
    assert rules_that_apply([found], ON) == ([found] if applies else [])


@pytest.mark.parametrize(
    ("scope", "account"),
    [
        ("global", "prod: global usd hour"),
        ("agent", "prod: agent usd hour qa_agent"),
        ("key", "prod: key usd hour k1"),
        ("user", "prod: user usd hour u1"),
        ("operation", "prod: operation usd hour inference"),
        ("agent+user", "prod: agent+user usd hour qa_agent u1"),
        ("user+agent", "prod: user+agent usd hour u1 qa_agent"),
    ],
)
def test_an_account_is_named_by_the_values_of_its_scope(scope: str, account: str) -> None:
    assert rule(scope=scope).account(ON) == account


def test_calls_that_say_nothing_of_a_dimension_share_an_account() -> None:
    assert rule(scope="user").account(Dimensions()) == "prod: user usd hour -"
    assert rule(scope="agent+user").account(Dimensions(user="u")) == "prod: agent+user usd hour - u"


@pytest.mark.parametrize(("unit", "amount"), [("usd", 3), ("requests", 1), ("tokens", 7)])
def test_each_unit_reads_its_own_figure(unit: str, amount: int) -> None:
    assert rule(**{"usd": None, unit: 9}).amount(Amounts(3, 1, 7)) == amount


def test_the_full_cap_is_always_told_and_each_share_once() -> None:
    assert rule().warn_at == (0.25, 0.5, 0.83, 1.0)
    assert rule(warn_at=()).warn_at == (1.0,)
    assert rule(warn_at=(1.0, 0.5, 0.5)).warn_at == (0.5, 1.0)


def test_shares_are_of_one_and_stores_are_trusted_or_not() -> None:
    assert (rule().over_share, rule().use, rule().is_closed) == (None, "", True)
    found = rule(over_pct=80.0, use="sim/small", on_store_failure="open")
    assert (found.over_share, found.use, found.is_closed) == (0.8, "sim/small", False)


@pytest.mark.parametrize(
    ("unit", "amount", "text"),
    [
        ("usd", 0, "0.00 usd"),
        ("usd", 1, "0.000000001 usd"),
        ("usd", -5 * 10**8, "-0.50 usd"),
        ("tokens", 7, "7 tokens"),
    ],
)
def test_amounts_as_people_read_them(unit: str, amount: int, text: str) -> None:
    assert format_amount(unit, amount) == text  # type: ignore[arg-type]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CAPS = st.builds(
    Cap,
    scope=st.sampled_from(("global", "user", "agent+model")),
    per=st.sampled_from(("hour", "day", "month", "total")),
    timezone=st.sampled_from(("UTC", "Australia/Lord_Howe")),
    usd=st.builds(Usd, st.integers(1, 2**53 - 1)),
    only=st.dictionaries(st.sampled_from(("agent", "user")), st.lists(NAMES, min_size=1, max_size=3), max_size=2),
)


@given(CAPS)
def test_a_rule_comes_back_from_the_store_as_it_was(cap: Cap) -> None:
    """Every process counts under the rules of all others, as it reads them there."""
    (found,) = rules_of([cap], "prod")
    assert msgspec.json.decode(msgspec.json.encode(found, order="deterministic"), type=Rule) == found


@given(CAPS, st.builds(Dimensions, agent=NAMES, user=NAMES, model=NAMES), st.floats(0, 4e9))
def test_an_account_s_name_begins_with_its_rule_s(cap: Cap, on: Dimensions, now_s: float) -> None:
    (found,) = rules_of([cap], "prod")
    assert found.account(on) == found.id or found.account(on).startswith(f"{found.id} ")
    window = found.window(now_s)
    assert window.start_s <= now_s
    assert window.end_s is None or now_s < window.end_s


NAMED = ["global", "agent", "operation", "agent+user"]


@given(
    scope=st.sampled_from(NAMED),
    only=st.dictionaries(
        st.sampled_from(["agent", "key", "user", "model"]), st.just(["qa_agent", "k1", "u1", "sim/small"]), max_size=2
    ),
    operations=st.none() | st.lists(st.sampled_from(["inference", "benchmark", SHADOW]), min_size=1, unique=True),
)
def test_shadow_calls_count_where_they_are_named_and_nowhere_else(
    scope: str, only: dict[str, list[str]], operations: list[str] | None
) -> None:
    found = rule(scope=scope, only=only | ({} if operations is None else {"operation": operations}))
    is_named = operations is not None and SHADOW in operations
    assert found.applies(ON._replace(operation=SHADOW)) == found.counts_shadows == is_named
    # To all other calls, shadows make no difference.
    assert found.applies(ON) == (operations is None or "inference" in operations)
    assert found.counts_calls == (operations != [SHADOW])
