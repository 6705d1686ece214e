"""A reference becomes all that an attempt needs: where, in which dialect, for how long, how large, and whether it
goes on from an answer that has begun."""

import msgspec
import pytest

from gateway.decide.prices import PriceBook
from gateway.decide.targets import Target, Targets
from gateway.domain.policy import Policy, TimeoutOverrides
from gateway.domain.settings import Settings, Timeouts
from tests.planning import plan_of, read

CONFIG = """
[upstreams.mistral]
kind = "mistral"
base_url = "https://api.mistral.ai/v1"
[upstreams.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"
timeouts = { first_token_s = 20, total_s = 100 }
[upstreams.vllm]
kind = "compatible"
base_url = "http://127.0.0.1:8000/v1"
continues = true
[upstreams.ollama]
kind = "compatible"
base_url = "http://127.0.0.1:11434/v1"
[upstreams.magistral]
kind = "mistral"
base_url = "http://127.0.0.1:9000/v1"
continues = false
[upstreams.sim]
kind = "simulator"

[agents.qa_agent]
finetuned = "mistral/ft:qa"
baseline  = "mistral/base"

[context_tokens]
"openai/*" = 1_000
"openai/gpt-4*" = 8_000
"openai/gpt-4o" = 128_000
"*/base" = 32_000
"""


def targets(policy: str = "", config: str = CONFIG) -> Targets:
    settings, allowed = read(Settings, config), read(Policy, policy)
    return Targets(settings, allowed, PriceBook({}, settings.prices, {}))


def found(ref: str, policy: str = "") -> Target:
    target = targets(policy).find(ref)
    assert target is not None
    return target


@pytest.mark.parametrize("ref", ["", "base", "/base", "mistral/", "nowhere/base", "Mistral/base"])
def test_what_names_no_upstream_or_no_model_is_none(ref: str) -> None:
    assert targets().find(ref) is None


def test_a_model_id_may_hold_slashes() -> None:
    target = found("vllm/org/model:tag")
    assert (target.upstream, target.model, target.kind) == ("vllm", "org/model:tag", "compatible")


@pytest.mark.parametrize(
    ("ref", "tokens"),
    [
        ("openai/gpt-4o", 128_000),
        ("openai/gpt-4o-mini", 8_000),
        ("openai/o3", 1_000),
        ("mistral/base", 32_000),
        ("mistral/Base", None),
        ("sim/small", None),
    ],
)
def test_an_exact_name_beats_a_pattern_and_a_longer_pattern_a_shorter_one(ref: str, tokens: int | None) -> None:
    assert found(ref).context_tokens == tokens


@pytest.mark.parametrize(
    ("ref", "continues"),
    [
        ("mistral/base", True),
        ("magistral/base", False),
        ("openai/gpt-4o", False),
        ("ollama/llama", False),
        ("vllm/org/model", True),
        ("sim/small", False),
    ],
)
def test_mistral_goes_on_from_a_begun_answer_and_of_the_others_it_is_said(ref: str, continues: bool) -> None:
    assert found(ref).continues is continues


def test_timeouts_are_the_upstreams_where_the_policy_says_nothing() -> None:
    assert found("mistral/base").timeouts == Timeouts()
    assert found("openai/gpt-4o").timeouts == Timeouts(first_token_s=20, total_s=100)


def test_the_policy_overrides_what_it_names_and_nothing_else() -> None:
    policy = "[timeouts.openai]\nstall_s = 3\nmin_events_per_s = 0\nfirst_token_s = 1.5"
    assert found("openai/gpt-4o", policy).timeouts == Timeouts(
        first_token_s=1.5, stall_s=3, min_events_per_s=0, total_s=100
    )
    assert found("mistral/base", policy).timeouts == Timeouts()


def test_every_timeout_but_the_connections_can_be_overridden() -> None:
    assert set(TimeoutOverrides.__struct_fields__) == set(Timeouts.__struct_fields__) - {"connect_s"}
    every = dict.fromkeys(TimeoutOverrides.__struct_fields__, 7.0)
    policy = "[timeouts.sim]\n" + "\n".join(f"{name} = {value}" for name, value in every.items())
    assert msgspec.structs.asdict(found("sim/small", policy).timeouts) == {"connect_s": 5.0, **every}


def test_a_redirect_changes_who_serves_and_not_what_the_model_is() -> None:
    policy = '[models]\nupstream = "sim"\n[timeouts.sim]\nstall_s = 3\n[timeouts.mistral]\nstall_s = 99'
    target = found("mistral/base", policy)
    assert (target.ref, target.upstream, target.model, target.kind) == ("mistral/base", "sim", "base", "simulator")
    # Where it runs decides how long to wait and what it can do; the registry, how large it is.
    assert (target.timeouts.stall_s, target.continues) == (3, False)
    assert target.context_tokens == 32_000


def test_the_chains_of_a_plan_are_made_of_these() -> None:
    plan = plan_of("[timeouts.mistral]\nfirst_token_s = 2", config=CONFIG, routing='default_agent = "qa_agent"')
    chain = plan.agents["qa_agent"].finetuned
    assert [target.timeouts.first_token_s for target in chain] == [2, 2]
    assert [target.context_tokens for target in chain] == [None, 32_000]
    assert all(target.continues for target in chain)
    assert chain[1] == plan.targets.find("mistral/base")
