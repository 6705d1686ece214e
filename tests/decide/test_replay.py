"""What another plan makes of a recorded call: who it goes to, what it costs, why it is refused; and what is assumed."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.assign import BUCKETS
from gateway.decide.recorded import Ending
from gateway.decide.replay import Replayed, Replayer
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage, cost_nusd
from tests.planning import CONFIG, plan_of

FT, BASE, GPT, SMALL = "mistral/ft:qa", "mistral/base", "openai/gpt-4o", "sim/small"
NOON_MS = 1_795_262_400_000
HOUR_MS = 3_600_000
USAGE = Usage(prompt_tokens=600, completion_tokens=400)
# What a call with that usage costs at CONFIG's prices.
FT_NUSD, BASE_NUSD = 800_000, 200_000
SERVER = FaultKind.SERVER


def experiment(percent: float, more: str = "") -> str:
    return f"[ab_testing]\nenabled = true\nrollout_percentage = {percent}\n{more}"


def cap(usd: str, more: str = 'per = "hour"') -> str:
    return f'[[caps]]\nusd = "{usd}"\n{more}\n'


HALF = experiment(50)


def ok(ref: str, cost_nusd: int, tokens: int = 1_000) -> Attempt:
    return Attempt(ref=ref, started_ms=0, status=200, cost_nusd=cost_nusd, tokens=tokens)


def bad(ref: str, fault: FaultKind = SERVER, **fields: Any) -> Attempt:
    return Attempt(ref=ref, started_ms=0, fault=fault, **fields)


def call(*attempts: Attempt, bucket: int | None = 7_000, at_ms: int = NOON_MS, **fields: Any) -> CallRecord:
    """A call of qa_agent's under HALF: the baseline answered, unless other attempts are given."""
    treated = bucket is not None and bucket < 5_000
    answer = ok(FT, FT_NUSD) if treated else ok(BASE, BASE_NUSD)
    made = list(attempts) if attempts or "error" in fields else [answer]
    known = {
        "id": f"req-{at_ms}", "env": "test", "agent": "qa_agent", "agent_from": "model", "user": "u1",
        "variant": "finetuned" if treated else "baseline", "variant_from": "experiment", "share_bps": 5_000,
        "model_sent": made[-1].ref if made else "", "status": 200, "usage": USAGE if "error" not in fields else None,
    }  # fmt: skip
    return CallRecord(at_ms=at_ms, bucket=bucket, attempts=made, **{**known, **fields})


def replay(record: CallRecord, policy: str, *, was: str = HALF, config: str = CONFIG, **how: Any) -> Replayed:
    return Replayer(plan_of(was), plan_of(policy, config=config), **how).replay(record)


def replay_all(records: list[CallRecord], policy: str, *, was: str = HALF) -> list[Replayed]:
    replayer = Replayer(plan_of(was), plan_of(policy))
    return [replayer.replay(record) for record in records]


def refused(why: str, variant: Any = None, **fields: Any) -> Ending:
    return Ending(variant, fields.pop("model", ""), "refused", why, **fields)


# --- The arm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bucket, policy, variant, model",
    [
        (7_000, experiment(70), "baseline", BASE),
        (6_999, experiment(70), "finetuned", FT),
        (4_999, experiment(50), "finetuned", FT),
        (4_999, experiment(49.99), "baseline", BASE),
        (7_000, "", "finetuned", FT),
        (100, "[models]\nuse_finetuned = false", "baseline", BASE),
        (None, experiment(100), "baseline", BASE),
    ],
)
def test_the_recorded_bucket_and_the_new_share_give_the_arm(
    bucket: int | None, policy: str, variant: str, model: str
) -> None:
    after = replay(call(bucket=bucket), policy).after
    assert (after.variant, after.model, after.end) == (variant, model, "answered")


def test_a_user_who_moves_costs_what_the_other_model_would() -> None:
    found = replay(call(), experiment(100))
    assert found.before == Ending("baseline", BASE, "answered", "", BASE_NUSD, 1_000)
    assert found.after == Ending("finetuned", FT, "answered", "", FT_NUSD, 1_000)
    assert found.share_bps == BUCKETS
    assert not found.assumed


def test_a_share_that_is_tried_outright_beats_the_policy_s() -> None:
    assert replay(call(), HALF, share_bps=7_001).after.variant == "finetuned"
    assert replay(call(), HALF, share_bps=7_000).after.variant == "baseline"


def test_the_share_of_a_rollout_is_state_and_stays_where_the_policy_starts_it_alike() -> None:
    moved_on = call(ok(FT, FT_NUSD), bucket=7_000, variant="finetuned", share_bps=7_500, stage=3, experiment=1)
    kept = replay(moved_on, HALF)
    assert kept.before == kept.after
    assert (kept.share_bps, kept.assumed) == (7_500, {"share_kept"})
    assert replay(moved_on, experiment(60)).after.variant == "baseline"
    assert replay(moved_on, HALF, share_bps=7_000).after.variant == "baseline"


def test_another_salt_makes_buckets_unknown_and_the_call_stays_as_it_was() -> None:
    salted = CONFIG.replace("[agents.qa_agent]", '[agents.qa_agent]\nsalt = "new"')
    found = replay(call(), experiment(90), config=salted)
    assert (found.after, found.assumed) == (found.before, {"bucket_unknown"})
    # Where everybody or nobody is treated, no bucket is wanted.
    assert replay(call(), experiment(100), config=salted).after.variant == "finetuned"
    assert replay(call(bucket=100), experiment(0), config=salted).after.variant == "baseline"


@given(
    st.lists(st.none() | st.integers(0, BUCKETS - 1), max_size=30),
    st.integers(0, BUCKETS).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, BUCKETS))),
)
def test_raising_the_share_only_moves_users_from_the_baseline_to_the_fine_tuned_model(
    buckets: list[int | None], shares: tuple[int, int]
) -> None:
    low, high = shares
    replayer = Replayer(plan_of(experiment(low / 100)), plan_of(experiment(high / 100)))
    for bucket in buckets:
        variant = "finetuned" if bucket is not None and bucket < low else "baseline"
        answer = ok(FT, FT_NUSD) if variant == "finetuned" else ok(BASE, BASE_NUSD)
        found = replayer.replay(call(answer, bucket=bucket, variant=variant, share_bps=low))
        is_added = bucket is not None and low <= bucket < high
        moved = ("baseline", "finetuned") if is_added else (variant, variant)
        assert (found.before.variant, found.after.variant) == moved
        assert is_added or found.before == found.after


# --- Who may ---------------------------------------------------------------------------------------------------------

FORCED = experiment(50, "[overrides]\nvariant = true\n")
KEY = f'[[keys]]\nname = "web"\nsha256 = "{"a" * 64}"\n'


@pytest.mark.parametrize(
    "record, policy, expected",
    [
        (call(agent="gone"), HALF, refused("model_not_found")),
        (
            call(agent="gone"),
            experiment(100, '[models]\nunknown_agent = "baseline"\n'),
            Ending("baseline", BASE, "answered", "", BASE_NUSD, 1_000),
        ),
        (call(agent_from="unknown", variant_from="unknown agent"), HALF, refused("model_not_found")),
        (call(agent="raw", agent_from="raw model", model_asked=SMALL), HALF, refused("model_not_found")),
        (call(), HALF + KEY, refused("invalid_api_key")),
        (call(key="web"), HALF + KEY, Ending("baseline", BASE, "answered", "", BASE_NUSD, 1_000)),
        (call(key="web"), HALF + KEY + 'agents = ["legal_agent"]', refused("agent_not_allowed")),
        (call(variant_from="override"), HALF, refused("override_not_allowed")),
        (
            call(ok(FT, FT_NUSD), variant="finetuned", variant_from="override"),
            "[models]\nuse_finetuned = false\n[overrides]\nvariant = true\n",
            refused("override_not_allowed"),
        ),
        # It stays forced, also where the experiment would have moved it.
        (
            call(variant_from="override"),
            FORCED.replace("50", "100"),
            Ending("baseline", BASE, "answered", "", BASE_NUSD, 1_000),
        ),
        # Nobody listens to the headers of a key that is not trusted.
        (
            call(variant_from="override", key="web"),
            FORCED.replace("50", "100") + KEY + "trusted = false",
            Ending("finetuned", FT, "answered", "", FT_NUSD, 1_000),
        ),
    ],
)  # fmt: skip
def test_callers_agents_and_overrides_are_judged_by_the_new_policy(
    record: CallRecord, policy: str, expected: Ending
) -> None:
    assert replay(record, policy).after == expected


def test_a_call_that_was_refused_for_something_of_its_own_stays_refused() -> None:
    found = replay(call(error="invalid_value", status=400, variant=None, bucket=None), experiment(100))
    assert found.before == found.after == refused("invalid_value")


@pytest.mark.parametrize(
    "how", [{"error": "spending_stopped", "status": 403}, {"error": "", "status": 0, "client_left": True}]
)
def test_who_left_and_what_was_stopped_ends_alike_under_any_policy(how: dict[str, Any]) -> None:
    found = replay(call(ok(BASE, 77), **how), experiment(100))
    assert found.after == found.before._replace(variant="finetuned")
    assert found.after.cost_nusd == 77


# --- The model -------------------------------------------------------------------------------------------------------


def test_a_model_that_failed_fails_again_and_costs_what_its_failure_cost() -> None:
    doubt = bad(FT, FaultKind.RESET, cost_nusd=5, tokens=3, is_in_doubt=True)
    record = call(doubt, ok(BASE, BASE_NUSD), bucket=0)
    # Under a policy that has no fallback the call fails.
    found = replay(record, experiment(50, "[models]\nfallback_enabled = false\n"))
    assert found.after == Ending("finetuned", FT, "failed", "reset", 5, 3)
    assert found.assumed == {"failed_again"}
    # One that never asks it does not pay for it.
    assert replay(record, experiment(0)).after == Ending("baseline", BASE, "answered", "", BASE_NUSD, 1_000)


def test_a_model_that_was_passed_over_is_passed_over_again() -> None:
    record = call(ok(BASE, BASE_NUSD), bucket=0, variant="finetuned", is_fallback=True)
    assert replay(record, HALF).after == replay(record, HALF).before
    alone = replay(record, experiment(50, "[models]\nfallback_enabled = false\n")).after
    assert (alone.end, alone.why, alone.cost_nusd) == ("failed", "not available", 0)


def test_a_call_that_failed_is_answered_by_a_model_that_it_could_not_ask() -> None:
    alone = experiment(50, "[models]\nfallback_enabled = false\n")
    failed = call(bad(FT), bucket=0, error="upstream_error", status=502)
    first, second = replay_all([call(), failed], HALF, was=alone)
    assert first.before == first.after
    assert second.before == Ending("finetuned", FT, "failed", "server")
    assert second.after == Ending("finetuned", BASE, "answered", "", BASE_NUSD, 1_000)
    assert second.assumed == {"failed_again", "usage_estimated"}
    assert replay(failed, HALF, was=alone).assumed == {"failed_again", "usage_unknown"}


def test_what_the_caller_must_see_is_not_taken_to_another_model() -> None:
    record = call(bad(FT, FaultKind.FILTERED), bucket=0, error="content_filter", status=400)
    found = replay(record, HALF, was=experiment(50, "[models]\nfallback_enabled = false\n"))
    assert found.after == found.before == Ending("finetuned", FT, "failed", "filtered")


def test_another_price_prices_the_recorded_usage_and_the_same_price_leaves_the_cost() -> None:
    dearer = HALF + '[prices."mistral/base"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "2"\n'
    assert replay(call(), dearer).after.cost_nusd == 600_000 + 800_000
    # Images, say, are in no usage: what was booked stands.
    assert replay(call(ok(BASE, 999_999)), HALF).after.cost_nusd == 999_999


def test_what_nobody_told_the_usage_of_costs_what_it_did_cost() -> None:
    found = replay(call(ok(BASE, 1_234, 56), usage=None, cost_basis="bound"), experiment(100))
    assert found.after == Ending("finetuned", FT, "answered", "", 1_234, 56)
    assert found.assumed == {"cost_kept"}


UNPRICED = CONFIG.replace('finetuned = "mistral/ft:qa"', 'finetuned = "mistral/unheard-of"')


def test_a_model_without_a_price_is_refused_under_a_cap_in_dollars_and_free_without() -> None:
    free = replay(call(), experiment(100), config=UNPRICED)
    assert free.after == Ending("finetuned", "mistral/unheard-of", "answered", "", 0, 1_000)
    assert free.assumed == {"price_unknown"}
    assert replay(call(), experiment(100, cap("1")), config=UNPRICED).after == refused("model_not_priced", "finetuned")


# --- The caps --------------------------------------------------------------------------------------------------------


def test_a_lower_cap_refuses_from_the_call_on_that_it_cannot_pay_until_its_window_ends() -> None:
    records = [call(at_ms=NOON_MS + place * HOUR_MS // 4) for place in range(6)]
    found = replay_all(records, HALF + cap("0.0005"))
    assert [one.after.end for one in found] == ["answered"] * 2 + ["refused"] * 2 + ["answered"] * 2
    assert found[2].after == refused("global 0.0005 usd per hour", "baseline")


def test_the_cap_just_reached_lets_a_call_through() -> None:
    assert [one.after.end for one in replay_all([call()] * 3, HALF + cap("0.0004"))] == ["answered"] * 2 + ["refused"]


def test_calls_before_the_time_count_in_their_windows() -> None:
    replayer = Replayer(plan_of(HALF), plan_of(HALF + cap("0.0004", 'per = "total"')))
    replayer.count(call())
    replayer.count(call())
    assert replayer.replay(call()).after.end == "refused"


def test_a_call_is_one_request_however_many_models_it_takes() -> None:
    doubt = bad(FT, FaultKind.RESET, cost_nusd=5, tokens=3, is_in_doubt=True)
    records = [call(doubt, ok(BASE, BASE_NUSD), bucket=0)] * 3
    found = replay_all(records, HALF + '[[caps]]\nrequests = 2\nper = "day"\n')
    assert [one.after.end for one in found] == ["answered", "answered", "refused"]


CAPPED = HALF + cap("0.0005")
PRICED = "".join(f'[prices."{ref}"]\ninput_usd_per_mtok = "2"\noutput_usd_per_mtok = "2"\n' for ref in (GPT, SMALL))


def short(**fields: Any) -> CallRecord:
    return call(error="budget_exceeded", status=429, **fields)


def test_a_call_that_a_cap_refused_stays_refused_where_no_more_is_left() -> None:
    calls = [call(), call(), short()]
    for policy in (CAPPED, HALF + cap("0.0004")):
        assert replay_all(calls, policy, was=CAPPED)[-1].after.end == "refused"
    last = replay_all(calls, CAPPED, was=CAPPED)[-1]
    assert last.before == last.after == refused("global 0.0005 usd per hour", "baseline")


def test_a_call_that_a_cap_refused_is_answered_where_there_is_enough_and_uses_the_average() -> None:
    other = call(ok(BASE, 100_000, 500), usage=Usage(prompt_tokens=301, completion_tokens=199))
    for policy in (HALF, HALF + cap("0.0006")):
        last = replay_all([call(), other, short()], policy, was=CAPPED)[-1]
        average = Usage(prompt_tokens=451, completion_tokens=300)
        price = plan_of().agents["qa_agent"].baseline[0].price
        assert price is not None
        assert last.after == Ending("baseline", BASE, "answered", "", cost_nusd(price, average), 751)
        assert last.assumed == {"usage_estimated"}
    # More, but not enough.
    assert replay_all([call(), call(), short()], HALF + cap("0.00051"), was=CAPPED)[-1].after.end == "refused"


def test_a_call_without_a_price_is_answered_where_there_is_one() -> None:
    was = plan_of(HALF + cap("1"), config=UNPRICED)
    record = call(error="model_not_priced", status=402, bucket=0)
    same, priced = Replayer(was, was).replay(record), Replayer(was, plan_of(HALF + cap("1"))).replay(record)
    assert same.before == same.after == refused("model_not_priced", "finetuned")
    assert (priced.after.end, priced.after.model) == ("answered", FT)


CHEAPER = cap("0.001", f'per = "hour"\nover_pct = 40\nuse = "{SMALL}"')


def test_from_a_cap_s_share_on_calls_go_to_its_cheaper_model() -> None:
    priced = HALF + f'[prices."{SMALL}"]\ninput_usd_per_mtok = "0"\noutput_usd_per_mtok = "0"\n' + CHEAPER
    models = [one.after.model for one in replay_all([call()] * 4, priced)]
    assert models == [BASE, BASE, SMALL, SMALL]


def test_where_an_account_stands_as_it_stood_the_record_says_whether_it_had_switched() -> None:
    """Calls in flight hold money, so a gateway switches earlier than what is spent tells."""
    plan = plan_of(HALF + CHEAPER + f'[prices."{SMALL}"]\ninput_usd_per_mtok = "0"\noutput_usd_per_mtok = "0"\n')
    early = call(ok(SMALL, 0), switched_by=plan.rules[0].label)
    for record in (early, call()):
        found = Replayer(plan, plan).replay(record)
        assert found.before == found.after


# --- Nothing changes -------------------------------------------------------------------------------------------------


IN_FORCE = plan_of(CAPPED + PRICED)


@st.composite
def histories(draw: st.DrawFn) -> list[CallRecord]:
    """Calls such as the gateway under CAPPED may have recorded; what was answered fits its cap."""
    found = []
    left: dict[int, int] = {}
    for place in range(draw(st.integers(0, 25))):
        at_ms = NOON_MS + place * HOUR_MS // 5
        bucket = draw(st.none() | st.integers(0, BUCKETS - 1))
        treated = bucket is not None and bucket < 5_000
        chain = [FT, BASE, GPT, SMALL] if treated else [BASE, GPT, SMALL]
        reached = draw(st.integers(0, len(chain) - 1))
        tried = [ref for ref in chain[:reached] if draw(st.booleans())]
        faults = st.sampled_from([SERVER, FaultKind.STALL, FaultKind.RATE_LIMITED])
        attempts = [bad(ref, draw(faults)) for ref in tried for _ in range(draw(st.integers(1, 2)))]
        cost = draw(st.integers(0, 300_000))
        room = left.get(at_ms // HOUR_MS, 500_000)
        ref = chain[reached]
        match draw(st.sampled_from(["answer", "short", "fail", "leave"])):
            case "answer" if cost <= room and ref in (FT, BASE):
                left[at_ms // HOUR_MS] = room - cost
                found.append(call(*attempts, ok(ref, cost), bucket=bucket, at_ms=at_ms))
            case "short":
                found.append(call(*attempts, error="budget_exceeded", status=429, bucket=bucket, at_ms=at_ms))
            case "fail" if attempts:
                found.append(call(*attempts, error="upstream_error", status=502, bucket=bucket, at_ms=at_ms))
            case _:
                found.append(call(*attempts, error="", status=0, client_left=True, bucket=bucket, at_ms=at_ms))
    return found


@given(histories())
def test_under_the_plan_that_was_in_force_no_call_ends_otherwise(records: list[CallRecord]) -> None:
    replayer = Replayer(IN_FORCE, IN_FORCE)
    for record in records:
        found = replayer.replay(record)
        assert found.before == found.after, record
        assert found.share_bps == record.share_bps


@given(histories(), st.integers(0, BUCKETS), st.sampled_from(["", cap("0.0003"), cap("0.1")]))
def test_a_cap_holds_in_the_replay_whatever_the_policy(records: list[CallRecord], share_bps: int, more: str) -> None:
    plan = plan_of(experiment(50, more))
    replayer = Replayer(IN_FORCE, plan, share_bps=share_bps)
    spent: dict[int, int] = {}
    for record in records:
        after = replayer.replay(record).after
        hour = record.at_ms // HOUR_MS
        spent[hour] = spent.get(hour, 0) + after.cost_nusd
        assert all(spent[hour] <= rule.limit for rule in plan.rules)
