"""What would happen to a call, in words, without calling anyone: the journey's own decisions, in its order."""

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.decide.bound import bound_of, completion_bound, most_nusd, weigh
from gateway.decide.caps import rules_that_apply
from gateway.decide.fill import fill
from gateway.decide.identify import Caller, identify
from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.dialects import DIALECTS, translate
from gateway.domain.ledger import Dimensions
from gateway.domain.money import format_usd
from gateway.domain.wire import ChatBody


class Link(msgspec.Struct, kw_only=True):
    """One model of the chain: its price and the most this call could cost there."""

    model: str
    upstream: str
    price: str
    at_most_usd: str | None
    fields_dropped: list[str]


class Explanation(msgspec.Struct, kw_only=True):
    """Every decision about one call, with its reason."""

    env: str
    agent: str
    agent_from: str
    rule: str
    why: str
    bucket: int | None
    share_percent: float
    share_from: str
    variant: str
    variant_from: str
    max_tokens: int
    fields_lowered: list[str]
    chain: list[Link]
    caps: list[str]
    sent: dict[str, Any]


def explain(plan: Plan, headers: Mapping[str, str], body: ChatBody, caller: Caller, *, now_s: float) -> Explanation:
    """Explain one call. Raises `Refused` exactly where the call itself would be refused before its reservation."""
    who = identify(plan, headers, body, caller, now_s=now_s)
    assignment = plan.assign(who.agent, who.user, variant=who.variant, allow_fallback=who.allow_fallback)
    filled = fill(body, who.agent.defaults, plan.limits, is_capped=plan.is_capped)
    weight = weigh(filled.fields)
    first = assignment.chain[0]
    on = Dimensions(who.agent.name, caller.key, plan.kept_user(who.user), who.operation, first.ref, assignment.variant)

    def link(target: Target) -> Link:
        price = target.price
        prompt = bound_of(weight, target)
        at_most = most_nusd(price, prompt, completion_bound(prompt, filled.max_tokens, body.n)) if price else None
        per_mtok = price and f"{format_usd(price.input_nusd_per_mtok)} in, {format_usd(price.output_nusd_per_mtok)} out"
        return Link(
            model=target.ref,
            upstream=target.upstream,
            price=f"{per_mtok} usd per million tokens ({price.source})" if price else "unknown",
            at_most_usd=None if at_most is None else format_usd(at_most),
            fields_dropped=translate(DIALECTS[target.kind], filled.fields)[1],
        )

    shown = {name: value for name, value in filled.fields.items() if name not in ("messages", "model", "tools")}
    return Explanation(
        env=plan.env,
        agent=who.agent.name,
        agent_from=who.agent_from,
        rule=who.rule,
        why=who.why,
        bucket=assignment.bucket,
        share_percent=who.agent.share_bps / 100,
        # Only a rollout that has begun has an experiment.
        share_from="rollout" if who.agent.experiment else "policy",
        variant=assignment.variant,
        variant_from=who.variant_from or assignment.variant_from,
        max_tokens=filled.max_tokens,
        fields_lowered=list(filled.lowered),
        chain=[link(target) for target in assignment.chain],
        caps=[rule.label for rule in rules_that_apply(plan.rules, on)],
        sent={name: msgspec.json.decode(value) for name, value in shown.items()},
    )
