"""Verdicts: which evidence decides, for a model, an agent and the whole; and when a model is withdrawn."""

import pytest

from gateway.decide.breaker import Admission, Breaker, BreakerLimits, Recent
from gateway.decide.health import (
    MIN_STREAMS,
    AgentHealth,
    Condition,
    Evidence,
    Finding,
    ModelHealth,
    Overall,
    Probe,
    Verdict,
    arms_in_use,
    found,
    judge,
    judge_agent,
    judge_all,
    models_in_use,
    retirement,
    slow_halves,
)
from gateway.domain.model_card import ModelCard
from gateway.domain.policy import Health
from tests.planning import plan_of

LIMITS = Health()
NOW_S = 1_000.0
HERE = Probe(NOW_S - 3, 12.0, Finding.HERE, "the provider knows it", ModelCard("m"))
FAILED = Probe(NOW_S - 3, 12.0, Finding.FAILED, "the provider answers 503")
UNTOLD = Probe(NOW_S - 3, 12.0, Finding.UNTOLD, "the provider does not tell of it")


def recent(calls: int, failures: int = 0, *, ago_s: float = 1.0, failed: bool = False, shut: bool = False) -> Recent:
    return Recent(calls, failures, NOW_S - ago_s, failed, shut)


# --- One model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [HERE, FAILED, UNTOLD, None])
def test_recent_calls_decide_whatever_the_provider_says(probe: Probe | None) -> None:
    well = judge(recent(4, 1), None, probe, LIMITS, NOW_S)
    assert (well.verdict, well.evidence, well.age_s) == (Verdict.OK, Evidence.CALLS, 1.0)
    assert well.reason == "3 of 4 calls in 60 s succeeded"
    unwell = judge(recent(1, 1, failed=True), None, probe, LIMITS, NOW_S)
    assert (unwell.verdict, unwell.reason) == (Verdict.ERROR, "1 of 1 call in 60 s failed")


def test_a_half_that_failed_is_an_error_and_less_is_not() -> None:
    assert judge(recent(4, 2), None, HERE, LIMITS, NOW_S).verdict is Verdict.ERROR
    assert judge(recent(5, 2), None, HERE, LIMITS, NOW_S).verdict is Verdict.OK


def test_a_breaker_that_is_shut_is_an_error_though_its_failures_are_old() -> None:
    shut = judge(recent(0, ago_s=90, failed=True, shut=True), None, HERE, LIMITS, NOW_S)
    assert (shut.verdict, shut.evidence, shut.age_s) == (Verdict.ERROR, Evidence.CALLS, 90.0)


def test_a_breaker_that_has_cooled_down_leaves_it_to_the_provider() -> None:
    limits = BreakerLimits(consecutive=1, share=1, min_calls=1, window_s=30, open_s=5, max_open_s=30)
    breaker = Breaker(limits)
    assert breaker.recent(0.0, 60) is None
    breaker.failed(Admission.ORDINARY, NOW_S - 100)
    shut, cooled = breaker.recent(NOW_S - 99, 60), breaker.recent(NOW_S, 60)
    assert shut == Recent(1, 1, NOW_S - 100, True, True)
    assert cooled == Recent(0, 0, NOW_S - 100, True, False)
    assert judge(cooled, None, HERE, LIMITS, NOW_S).evidence is Evidence.PROBE


def test_the_provider_decides_where_no_call_is_recent() -> None:
    old = recent(0, ago_s=500, failed=True)
    assert judge(old, None, HERE, LIMITS, NOW_S) == ModelHealth(Verdict.OK, HERE.said, Evidence.PROBE, 3.0)
    assert judge(None, None, FAILED, LIMITS, NOW_S) == ModelHealth(Verdict.ERROR, FAILED.said, Evidence.PROBE, 3.0)


def test_a_provider_that_takes_its_time_or_limits_us_is_slow() -> None:
    assert judge(None, None, HERE._replace(latency_ms=2_000.0), LIMITS, NOW_S).verdict is Verdict.SLOW
    assert judge(None, None, HERE._replace(latency_ms=1_999.0), LIMITS, NOW_S).verdict is Verdict.OK
    assert judge(None, None, FAILED._replace(finding=Finding.LIMITED), LIMITS, NOW_S).verdict is Verdict.SLOW


def test_streams_that_begin_late_are_slow_but_failures_weigh_more() -> None:
    assert judge(recent(9), 5_000.0, HERE, LIMITS, NOW_S).verdict is Verdict.SLOW
    assert judge(recent(9), 2_500.0, HERE, LIMITS, NOW_S).verdict is Verdict.OK
    assert judge(recent(9, 9), 5_000.0, HERE, LIMITS, NOW_S).verdict is Verdict.ERROR
    # Without recent calls it is a memory of other times.
    assert judge(None, 5_000.0, HERE, LIMITS, NOW_S).verdict is Verdict.OK


def test_where_the_provider_tells_nothing_the_last_call_decides_however_old() -> None:
    well = judge(recent(0, ago_s=5_000), None, UNTOLD, LIMITS, NOW_S)
    assert (well.verdict, well.evidence, well.age_s) == (Verdict.OK, Evidence.CALLS, 5_000.0)
    assert judge(recent(0, ago_s=5_000, failed=True), None, UNTOLD, LIMITS, NOW_S).verdict is Verdict.ERROR


def test_where_nobody_can_tell_it_is_an_error_that_says_so() -> None:
    # A wrong base_url looks the same.
    assert judge(None, None, UNTOLD, LIMITS, NOW_S).verdict is Verdict.ERROR
    nothing = judge(None, None, None, LIMITS, NOW_S)
    assert (nothing.verdict, nothing.age_s) == (Verdict.ERROR, None)
    assert "not been asked" in nothing.reason


# --- What an answer means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "was_there", "finding"),
    [
        (404, False, Finding.UNTOLD),
        (404, True, Finding.GONE),
        (405, False, Finding.UNTOLD),
        (501, False, Finding.UNTOLD),
        (200, False, Finding.UNTOLD),
        (429, True, Finding.LIMITED),
        (401, True, Finding.FAILED),
        (403, True, Finding.FAILED),
        (500, True, Finding.FAILED),
        (301, True, Finding.FAILED),
    ],
)
def test_an_answer_without_a_card(status: int, was_there: bool, finding: Finding) -> None:
    assert found(status, None, was_there=was_there)[0] is finding


def test_a_card_tells_whether_the_model_can_still_be_used() -> None:
    assert found(200, ModelCard("m"), was_there=False)[0] is Finding.HERE
    assert found(404, ModelCard("m"), was_there=False)[0] is Finding.HERE
    archived = found(200, ModelCard("m", is_archived=True), was_there=True)
    assert archived[0] is Finding.ARCHIVED
    assert judge(None, None, Probe(NOW_S, 1.0, *archived), LIMITS, NOW_S).verdict is Verdict.ERROR


def test_when_a_model_is_withdrawn() -> None:
    announced = HERE._replace(card=ModelCard("m", retires_s=5_000.0))
    assert retirement(HERE, None, 100.0) is None
    assert retirement(announced, None, 100.0) == 5_000.0
    # The provider has changed its mind.
    assert retirement(HERE, 5_000.0, 100.0) is None
    # A look that failed does not make it forgotten.
    assert retirement(FAILED, 5_000.0, 100.0) == 5_000.0
    gone = FAILED._replace(finding=Finding.GONE)
    assert retirement(gone, 5_000.0, 100.0) == 100.0
    # It stays withdrawn since it was found so.
    assert retirement(gone, 100.0, 900.0) == 100.0


# --- Agents and the whole --------------------------------------------------------------------------------------------


def models(**verdicts: str) -> dict[str, ModelHealth]:
    refs = {"ft": "mistral/ft:qa", "base": "mistral/base", "gpt": "openai/gpt-4o", "small": "sim/small"}
    return {
        refs[name]: ModelHealth(Verdict(verdict), "because", Evidence.CALLS, 1.0) for name, verdict in verdicts.items()
    }


@pytest.mark.parametrize(
    ("base", "gpt", "small", "condition"),
    [
        ("OK", "ERROR", "ERROR", Condition.OK),
        ("SLOW", "OK", "OK", Condition.SLOW),
        ("ERROR", "ERROR", "SLOW", Condition.DEGRADED),
        ("ERROR", "ERROR", "ERROR", Condition.ERROR),
    ],
)
def test_the_first_model_decides_and_a_fallback_makes_it_degraded(
    base: str, gpt: str, small: str, condition: Condition
) -> None:
    plan = plan_of("[models]\nuse_finetuned = false")
    chains = arms_in_use(plan, plan.agents["qa_agent"])
    assert judge_agent(chains, models(base=base, gpt=gpt, small=small)).condition is condition


def test_a_degraded_agent_says_who_stands_in() -> None:
    plan = plan_of("[models]\nuse_finetuned = false")
    chains = arms_in_use(plan, plan.agents["qa_agent"])
    reason = judge_agent(chains, models(base="ERROR", gpt="ERROR", small="OK")).reason
    assert reason == "mistral/base: because; sim/small stands in"


def test_without_fallbacks_there_is_nobody_to_stand_in() -> None:
    plan = plan_of("[models]\nuse_finetuned = false\nfallback_enabled = false")
    chains = arms_in_use(plan, plan.agents["qa_agent"])
    assert judge_agent(chains, models(base="ERROR")).condition is Condition.ERROR


def test_in_an_experiment_an_agent_is_as_the_worse_of_its_arms() -> None:
    plan = plan_of("[ab_testing]\nenabled = true\nrollout_percentage = 10")
    chains = arms_in_use(plan, plan.agents["qa_agent"])
    assert [chain[0].ref for chain in chains] == ["mistral/ft:qa", "mistral/base"]
    verdicts = models(ft="ERROR", base="OK", gpt="OK", small="OK")
    assert judge_agent(chains, verdicts).condition is Condition.DEGRADED


@pytest.mark.parametrize(
    ("policy", "refs"),
    [
        ("[models]\nuse_finetuned = false", {"mistral/base", "openai/gpt-4o", "sim/small"}),
        ("[models]\nfallback_enabled = false", {"mistral/ft:qa", "mistral/ft:legal"}),
        (
            "[ab_testing]\nenabled = true\nrollout_percentage = 0\n[models]\nfallback_enabled = false",
            {"mistral/base"},
        ),
    ],
)
def test_each_model_in_use_is_named_once_and_no_other(policy: str, refs: set[str]) -> None:
    assert set(models_in_use(plan_of(policy))) == refs


@pytest.mark.parametrize(
    ("conditions", "overall"),
    [
        ("ok ok", Overall.HEALTHY),
        ("ok slow", Overall.DEGRADED),
        ("ok degraded", Overall.DEGRADED),
        ("degraded error ok", Overall.ERROR),
    ],
)
def test_the_whole_is_as_its_worst_agent(conditions: str, overall: Overall) -> None:
    assert judge_all(AgentHealth(Condition(one), "") for one in conditions.split()) is overall


# --- How late streams begin ------------------------------------------------------------------------------------------

EDGES_MS = (100.0, 1_000.0, 5_000.0)


def cell(
    *streams: int, fallbacks: int = 0, agent: str = "qa"
) -> dict[tuple[str, str, str], tuple[int, tuple[int, ...]]]:
    return {(agent, "m", "baseline"): (fallbacks, streams)}


def test_half_of_the_streams_since_the_mark_began_no_sooner() -> None:
    assert slow_halves(cell(50, 0, 0, 0), cell(50, 1, 0, 9), EDGES_MS) == {"m": 5_000.0}
    assert slow_halves(cell(0, 0, 0, 9), cell(3, 3, 0, 10), EDGES_MS) == {"m": 100.0}
    assert slow_halves({}, cell(MIN_STREAMS, 0, 0, 0), EDGES_MS) == {"m": 0.0}


def test_agents_that_share_a_model_count_together() -> None:
    now = {**cell(0, 0, 3, 0), **cell(0, 0, 2, 0, agent="law")}
    assert slow_halves({}, now, EDGES_MS) == {"m": 1_000.0}


def test_too_few_streams_tell_nothing() -> None:
    assert slow_halves({}, cell(0, 0, 0, MIN_STREAMS - 1), EDGES_MS) == {}
    assert slow_halves(cell(9, 9, 9, 9), cell(9, 9, 9, 9), EDGES_MS) == {}


def test_what_a_fallback_waited_for_is_not_its_own_slowness() -> None:
    assert slow_halves({}, cell(0, 0, 0, 50, fallbacks=1), EDGES_MS) == {}
