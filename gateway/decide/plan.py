"""Config and policy compiled into one lookup table, once per load; a request only looks things up in it.

Its one invariant: a `Plan` never changes. A reload makes a new one, and a call keeps the one it began with.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec
from msgspec import Raw

from gateway.decide.assign import bucket_of, hash_user, is_treated
from gateway.decide.caps import Rule, rules_of
from gateway.decide.fallback import RetryLimits
from gateway.decide.prices import PriceBook
from gateway.decide.rollout_plan import RolloutPlan, rollout_plan
from gateway.decide.route import Routes, compile_routes
from gateway.decide.targets import Target, Targets
from gateway.domain.call import Variant
from gateway.domain.errors import Refused
from gateway.domain.money import Price
from gateway.domain.policy import (
    Budget,
    Cap,
    Health,
    Key,
    Limits,
    OnCut,
    Overrides,
    Policy,
    Traces,
    shadow_caps,
)
from gateway.domain.rollout import RolloutState
from gateway.domain.rules import Routing
from gateway.domain.secret import Secret
from gateway.domain.settings import Agent, PriceEntry, Settings, split_ref
from gateway.domain.shadow_policy import Shadow
from gateway.domain.wire import raw

RAW_AGENT = "raw"
# A call without any limit could cost anything, so where neither caller nor agent sets one, this is put in.
MAX_TOKENS_IF_UNSET = 4096


class Assignment(NamedTuple):
    """The arm a call is in, why, and the models to try, best first."""

    variant: Variant
    variant_from: str
    bucket: int | None
    chain: tuple[Target, ...]


class AgentPlan(NamedTuple):
    """One agent, ready to serve."""

    name: str
    description: str
    salt: str
    on_cut: OnCut
    share_bps: int
    finetuned: tuple[Target, ...]
    baseline: tuple[Target, ...]
    defaults: Mapping[str, Raw]
    # Of its rollout, by which its calls are counted; 0 before it has begun.
    experiment: int = 0
    stage: int = 0


class Plan(NamedTuple):
    """Everything a request needs to know, resolved."""

    env: str
    agents: Mapping[str, AgentPlan]
    routes: Routes
    default_agent: str
    targets: Targets
    use_finetuned: bool
    is_experiment: bool
    fallback_enabled: bool
    unknown_agent: Literal["refuse", "baseline"]
    allow_raw_models: bool
    overrides: Overrides
    limits: Limits
    rules: tuple[Rule, ...]
    budget: Budget
    health: Health
    traces: Traces
    rollouts: Mapping[str, RolloutPlan]
    shadow: Shadow
    keys: tuple[Key, ...]
    user_salt: Secret
    on_cut: OnCut
    retries: RetryLimits

    @property
    def is_capped(self) -> bool:
        """Whether some cap counts the dollars of callers."""
        return any(rule.unit == "usd" and rule.counts_calls for rule in self.rules)

    def shows_prompts(self, agent: str) -> bool:
        """Whether the spans of this agent's calls hold their texts."""
        return self.traces.prompts and (not self.traces.agents or agent in self.traces.agents)

    def with_rollouts(self, states: Mapping[str, RolloutState]) -> "Plan":
        """The same plan at the shares where the rollouts stand: a policy only says where they start."""
        if not self.is_experiment:
            return self
        agents = {
            name: agent._replace(share_bps=state.share_bps, experiment=state.experiment, stage=state.stage)
            if (state := states.get(name)) is not None
            else agent
            for name, agent in self.agents.items()
        }
        return self._replace(agents=agents)

    def raw_agent(self, ref: str) -> AgentPlan | None:
        """A stand-in agent for a model named outright, where the policy lets it pass and the upstream exists."""
        target = self.targets.find(ref) if self.allow_raw_models else None
        if target is None:
            return None
        return AgentPlan(
            RAW_AGENT, "", RAW_AGENT, self.on_cut, 0, (target,), (target,), {"max_tokens": raw(MAX_TOKENS_IF_UNSET)}
        )

    def kept_user(self, user: str) -> str:
        """The user as records and accounts know it."""
        return hash_user(user, self.user_salt.reveal())

    def assign(
        self, agent: AgentPlan, user: str, *, variant: Variant | None = None, allow_fallback: bool = True
    ) -> Assignment:
        """The arm for this user of this agent. `variant` is what the caller forces; raises `Refused` if it may not."""
        bucket = bucket_of(agent.salt, user) if user else None
        return self.assign_bucket(agent, bucket, variant=variant, allow_fallback=allow_fallback)

    def assign_bucket(
        self, agent: AgentPlan, bucket: int | None, *, variant: Variant | None = None, allow_fallback: bool = True
    ) -> Assignment:
        """The same for a user of whom only the bucket is known; None: a call without a user."""
        chosen, reason = self._arm(agent, bucket, variant)
        chain = agent.finetuned if chosen == "finetuned" else agent.baseline
        return Assignment(chosen, reason, bucket, chain if allow_fallback else chain[:1])

    def _arm(self, agent: AgentPlan, bucket: int | None, forced: Variant | None) -> tuple[Variant, str]:
        if forced == "finetuned" and not self.use_finetuned:
            message = f"the policy of {self.env!r} serves no fine-tuned models, so none can be forced"
            raise Refused("override_not_allowed", message, param="x-gateway-variant")
        if forced is not None:
            return forced, "override"
        if not self.use_finetuned or agent.name == RAW_AGENT:
            return "baseline", "policy"
        if not self.is_experiment:
            return "finetuned", "policy"
        if bucket is None:
            return "baseline", "no user"
        return ("finetuned" if is_treated(bucket, agent.share_bps) else "baseline"), "experiment"


def compile_plan(
    env: str, settings: Settings, policy: Policy, routing: Routing, litellm_map: Mapping[str, Price]
) -> Plan:
    """One plan from checked parts. Anything wrong with them has been reported before this."""
    targets = Targets(settings, policy, PriceBook(policy.prices, settings.prices, litellm_map))
    caps = [*policy.caps, *shadow_caps(policy.shadow)]
    agents = {name: _agent_plan(name, agent, policy, targets) for name, agent in settings.agents.items()}
    # Without the fine-tuned models there is nothing to compare. No error: it is how all of them are taken out at once.
    is_experiment = policy.ab_testing.enabled and policy.models.use_finetuned
    return Plan(
        env=env,
        agents=agents,
        routes=compile_routes(routing),
        default_agent=routing.default_agent,
        targets=targets,
        use_finetuned=policy.models.use_finetuned,
        is_experiment=is_experiment,
        fallback_enabled=policy.models.fallback_enabled,
        unknown_agent=policy.models.unknown_agent,
        allow_raw_models=policy.models.allow_raw_models,
        overrides=policy.overrides,
        limits=policy.limits,
        rules=rules_of((_cap_by_kept_users(cap, settings.server.user_salt) for cap in caps), env),
        budget=policy.budget,
        health=policy.health,
        traces=policy.traces,
        rollouts={name: _rollout_plan(policy, agents[name]) for name in agents} if is_experiment else {},
        shadow=policy.shadow if policy.models.use_finetuned else Shadow(),
        keys=tuple(policy.keys),
        user_salt=settings.server.user_salt,
        on_cut=policy.stream.on_cut,
        retries=RetryLimits(policy.retries.base_s, policy.retries.max_wait_s),
    )


def upstreams_in_use(settings: Settings, policy: Policy) -> frozenset[str]:
    """The upstreams some call may be sent to under this policy. Only these need their secrets."""
    if policy.models.upstream:
        return frozenset({policy.models.upstream})
    if policy.models.allow_raw_models:
        return frozenset(settings.upstreams)
    refs: list[str] = []
    for agent in settings.agents.values():
        refs.append(agent.baseline)
        refs += [agent.finetuned] if policy.models.use_finetuned else []
        refs += agent.fallbacks if policy.models.fallback_enabled else []
    return frozenset(split_ref(ref)[0] for ref in refs)


def _agent_plan(name: str, agent: Agent, policy: Policy, targets: Targets) -> AgentPlan:
    def target(ref: str, own: PriceEntry | None = None) -> Target:
        found = targets.find(ref, own)
        if found is None:
            raise AssertionError(f"BUG: {ref} was not checked")
        return found

    finetuned = target(agent.finetuned, agent.prices.finetuned)
    baseline = target(agent.baseline, agent.prices.baseline)
    further = tuple(target(ref) for ref in agent.fallbacks) if policy.models.fallback_enabled else ()
    defaults = {key: raw(value) for key, value in msgspec.to_builtins(agent.defaults).items() if value is not None}
    defaults.setdefault("max_tokens", raw(MAX_TOKENS_IF_UNSET))
    return AgentPlan(
        name=name,
        description=agent.description,
        salt=agent.salt or name,
        on_cut=policy.stream.agents.get(name, policy.stream.on_cut),
        share_bps=rollout_plan(policy, name).start_bps if policy.ab_testing.enabled else 10_000,
        finetuned=_chain(finetuned, baseline, *further) if policy.models.fallback_enabled else (finetuned,),
        baseline=_chain(baseline, *further),
        defaults=defaults,
    )


def _rollout_plan(policy: Policy, agent: AgentPlan) -> RolloutPlan:
    longest_s = max(target.timeouts.total_s for target in (*agent.finetuned, *agent.baseline))
    return rollout_plan(policy, agent.name)._replace(longest_ms=round(longest_s * 1_000))


def _chain(*targets: Target) -> tuple[Target, ...]:
    """The models in order, each once: a model that failed is not a fallback for itself."""
    chain: dict[str, Target] = {}
    for target in targets:
        chain.setdefault(target.ref, target)
    return tuple(chain.values())


def _cap_by_kept_users(cap: Cap, salt: Secret) -> Cap:
    """Policies name users as people know them, accounts know only their hashes."""
    if "user" not in cap.only:
        return cap
    users = [hash_user(user, salt.reveal()) for user in cap.only["user"]]
    return msgspec.structs.replace(cap, only={**cap.only, "user": users})
