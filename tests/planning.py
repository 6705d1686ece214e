"""Plans for tests of the pure floors, from TOML as a person would write it, without a file or a clock.

plan = plan_of(policy='[ab_testing]\\nenabled = true')
body = body_of(model="auto", user="u1")
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gateway.decide.plan import Plan, compile_plan
from gateway.domain.money import Price
from gateway.domain.policy import Policy, check_policy
from gateway.domain.reading import Problem, read_struct
from gateway.domain.rules import Routing, check_routing
from gateway.domain.settings import Settings, check_settings
from gateway.domain.wire import ChatBody, read_chat

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
NOW_S = 1_763_700_000.0

CONFIG = """
[upstreams.mistral]
kind = "mistral"
base_url = "https://api.mistral.ai/v1"
[upstreams.openai]
kind = "openai"
base_url = "https://api.openai.com/v1"
[upstreams.sim]
kind = "simulator"

[agents.qa_agent]
finetuned = "mistral/ft:qa"
baseline  = "mistral/base"
fallbacks = ["openai/gpt-4o", "sim/small"]
defaults  = { temperature = 0.7, max_tokens = 4096 }

[agents.legal_agent]
finetuned = "mistral/ft:legal"
baseline  = "mistral/base"
salt      = "legal-2"

[prices."mistral/ft:*"]
input_usd_per_mtok = "0.80"
output_usd_per_mtok = "0.80"
[prices."mistral/base"]
input_usd_per_mtok = "0.20"
output_usd_per_mtok = "0.20"
"""

ROUTING = """
default_agent = "qa_agent"
[[rules]]
name = "law"
agent = "legal_agent"
any_word = ["contract"]
why = "speaks of law"
"""


def read(cls: type[T], text: str) -> T:
    """The struct that `text` describes; a problem fails the test."""
    problems: list[Problem] = []
    found = read_struct(cls, tomllib.loads(text), "", problems)
    assert found is not None, problems
    return found


def plan_of(
    policy: str = "",
    *,
    config: str = CONFIG,
    routing: str = ROUTING,
    env: str = "test",
    litellm_map: Mapping[str, Price] | None = None,
) -> Plan:
    """A plan from these texts, checked as at a load."""
    settings, allowed, rules = read(Settings, config), read(Policy, policy), read(Routing, routing)
    problems = [*check_settings(settings), *check_policy(allowed, settings), *check_routing(rules, settings.agents)]
    assert problems == []
    return compile_plan(env, settings, allowed, rules, litellm_map or {})


def shipped(name: str) -> str:
    """A shipped file, every `${NAME:-default}` replaced by its default."""
    text = (ROOT / name).read_text(encoding="utf-8")
    while "${" in text:
        before, _, rest = text.partition("${")
        variable, _, after = rest.partition("}")
        text = before + variable.partition(":-")[2] + after
    return text


def shipped_plan(env: str) -> Plan:
    """The plan of one of the shipped environments."""
    return plan_of(
        shipped(f"policies/{env}.toml"),
        config=shipped("config.toml"),
        routing=shipped("policies/routing.toml"),
        env=env,
    )


def body_of(text: str = "hello", **fields: Any) -> ChatBody:
    """A chat request as it came in."""
    asked = {"model": "qa_agent", "messages": [{"role": "user", "content": text}], **fields}
    return read_chat(json.dumps(asked).encode())
