"""An explanation is what would happen: the same decisions, and the same refusals."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.bound import bound_of, completion_bound, most_nusd, weigh
from gateway.decide.explain import Explanation, explain
from gateway.decide.fill import fill
from gateway.decide.identify import Caller, identify
from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.dialects import DIALECTS, translate
from gateway.domain.errors import Refused
from gateway.domain.money import format_usd
from gateway.domain.wire import ChatBody
from tests.planning import NOW_S, body_of, plan_of, shipped_plan

TRUSTED = Caller("", (), True)
CAPS = """
[[caps]]
per = "hour"
usd = "20"
[[caps]]
per = "day"
requests = 100
only.agent = ["legal_agent"]
[[caps]]
per = "total"
tokens = 1000
only.operation = ["benchmark"]
[[caps]]
per = "day"
usd = "5"
only.model = ["mistral/ft:qa"]
"""
POLICY = "[ab_testing]\nenabled = true\nrollout_percentage = 50\n[overrides]\nvariant = true\nfallback = true\n"
PLAN = plan_of(POLICY + "[limits]\nmax_tokens = 2000\ntemperature = 1.0\n" + CAPS)
RAW = plan_of(POLICY + "[models]\nallow_raw_models = true")
LENIENT = plan_of(POLICY + '[models]\nunknown_agent = "baseline"')


def explained(body: ChatBody, headers: dict[str, str] | None = None, plan: Plan = PLAN) -> Explanation:
    return explain(plan, headers or {}, body, TRUSTED, now_s=NOW_S)


def test_one_call_in_full() -> None:
    found = explained(body_of("read this contract", model="auto", user="u1", max_tokens=9_000, seed=7))
    assert (found.env, found.agent, found.agent_from, found.rule) == ("test", "legal_agent", "rule", "law")
    assert "speaks of law" in found.why
    assert (found.share_percent, found.variant_from) == (50.0, "experiment")
    assert (found.max_tokens, found.fields_lowered) == (2_000, ["max_tokens"])
    assert found.caps == ["global 20.00 usd per hour", "global 100 requests per day (agent legal_agent)"]
    assert found.sent == {"user": "u1", "max_tokens": 2_000, "seed": 7}
    assert [link.model for link in found.chain][-1] == "mistral/base"
    assert found.chain[-1].price == "0.20 in, 0.20 out usd per million tokens (config.toml)"
    assert found.chain[-1].fields_dropped == ["user"]


def test_a_cap_on_a_model_shows_where_that_model_comes_first() -> None:
    finetuned = explained(body_of(), {"x-gateway-variant": "finetuned"})
    baseline = explained(body_of(), {"x-gateway-variant": "baseline"})
    assert "global 5.00 usd per day (model mistral/ft:qa)" in finetuned.caps
    assert baseline.caps == ["global 20.00 usd per hour"]


def test_an_unknown_price_is_said_to_be_unknown() -> None:
    links = {link.model: link for link in explained(body_of()).chain}
    assert (links["sim/small"].price, links["sim/small"].at_most_usd) == ("unknown", None)


def test_the_prompt_is_not_repeated() -> None:
    secret = "the-launch-code-is-0000"
    assert secret not in repr(explained(body_of(secret, model="auto")))


@pytest.mark.parametrize("env", ["dev", "staging", "production"])
def test_the_shipped_environments_explain_themselves(env: str) -> None:
    found = explained(body_of("Please review the indemnity clause.", model="auto", user="u1"), plan=shipped_plan(env))
    assert (found.env, found.agent) == (env, "legal_agent")
    assert found.variant == ("finetuned" if env == "staging" else "baseline")
    assert len(found.chain) == (2 if found.variant == "baseline" else 3)


BODIES = st.fixed_dictionaries(
    {"model": st.sampled_from(["auto", "qa_agent", "agent/legal_agent", "nobody", "openai/gpt-4o"])},
    optional={
        "user": st.sampled_from(["u1", "u2", "u\n", "", 5]),
        "max_tokens": st.sampled_from([1, 2_000, 5_000, None]),
        "max_completion_tokens": st.sampled_from([1, 5_000, None]),
        "temperature": st.sampled_from([0, 1.5, None]),
        "n": st.sampled_from([1, 8, 9]),
        "metadata": st.sampled_from([None, {}, {"user_id": "u3"}, []]),
        "messages": st.sampled_from(
            [
                [{"role": "user", "content": "a contract"}],
                [{"role": "user", "content": [{"type": "text", "text": "t"}]}, {"role": "assistant"}],
                [{"role": "user", "content": 5}],
            ]
        ),
    },
)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "x-gateway-agent": st.sampled_from(["qa_agent", "nobody", "a b"]),
        "x-gateway-variant": st.sampled_from(["finetuned", "baseline", "x"]),
        "x-gateway-fallback": st.sampled_from(["on", "off"]),
        "x-gateway-user": st.sampled_from(["u4", "a b"]),
        "x-gateway-operation": st.just("benchmark"),
    },
)


@given(BODIES, HEADERS, st.sampled_from([PLAN, RAW, LENIENT]))
def test_it_decides_and_refuses_exactly_as_the_journey_does(
    asked: dict[str, Any], headers: dict[str, str], plan: Plan
) -> None:
    body = body_of(**asked)

    def journey() -> dict[str, Any]:
        who = identify(plan, headers, body, TRUSTED, now_s=NOW_S)
        assignment = plan.assign(who.agent, who.user, variant=who.variant, allow_fallback=who.allow_fallback)
        filled = fill(body, who.agent.defaults, plan.limits)
        weight = weigh(filled.fields)

        def at_most(target: Target) -> str | None:
            prompt = bound_of(weight, target)
            completion = completion_bound(prompt, filled.max_tokens, body.n)
            return target.price and format_usd(most_nusd(target.price, prompt, completion))

        return {
            "agent": who.agent.name,
            "agent_from": who.agent_from,
            "rule": who.rule,
            "why": who.why,
            "bucket": assignment.bucket,
            "variant": assignment.variant,
            "variant_from": "unknown agent" if who.agent_from == "unknown" else assignment.variant_from,
            "max_tokens": filled.max_tokens,
            "fields_lowered": list(filled.lowered),
            "chain": [target.ref for target in assignment.chain],
            "at_most": [at_most(target) for target in assignment.chain],
            "dropped": [translate(DIALECTS[target.kind], filled.fields)[1] for target in assignment.chain],
        }

    def outcome(of: Callable[[], Any]) -> Any:
        try:
            return of()
        except Refused as refused:
            return (refused.code, refused.message, refused.param)

    wanted = outcome(journey)
    found = outcome(lambda: explained(body, headers, plan))
    if not isinstance(found, Explanation):
        assert found == wanted
        return
    ours: dict[str, Any] = {
        **{name: getattr(found, name) for name in wanted if name not in ("chain", "at_most", "dropped")},
        "chain": [link.model for link in found.chain],
        "at_most": [link.at_most_usd for link in found.chain],
        "dropped": [link.fields_dropped for link in found.chain],
    }
    assert ours == wanted
