"""The table a load compiles: which models each arm may use, under each environment, at which price."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.assign import bucket_of
from gateway.decide.plan import MAX_TOKENS_IF_UNSET, RAW_AGENT, Assignment, Plan, upstreams_in_use
from gateway.decide.rollout import begin
from gateway.decide.rollout_plan import rollout_plan
from gateway.domain.errors import Refused
from gateway.domain.money import Price
from gateway.domain.policy import Policy
from gateway.domain.rollout import RolloutState
from gateway.domain.settings import Settings
from tests.planning import CONFIG, plan_of, read, shipped, shipped_plan

EXPERIMENT = "[ab_testing]\nenabled = true\nrollout_percentage = "
USERS = [f"user-{number}" for number in range(2_000)]


def refs(assignment: Assignment) -> list[str]:
    return [target.ref for target in assignment.chain]


def assigned(plan: Plan, user: str = "u1", agent: str = "qa_agent", **how: object) -> Assignment:
    return plan.assign(plan.agents[agent], user, **how)  # type: ignore[arg-type]


# --- The shipped environments ----------------------------------------------------------------------------------------


def test_dev_serves_the_baseline_to_everyone_from_the_simulator() -> None:
    plan = shipped_plan("dev")
    assert len(plan.agents) == 5
    for agent in plan.agents.values():
        for user in ["", *USERS[:50]]:
            assignment = plan.assign(agent, user)
            assert (assignment.variant, assignment.variant_from) == ("baseline", "policy")
            assert refs(assignment) == ["mistral/open-mistral-7b", "mistral/mistral-small-latest"]
            assert {(target.upstream, target.kind) for target in assignment.chain} == {("simulator", "simulator")}


def test_staging_serves_the_finetuned_model_to_everyone() -> None:
    plan = shipped_plan("staging")
    for agent in plan.agents.values():
        for user in ["", *USERS[:50]]:
            assignment = plan.assign(agent, user)
            assert (assignment.variant, assignment.variant_from) == ("finetuned", "policy")
            assert assignment.chain[0].ref.startswith("mistral/ft:open-mistral-7b:")
            assert refs(assignment)[1:] == ["mistral/open-mistral-7b", "mistral/mistral-small-latest"]


def test_production_serves_it_to_a_tenth_of_the_users_and_to_nobody_without_a_name() -> None:
    plan = shipped_plan("production")
    for agent in plan.agents.values():
        assert agent.share_bps == 1_000
        nobody = plan.assign(agent, "")
        assert (nobody.variant, nobody.variant_from, nobody.bucket) == ("baseline", "no user", None)
        arms = [plan.assign(agent, user) for user in USERS]
        assert {arm.variant_from for arm in arms} == {"experiment"}
        treated = [arm for arm in arms if arm.variant == "finetuned"]
        assert 150 < len(treated) < 250
        assert all(arm.bucket is not None and arm.bucket < 1_000 for arm in treated)
        assert all(arm.bucket is not None and arm.bucket >= 1_000 for arm in arms if arm.variant == "baseline")


def test_the_shipped_models_have_prices_where_the_project_names_them() -> None:
    plan = shipped_plan("production")
    for agent in plan.agents.values():
        finetuned, baseline = agent.finetuned[:2]
        assert finetuned.price is not None
        assert baseline.price is not None
        assert (finetuned.price.input_nusd_per_mtok, baseline.price.output_nusd_per_mtok) == (8 * 10**8, 2 * 10**8)


# --- Chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "variant", "allow_fallback", "chain"),
    [
        ("", "finetuned", True, ["mistral/ft:qa", "mistral/base", "openai/gpt-4o", "sim/small"]),
        ("", "baseline", True, ["mistral/base", "openai/gpt-4o", "sim/small"]),
        ("", "finetuned", False, ["mistral/ft:qa"]),
        ("", "baseline", False, ["mistral/base"]),
        ("models.fallback_enabled = false", "finetuned", True, ["mistral/ft:qa"]),
        ("models.fallback_enabled = false", "baseline", True, ["mistral/base"]),
    ],
)
def test_chains_with_and_without_fallback(policy: str, variant: str, allow_fallback: bool, chain: list[str]) -> None:
    assignment = assigned(plan_of(policy), variant=variant, allow_fallback=allow_fallback)
    assert refs(assignment) == chain


def test_an_agent_without_further_models_falls_back_on_the_baseline_only() -> None:
    plan = plan_of()
    assert refs(assigned(plan, agent="legal_agent")) == ["mistral/ft:legal", "mistral/base"]
    assert refs(assigned(plan, agent="legal_agent", variant="baseline")) == ["mistral/base"]


def test_a_redirect_keeps_names_and_prices() -> None:
    straight, redirected = plan_of(), plan_of('models.upstream = "sim"')
    for ours, theirs in zip(
        straight.agents["qa_agent"].finetuned, redirected.agents["qa_agent"].finetuned, strict=True
    ):
        assert (theirs.ref, theirs.model, theirs.price) == (ours.ref, ours.model, ours.price)
        assert (theirs.upstream, theirs.kind) == ("sim", "simulator")


def test_litellm_s_map_prices_what_the_files_do_not() -> None:
    known = Price(input_nusd_per_mtok=1, output_nusd_per_mtok=2, source="litellm")
    plan = plan_of(litellm_map={"gpt-4o": known})
    by_ref = {target.ref: target.price for target in plan.agents["qa_agent"].finetuned}
    assert by_ref["openai/gpt-4o"] == known
    assert by_ref["sim/small"] is None


def test_an_agent_s_own_price_holds_for_its_own_two_models_only() -> None:
    own = """
    [agents.qa_agent.prices.baseline]
    input_usd_per_mtok = "9"
    output_usd_per_mtok = "9"
    """
    plan = plan_of(config=CONFIG + own)
    prices = {name: agent.baseline[0].price for name, agent in plan.agents.items()}
    assert {name: price and price.input_nusd_per_mtok for name, price in prices.items()} == {
        "qa_agent": 9 * 10**9,
        "legal_agent": 2 * 10**8,
    }


# --- Arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "share_bps"), [("10", 1_000), ("0", 0), ("100", 10_000), ("0.01", 1), ("33.33", 3_333), ("12.5", 1_250)]
)
def test_a_share_in_percent_becomes_hundredths_of_it(percent: str, share_bps: int) -> None:
    assert plan_of(EXPERIMENT + percent).agents["qa_agent"].share_bps == share_bps


def test_the_salt_is_the_agent_s_name_where_none_is_set() -> None:
    plan = plan_of(EXPERIMENT + "50")
    assert [agent.salt for agent in plan.agents.values()] == ["qa_agent", "legal-2"]
    assert assigned(plan, "u1").bucket == bucket_of("qa_agent", "u1") == 129
    assert assigned(plan, "u1", "legal_agent").bucket == bucket_of("legal-2", "u1")


@given(st.floats(0, 100), st.floats(0, 100), st.integers(0, 500))
def test_raising_the_percentage_never_moves_a_user_back(one: float, other: float, number: int) -> None:
    low, high = sorted((one, other))
    before = assigned(plan_of(f"{EXPERIMENT}{low:.4f}"), f"user-{number}")
    after = assigned(plan_of(f"{EXPERIMENT}{high:.4f}"), f"user-{number}")
    assert (before.variant, after.variant) != ("finetuned", "baseline")


@pytest.mark.parametrize("variant", ["finetuned", "baseline"])
def test_a_forced_variant_wins_over_the_experiment_and_says_so(variant: str) -> None:
    plan = plan_of(EXPERIMENT + "50")
    for user in ("", "u1", "u2"):
        assignment = assigned(plan, user, variant=variant)
        assert (assignment.variant, assignment.variant_from) == (variant, "override")


def test_a_finetuned_model_cannot_be_forced_where_the_policy_serves_none() -> None:
    plan = plan_of("models.use_finetuned = false")
    with pytest.raises(Refused) as caught:
        assigned(plan, variant="finetuned")
    assert (caught.value.code, caught.value.status) == ("override_not_allowed", 403)
    assert assigned(plan, variant="baseline").variant == "baseline"


# --- Raw models ------------------------------------------------------------------------------------------------------


def test_a_model_named_outright_passes_only_where_the_policy_lets_it() -> None:
    assert plan_of().raw_agent("openai/gpt-4o") is None
    plan = plan_of("models.allow_raw_models = true")
    agent = plan.raw_agent("openai/org/gpt-4o")
    assert agent is not None
    assert (agent.name, agent.share_bps) == (RAW_AGENT, 0)
    for user in ("", *USERS[:20]):
        assignment = plan.assign(agent, user)
        assert (assignment.variant, refs(assignment)) == ("baseline", ["openai/org/gpt-4o"])
        assert assignment.chain[0].model == "org/gpt-4o"


@pytest.mark.parametrize("ref", ["gpt-4o", "nowhere/gpt-4o", "openai/", "", "/gpt-4o", "OpenAI/gpt-4o"])
def test_what_names_no_model_of_an_upstream_is_no_raw_model(ref: str) -> None:
    assert plan_of("models.allow_raw_models = true").raw_agent(ref) is None


def test_a_raw_model_is_priced_like_any_other_and_bounded() -> None:
    agent = plan_of("models.allow_raw_models = true").raw_agent("mistral/base")
    assert agent is not None
    assert agent.baseline[0].price is not None
    assert {name: bytes(value) for name, value in agent.defaults.items()} == {"max_tokens": b"4096"}


# --- Defaults and upstreams ------------------------------------------------------------------------------------------


def test_every_agent_has_a_limit_on_its_tokens() -> None:
    agents = plan_of().agents
    assert {name: bytes(value) for name, value in agents["qa_agent"].defaults.items()} == {
        "temperature": b"0.7",
        "max_tokens": b"4096",
    }
    assert bytes(agents["legal_agent"].defaults["max_tokens"]) == str(MAX_TOKENS_IF_UNSET).encode()


@pytest.mark.parametrize(
    ("policy", "used"),
    [
        ("", {"mistral", "openai", "sim"}),
        ("models.fallback_enabled = false", {"mistral"}),
        ("models.use_finetuned = false\nmodels.fallback_enabled = false", {"mistral"}),
        ('models.upstream = "sim"', {"sim"}),
        ('models.upstream = "sim"\nmodels.allow_raw_models = true', {"sim"}),
        ("models.fallback_enabled = false\nmodels.allow_raw_models = true", {"mistral", "openai", "sim"}),
    ],
)
def test_only_upstreams_that_some_call_may_reach_need_their_secrets(policy: str, used: set[str]) -> None:
    settings, allowed = read(Settings, CONFIG), read(Policy, policy)
    assert upstreams_in_use(settings, allowed) == used


@pytest.mark.parametrize(
    ("env", "used"), [("dev", {"simulator"}), ("staging", {"mistral"}), ("production", {"mistral"})]
)
def test_the_upstreams_of_the_shipped_environments(env: str, used: set[str]) -> None:
    settings, policy = read(Settings, shipped("config.toml")), read(Policy, shipped(f"policies/{env}.toml"))
    assert upstreams_in_use(settings, policy) == used


def test_no_chain_leads_to_an_upstream_that_is_not_in_use() -> None:
    for policy in ("", "models.use_finetuned = false", "models.fallback_enabled = false", 'models.upstream = "sim"'):
        used = upstreams_in_use(read(Settings, CONFIG), read(Policy, policy))
        for agent in plan_of(policy).agents.values():
            chains = agent.baseline if "use_finetuned" in policy else (*agent.finetuned, *agent.baseline)
            assert {target.upstream for target in chains} <= used


def test_a_model_named_outright_goes_where_the_policy_sends_every_model() -> None:
    agent = plan_of('models.upstream = "sim"\nmodels.allow_raw_models = true').raw_agent("mistral/base")
    assert agent is not None
    (target,) = agent.baseline
    assert (target.ref, target.upstream, target.kind) == ("mistral/base", "sim", "simulator")


def test_a_chain_names_each_model_once() -> None:
    config = CONFIG.replace(
        'fallbacks = ["openai/gpt-4o", "sim/small"]', 'fallbacks = ["mistral/base", "mistral/ft:qa"]'
    )
    agent = plan_of(config=config).agents["qa_agent"]
    assert [target.ref for target in agent.finetuned] == ["mistral/ft:qa", "mistral/base"]
    assert [target.ref for target in agent.baseline] == ["mistral/base", "mistral/ft:qa"]


def test_a_cap_on_named_users_knows_them_as_accounts_do() -> None:
    plan = plan_of('[[caps]]\nper = "day"\nrequests = 1\nonly = { user = ["u1"] }')
    assert dict(plan.rules[0].only)["user"] == {plan.kept_user("u1")}
    assert plan.kept_user("u1") != "u1"


# --- Rollouts --------------------------------------------------------------------------------------------------------


def standing_at(share_bps: int, agent: str = "qa_agent") -> dict[str, RolloutState]:
    state = begin(agent, plan=rollout_plan(read(Policy, "[ab_testing]\nenabled = true\n"), agent), now_ms=0).state
    return {agent: msgspec.structs.replace(state, share_bps=share_bps, experiment=2, stage=3)}


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_rollouts_state_says_who_is_treated_and_the_policy_only_where_it_starts(one: int, other: int) -> None:
    policy = plan_of(policy=EXPERIMENT + "10\n")
    low, high = (policy.with_rollouts(standing_at(share)) for share in sorted((one, other)))
    for user in USERS[:50]:
        before, after = assigned(low, user), assigned(high, user)
        # Raising adds users; nobody is moved back.
        assert (before.variant, after.variant) != ("finetuned", "baseline")
        # Another agent's rollout is another's.
        assert assigned(low, user, "legal_agent") == assigned(policy, user, "legal_agent")


def test_a_rollout_names_its_experiment_and_stage() -> None:
    agent = plan_of(policy=EXPERIMENT + "10\n").with_rollouts(standing_at(2_500)).agents["qa_agent"]
    assert (agent.share_bps, agent.experiment, agent.stage) == (2_500, 2, 3)


def test_where_the_policy_makes_no_experiment_a_rollout_that_was_changes_nothing() -> None:
    plan = plan_of(policy="[ab_testing]\nenabled = false\n")
    assert plan.with_rollouts(standing_at(0)) == plan


def test_where_fine_tuned_models_are_switched_off_experiments_and_shadows_rest() -> None:
    plan = plan_of(policy=f'[models]\nuse_finetuned = false\n[shadow]\npercent = 5\nusd = "1"\n{EXPERIMENT}10\n')
    assert (plan.is_experiment, plan.rollouts, plan.shadow.is_on) == (False, {}, False)
    assert assigned(plan, USERS[0]).variant == "baseline"


def test_no_share_is_above_what_is_held_back() -> None:
    plan = plan_of(policy=f"{EXPERIMENT}100\n[rollout]\nholdback_percent = 5\n")
    assert plan.agents["qa_agent"].share_bps == plan.rollouts["qa_agent"].start_bps == 9_500


def test_a_rollout_knows_for_how_long_a_call_can_last() -> None:
    timeouts = "[timeouts.sim]\ntotal_s = 50\n[timeouts.mistral]\ntotal_s = 70\n[timeouts.openai]\ntotal_s = 60\n"
    assert plan_of(policy=f"{timeouts}{EXPERIMENT}10\n").rollouts["qa_agent"].longest_ms == 70_000


def test_texts_are_shown_of_the_agents_that_the_policy_names() -> None:
    assert not plan_of().shows_prompts("qa_agent")
    assert plan_of(policy="[traces]\nprompts = true\n").shows_prompts("qa_agent")
    some = plan_of(policy='[traces]\nprompts = true\nagents = ["legal_agent"]\n')
    assert (some.shows_prompts("qa_agent"), some.shows_prompts("legal_agent")) == (False, True)


def test_a_bucket_alone_gives_the_arm_that_its_user_gets() -> None:
    plan = plan_of(EXPERIMENT + "30")
    agent = plan.agents["qa_agent"]
    for user in ["", *USERS[:200]]:
        bucket = bucket_of(agent.salt, user) if user else None
        assert plan.assign_bucket(agent, bucket) == plan.assign(agent, user)
        assert plan.assign_bucket(agent, bucket, variant="finetuned", allow_fallback=False) == plan.assign(
            agent, user, variant="finetuned", allow_fallback=False
        )


def test_shadows_bring_a_cap_of_their_own_and_none_that_callers_are_under() -> None:
    plan = plan_of('[shadow]\npercent = 5\nusd = "1"\nper = "hour"')
    (rule,) = plan.rules
    assert (rule.label, rule.limit) == ("global 1.00 usd per hour (operation shadow)", 10**9)
    assert not plan.is_capped
    assert plan_of('[shadow]\nusd = "1"').rules == ()
    both = '[shadow]\npercent = 5\nusd = "1"\n[[caps]]\nper = "day"\nusd = "5"'
    assert plan_of(both).is_capped


def test_the_name_of_the_shadows_cap_stays_while_its_limit_changes() -> None:
    one, other = (plan_of(f'[shadow]\npercent = 5\nusd = "{usd}"').rules[0] for usd in (1, 2))
    assert one.id == other.id == "test: global usd day (operation shadow)"
