"""Who is calling, for which agent, and what they may overrule: headers and body in, `Identity` out. Pure.

Its one invariant: no gateway header is believed unless the caller is trusted, and nothing malformed is guessed at.
"""

from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from typing import NamedTuple, cast

from gateway.decide.plan import AgentPlan, Plan
from gateway.decide.route import Prompt
from gateway.domain.call import Variant
from gateway.domain.errors import Refused
from gateway.domain.names import ID, NAME, is_id, is_name
from gateway.domain.shadow_policy import SHADOW
from gateway.domain.wire import ChatBody

AUTO = "auto"
_CLOSE = {"Connection": "close"}
# `auto` in the ways frameworks let one write it; some insist on a provider prefix.
_AUTO = frozenset({AUTO, "gateway/auto", "agent/auto"})
MAX_USER_CHARS = 512
MAX_CALL_TIMEOUT_MS = 3_600_000


class Caller(NamedTuple):
    """Who is at the other end of the connection, before anything they say: the key they showed, and our trust."""

    key: str
    agents: tuple[str, ...]
    is_trusted: bool


class Identity(NamedTuple):
    """What a call is: its agent and how that was found, its user, and what the caller asked to overrule."""

    agent: AgentPlan
    agent_from: str
    rule: str
    why: str
    user: str
    operation: str
    variant: Variant | None
    variant_from: str
    allow_fallback: bool
    timeout_s: float | None
    patience_s: float | None


def find_caller(plan: Plan, headers: Mapping[str, str], *, is_loopback: bool) -> Caller:
    """The caller behind a request's headers. Raises `Refused` where the policy has keys and this shows none of them,
    and where it has none and a web page asks: any page may send requests to this machine, and they would cost money."""
    if not plan.keys:
        if "Origin" in headers:
            raise Refused("origin_not_allowed", "web pages need a key; the policy has none", headers=_CLOSE)
        return Caller("", (), is_loopback)
    scheme, _, shown = headers.get("Authorization", "").partition(" ")
    digest = sha256(shown.strip().encode("utf-8", "surrogateescape")).hexdigest()
    found = None
    for key in plan.keys:
        # Every key is compared, each in constant time, so neither position nor prefix can be learnt from the clock.
        if compare_digest(key.sha256, digest):
            found = key
    if found is None or scheme.lower() != "bearer":
        message = "a key is required: Authorization: Bearer <key>" if not shown else "incorrect API key provided"
        raise Refused("invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
    return Caller(found.name, tuple(found.agents), found.trusted)


def identify(plan: Plan, headers: Mapping[str, str], body: ChatBody, caller: Caller, *, now_s: float) -> Identity:
    """Agent, user, operation and overrides of one call. Raises `Refused`."""
    said: Mapping[str, str] = headers if caller.is_trusted else {}
    agent, agent_from, rule, why = _agent(plan, said.get("x-gateway-agent", ""), headers, body, caller, now_s)
    if caller.agents and agent.name not in caller.agents:
        raise Refused("agent_not_allowed", f"this key may not use {agent.name}", param="model")
    forced = _variant(plan, said.get("x-gateway-variant", ""))
    return Identity(
        agent=agent,
        agent_from=agent_from,
        rule=rule,
        why=why,
        user=_user(said.get("x-gateway-user", ""), body),
        operation=_operation(said),
        # An unknown agent that the policy lets pass gets the baseline, whatever the experiment says.
        variant="baseline" if agent_from == "unknown" else forced,
        variant_from="unknown agent" if agent_from == "unknown" else "",
        allow_fallback=_fallback(plan, said.get("x-gateway-fallback", "")),
        timeout_s=_timeout_s(plan, said),
        patience_s=_patience_s(headers),
    )


def prompt_of(headers: Mapping[str, str], body: ChatBody, now_s: float) -> Prompt:
    """What the router may look at."""
    texts = body.texts()
    return Prompt(
        system="\n".join(text for role, text in texts if role in ("system", "developer")),
        user=tuple(text for role, text in texts if role == "user"),
        metadata=body.metadata(),
        headers={name.lower(): value for name, value in headers.items()},
        tool_names=body.tool_names(),
        chars=sum(len(text) for _, text in texts),
        now_s=now_s,
    )


def _agent(
    plan: Plan, named: str, headers: Mapping[str, str], body: ChatBody, caller: Caller, now_s: float
) -> tuple[AgentPlan, str, str, str]:
    """The agent, how it was found, the rule and the reason, in the order of the documentation."""
    model = body.model
    if named and named not in _AUTO:
        if not is_name(named):
            raise Refused("invalid_header", f"x-gateway-agent may hold {NAME}", param="x-gateway-agent")
        return _known(plan, named, named, "header", "named in x-gateway-agent")
    is_auto = bool(named) or model in _AUTO
    if is_auto and len(caller.agents) != 1:
        route = plan.routes.decide(prompt_of(headers, body, now_s))
        return plan.agents[route.agent], "rule", route.rule, route.why
    agent = plan.agents.get(model.removeprefix("agent/"))
    if agent is not None and not is_auto:
        return agent, "model", "", "named as the model"
    if len(caller.agents) == 1:
        return plan.agents[caller.agents[0]], "key", "", "the key's own agent"
    as_named = plan.raw_agent(model)
    if as_named is not None:
        return as_named, "raw model", "", "a model named outright"
    return _known(plan, model.removeprefix("agent/"), model, "model", "named as the model")


def _known(plan: Plan, name: str, shown: str, source: str, why: str) -> tuple[AgentPlan, str, str, str]:
    agent = plan.agents.get(name)
    if agent is not None:
        return agent, source, "", why
    if plan.unknown_agent == "baseline":
        return plan.agents[plan.default_agent], "unknown", "", "unknown agent; the policy serves the baseline"
    known = ", ".join(plan.agents)
    shown = shown if is_id(shown) else "that model"
    raise Refused("model_not_found", f"there is no agent or model {shown!r}; known: {AUTO}, {known}", param="model")


def _user(header: str, body: ChatBody) -> str:
    """The user as the caller names them: header, safety_identifier, user, metadata.user_id."""
    if header:
        if not is_id(header):
            raise Refused("invalid_header", f"x-gateway-user may hold {ID}", param="x-gateway-user")
        return header
    for name in ("safety_identifier", "user"):
        value = body.text(name)
        if value:
            return _body_user(value, name)
    value = body.metadata().get("user_id") if body.is_set("metadata") else None
    return _body_user(value, "metadata.user_id") if value else ""


def _body_user(value: str, param: str) -> str:
    # Wider than the header's alphabet, since OpenAI takes any string here ("auth0|123" is common), and it is hashed.
    if len(value) > MAX_USER_CHARS or not value.isprintable():
        message = f"{param} must be at most {MAX_USER_CHARS} printable characters"
        raise Refused("invalid_value", message, param=param)
    return value


def _id_header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "")
    if value and not is_id(value):
        raise Refused("invalid_header", f"{name} may hold {ID}", param=name)
    return value


def _operation(said: Mapping[str, str]) -> str:
    """What the call is for. Shadow calls fall under no cap of callers, so that no caller may pass for one."""
    value = _id_header(said, "x-gateway-operation")
    if value == SHADOW:
        message = f"the operation {SHADOW} is reserved for the gateway's own shadow calls"
        raise Refused("invalid_header", message, param="x-gateway-operation")
    return value or "inference"


def _variant(plan: Plan, value: str) -> Variant | None:
    if not value:
        return None
    if value not in ("finetuned", "baseline"):
        raise Refused("invalid_header", "x-gateway-variant is finetuned or baseline", param="x-gateway-variant")
    if not plan.overrides.variant:
        message = f"the policy of {plan.env!r} lets no caller choose the variant"
        raise Refused("override_not_allowed", message, param="x-gateway-variant")
    return cast(Variant, value)


def _fallback(plan: Plan, value: str) -> bool:
    if value not in ("", "on", "off"):
        raise Refused("invalid_header", "x-gateway-fallback is on or off", param="x-gateway-fallback")
    if value == "off" and not plan.overrides.fallback:
        message = f"the policy of {plan.env!r} lets no caller forbid the fallback"
        raise Refused("override_not_allowed", message, param="x-gateway-fallback")
    return value != "off"


def _timeout_s(plan: Plan, said: Mapping[str, str]) -> float | None:
    """The deadline that the caller sets for the whole call."""
    value = said.get("x-gateway-timeout-ms", "")
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 12 and 1 <= int(value) <= MAX_CALL_TIMEOUT_MS):
        message = f"x-gateway-timeout-ms is a whole number from 1 to {MAX_CALL_TIMEOUT_MS}"
        raise Refused("invalid_header", message, param="x-gateway-timeout-ms")
    if not plan.overrides.timeout:
        message = f"the policy of {plan.env!r} lets no caller set the timeout"
        raise Refused("override_not_allowed", message, param="x-gateway-timeout-ms")
    return int(value) / 1000


def _patience_s(headers: Mapping[str, str]) -> float | None:
    """How long an OpenAI SDK waits for the next bytes, as it says itself: each wait, not the whole stream."""
    waits = headers.get("x-stainless-read-timeout", "")
    try:
        seconds = float(waits) if waits else 0.0
        # Neither nothing, nor a time that is over, nor nan bounds anything.
        return min(seconds, MAX_CALL_TIMEOUT_MS / 1000) if seconds > 0 else None
    except ValueError:
        return None  # A hint from the SDK, not a demand: what cannot be read is left aside.
