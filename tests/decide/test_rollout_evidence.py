"""What the evidence says: without all of it the answer is never to proceed, and each reason has its figures."""

from typing import Any

import msgspec
import pytest

from gateway.decide.compare import evidence_of
from gateway.decide.rollout_evidence import Look, Opinion, asides, judge, summary
from gateway.decide.rollout_plan import RolloutPlan
from gateway.domain.experiment import Arrivals, UserSums, bucket_of_ms
from gateway.domain.rollout import Phase
from tests.rolling import AUTOMATIC, HOUR_MS, NOW_MS, PLAN, Found, begun, look_of, plan_of

LATER_MS = NOW_MS + HOUR_MS
STATE = begun()
WORSE_TOO = plan_of(AUTOMATIC + 'rollback_on = "worse"')
BREACHED = Found("breached", "worse")
WORSE = Found("undecided", "worse")


def opinion(look: Look | None, plan: RolloutPlan = PLAN, now_ms: int = LATER_MS) -> tuple[Opinion, str]:
    found = judge(STATE, look, now_ms=now_ms, plan=plan)
    return found.opinion, "\n".join(found.reasons)


@pytest.mark.parametrize(
    ("asked", "wanted", "said"),
    [
        ({}, Opinion.PROCEED, "2 guardrails hold, in 100 and 100 users at this stage, and it has baked"),
        ({"users": (99, 100)}, Opinion.WAIT, "99 users with the fine-tuned model"),
        ({"users": (100, 99)}, Opinion.WAIT, "99 with the baseline were seen at 10 %; 100 of each are wanted"),
        ({"p95_latency": Found("undecided")}, Opinion.WAIT, "p95 latency 880 ms against 800 ms, +10 % (-10 to +30; "),
        ({"p95_latency": Found("too few", "too few")}, Opinion.WAIT, "too few yet for the guardrail of 20 % more"),
        ({"p95_latency": Found("none")}, Opinion.WAIT, "too few yet for the guardrail"),
        ({"is_mismatch": True}, Opinion.HOLD, "8.00 % of them were in the treated arm where 10.00 % belong"),
        ({"success_rate": WORSE}, Opinion.HOLD, "success rate"),
        ({"success_rate": Found("too few", "worse")}, Opinion.HOLD, "success rate"),
        ({"success_rate": Found("holds", "worse")}, Opinion.PROCEED, "within the guardrail of 2 points less"),
        ({"success_rate": Found("holds", "better")}, Opinion.PROCEED, "within the guardrail"),
        ({"success_rate": Found("undecided", "better")}, Opinion.WAIT, "not yet known to be within"),
        # A model that certainly costs more, and most likely no more than it may.
        ({"success_rate": Found("undecided", "worse", is_slight=True)}, Opinion.WAIT, "not yet known to be within"),
        ({"success_rate": BREACHED}, Opinion.ROLL_BACK, "past the guardrail of 2 points less"),
        ({"success_rate": BREACHED, "users": (1, 1)}, Opinion.ROLL_BACK, "past the guardrail"),
        ({"success_rate": BREACHED, "is_mismatch": True}, Opinion.ROLL_BACK, "the arms do not have the users"),
        ({"success_rate": BREACHED, "p95_latency": WORSE}, Opinion.ROLL_BACK, "p95 latency"),
        ({"cost_per_request": Found("none", "worse")}, Opinion.PROCEED, "2 guardrails hold"),
    ],
    ids=str,
)
def test_each_condition_decides(asked: dict[str, Any], wanted: Opinion, said: str) -> None:
    found, reasons = opinion(look_of(STATE, **asked))
    assert found is wanted
    assert said in reasons


def test_what_is_worse_is_taken_back_where_the_policy_says_so() -> None:
    assert opinion(look_of(STATE, success_rate=WORSE), WORSE_TOO)[0] is Opinion.ROLL_BACK
    assert opinion(look_of(STATE, success_rate=Found("holds", "worse")), WORSE_TOO)[0] is Opinion.PROCEED


@pytest.mark.parametrize(
    ("lasted_ms", "wanted"), [(0, Opinion.WAIT), (HOUR_MS - 1, Opinion.WAIT), (HOUR_MS, Opinion.PROCEED)]
)
def test_a_stage_bakes_to_its_end(lasted_ms: int, wanted: Opinion) -> None:
    now_ms = NOW_MS + lasted_ms
    assert opinion(look_of(STATE, now_ms), now_ms=now_ms)[0] is wanted


def test_how_long_it_has_baked_is_told_also_by_a_clock_that_went_back() -> None:
    assert "for 30 min of the 1 h" in opinion(look_of(STATE), now_ms=NOW_MS + HOUR_MS // 2)[1]
    assert "for 0 s of the 1 h" in opinion(look_of(STATE), now_ms=NOW_MS - 1)[1]


def test_no_evidence_is_no_reason_to_go_on() -> None:
    found, reasons = opinion(None)
    assert found is Opinion.NO_DATA
    assert "without it no share is raised" in reasons


@pytest.mark.parametrize("asked", [{}, {"success_rate": BREACHED}], ids=str)
def test_evidence_that_is_too_old_counts_as_none(asked: dict[str, Any]) -> None:
    look = look_of(STATE, LATER_MS, **asked)
    assert opinion(look, now_ms=LATER_MS + 120_000)[0] is not Opinion.NO_DATA
    found, reasons = opinion(look, now_ms=LATER_MS + 120_001)
    assert found is Opinion.NO_DATA
    assert "2 min old, though it is gathered every 30 s" in reasons


def test_evidence_of_another_experiment_counts_as_none() -> None:
    found, reasons = opinion(look_of(STATE)._replace(experiment=2))
    assert found is Opinion.NO_DATA
    assert "experiment 2, this is experiment 1" in reasons


def test_evidence_from_before_the_present_share_can_stop_it_but_not_raise_it() -> None:
    look = look_of(STATE)._replace(stage=STATE.stage - 1)
    assert opinion(look) == (Opinion.WAIT, "the evidence is from before the share became 10 %")
    breached = look_of(STATE, success_rate=BREACHED)._replace(stage=STATE.stage - 1)
    assert opinion(breached)[0] is Opinion.ROLL_BACK


@pytest.mark.parametrize("found", [Found("holds"), BREACHED], ids=str)
def test_a_verdict_by_another_margin_says_nothing_of_this_one(found: Found) -> None:
    look = look_of(STATE, plan=plan_of(AUTOMATIC.replace("0.02", "0.03")), success_rate=found)
    assert opinion(look) == (
        Opinion.WAIT, "success_rate has a guardrail, and the evidence does not speak of it"
    )  # fmt: skip


@pytest.mark.parametrize("asked", [None, {"users": (0, 900)}, {"success_rate": Found("too few", "too few")}], ids=str)
def test_at_the_baseline_nothing_is_waited_for_but_a_person(asked: dict[str, Any] | None) -> None:
    nobody = plan_of(start=0)
    state = begun(nobody)
    look = None if asked is None else look_of(state, NOW_MS, plan=nobody, **asked)
    for plan, now_ms in ((nobody, NOW_MS), (nobody, LATER_MS), (plan_of("stages = [5, 100]", start=0), NOW_MS)):
        found = judge(state, look, now_ms=now_ms, plan=plan)
        first = 5 if plan is not nobody else 10
        assert found.reasons == (
            f"at 0 % nobody has the fine-tuned model, so no evidence will come; "
            f"`gateway rollout advance` begins at {first} %",
        )
        assert (found.opinion, found.opinion.recommendation) == (Opinion.WAIT, "hold")


def test_at_the_baseline_what_was_seen_before_speaks_against_it_still() -> None:
    emptied = msgspec.structs.replace(STATE, phase=Phase.BASELINE, share_bps=0)
    for asked, wanted in (({"success_rate": BREACHED}, Opinion.ROLL_BACK), ({"is_mismatch": True}, Opinion.HOLD)):
        assert judge(emptied, look_of(emptied, **asked), now_ms=LATER_MS, plan=PLAN).opinion is wanted


def test_at_all_users_without_a_holdback_only_time_can_tell() -> None:
    everyone = plan_of(AUTOMATIC.replace("holdback_percent = 5", ""), start=100)
    state = begun(everyone)
    for look in (None, look_of(state, plan=everyone, users=(100, 0))):
        baking = judge(state, look, now_ms=LATER_MS - 1, plan=everyone)
        assert (baking.opinion, len(baking.reasons)) == (Opinion.WAIT, 2)
        baked = judge(state, look, now_ms=LATER_MS, plan=everyone)
        assert baked.opinion is Opinion.PROCEED
        assert "rollout.holdback_percent would keep one" in baked.reasons[-1]
    breached = look_of(state, plan=everyone, success_rate=BREACHED)
    assert judge(state, breached, now_ms=LATER_MS, plan=everyone).opinion is Opinion.ROLL_BACK


def test_what_is_worse_without_a_guardrail_is_told_and_decides_nothing() -> None:
    look = look_of(STATE, cost_per_request=Found("none", "worse"), success_rate=Found("holds", "worse"))
    assert len(asides(look, PLAN)) == 1
    assert asides(look, PLAN)[0].startswith("cost per request 0.00026 usd against 0.0002 usd, +30 %")
    assert asides(None, PLAN) == ()


def test_without_a_guardrail_nothing_says_what_is_good_enough() -> None:
    unguarded = plan_of("")
    look = look_of(STATE, NOW_MS + 24 * HOUR_MS, plan=unguarded, users=(200, 200))
    found, reasons = opinion(look, unguarded, NOW_MS + 24 * HOUR_MS)
    assert (found, found.recommendation) == (Opinion.WAIT, "hold")
    assert reasons == "no guardrail is set, so nothing says what would be good enough: rollout.guardrails"
    one = plan_of(AUTOMATIC.replace("success_rate = 0.02, ", ""))
    assert opinion(look_of(STATE, plan=one), one)[1].endswith(
        "its guardrail holds, in 100 and 100 users at this stage, and it has baked"
    )


@pytest.mark.parametrize(
    ("treated_fails_every", "wanted"), [(20, Opinion.PROCEED), (4, Opinion.ROLL_BACK)], ids=["equal", "worse"]
)
def test_the_comparison_s_own_verdicts_are_understood(treated_fails_every: int, wanted: Opinion) -> None:
    fails_every = {True: treated_fails_every, False: 20}
    rows = [
        UserSums(
            user=f"{arm}-{number}", stage=STATE.stratum, is_treated=arm, calls=10,
            successes=10 - (number % fails_every[arm] == 0) * 10, latency_ms=8_000.0, cost_nusd=2_000,
            latencies={bucket_of_ms(700.0): 5, bucket_of_ms(900.0): 5},
        )
        for arm in (True, False)
        for number in range(20_000)
    ]  # fmt: skip
    evidence = evidence_of(rows, [Arrivals(STATE.stratum, 0.5, 20_000, 20_000)], PLAN.terms)
    look = Look(evidence, LATER_MS, STATE.experiment, STATE.stage, 20_000, 20_000)
    found, reasons = opinion(look)
    assert found is wanted, reasons
    assert "success rate" in reasons


def test_the_summary_has_every_metric_and_whether_users_arrive_as_assigned() -> None:
    said = summary(look_of(STATE))
    assert said.count("guardrail: ") == 5
    assert "at 2026-11-21T01:00:00Z, experiment 1, stage 1; users at this stage: 100 and 100" in said
    assert said.endswith("users arrive as assigned")
    assert summary(look_of(STATE, is_mismatch=True)).endswith("experiments)")
    assert summary(None) == ""


@pytest.mark.parametrize("said", Opinion)
def test_reports_know_three_words(said: Opinion) -> None:
    assert said.recommendation in ("proceed", "hold", "roll back")
    assert said.is_objection is (said in (Opinion.HOLD, Opinion.ROLL_BACK))


def test_what_is_worse_by_its_likeliest_value_past_the_margin_holds_and_what_is_within_it_waits() -> None:
    for metric in ("success_rate", "p95_latency"):
        past = look_of(STATE, **{metric: WORSE})
        within = look_of(STATE, **{metric: WORSE._replace(is_slight=True)})
        assert (opinion(past)[0], opinion(within)[0]) == (Opinion.HOLD, Opinion.WAIT)
        assert opinion(within, WORSE_TOO)[0] is Opinion.ROLL_BACK


def test_a_mismatch_that_was_found_stays_found_for_as_long_as_its_experiment() -> None:
    found = msgspec.structs.replace(STATE, has_mismatch=True)
    judged = judge(found, look_of(found), now_ms=LATER_MS, plan=PLAN)
    assert judged.opinion is Opinion.HOLD
    assert "stays for the whole of an experiment" in judged.reasons[0]
