"""Recorded calls under another plan, one after another: who would serve each, at which cost, or why it is refused.

Nobody is called: a model is taken to do again what the record says of it, and to answer where it says nothing;
docs/replay.md lists all that is assumed. The invariant: under the plan that was in force no call ends otherwise.
"""

from typing import Literal, NamedTuple

import msgspec

from gateway.decide.assign import BUCKETS
from gateway.decide.fallback import REMEDIES, Then
from gateway.decide.plan import RAW_AGENT, AgentPlan, Plan
from gateway.decide.recorded import (
    LIFTED,
    SHORT,
    Ending,
    Route,
    ending_of,
    is_void,
    next_ref,
    on_of,
    reserved_ms,
    route_of,
    taken,
)
from gateway.decide.spending import Spending, place_of
from gateway.decide.targets import Target
from gateway.domain.call import Attempt, CallRecord, Variant
from gateway.domain.errors import Refused
from gateway.domain.ledger import Amounts, Dimensions
from gateway.domain.money import Price, Usage, cost_nusd

# What the replay of a call rests on beside its record.
Assumption = Literal[
    "bucket_unknown", "share_kept", "failed_again", "usage_estimated", "usage_unknown", "cost_kept", "price_unknown"
]  # fmt: skip


class Replayed(NamedTuple):
    """A call as it was recorded, and as it would be. `share_bps` is that of its new arm; None: no experiment."""

    record: CallRecord
    before: Ending
    after: Ending
    share_bps: int | None
    assumed: frozenset[Assumption]


class Replayer:
    """Carries what was spent from one call to the next. Calls are handed in by their time, oldest first."""

    def __init__(self, was: Plan, plan: Plan, *, share_bps: int | None = None) -> None:
        """`was` was in force when they were recorded. `share_bps` is tried in the place of the plan's own shares."""
        self.was, self.plan, self._share_bps = was, plan, share_bps
        self.before, self.after = Spending(was.rules), Spending(plan.rules)
        self.was_rules = {rule.id: rule for rule in was.rules}
        self.rules = {rule.id: rule for rule in plan.rules}
        self._keys = {key.name: key for key in plan.keys}
        self._same_prices: dict[tuple[str, str, str], bool] = {}
        # By agent: how many calls told their usage, and its sums.
        self._usage: dict[str, tuple[int, int, int]] = {}

    def count(self, record: CallRecord) -> None:
        """Take a call as it was: under both plans it spent what it did spend."""
        self._spend(self.after, record)
        self._note(record)

    def replay(self, record: CallRecord) -> Replayed:
        """Decide about a call anew."""
        assumed: set[Assumption] = set()
        route = route_of(record, self.was)
        before = self._before(record, route)
        after, share_bps = before, record.share_bps
        # Without an arm it was refused for something of its own, which is not in the record.
        if record.variant is not None:
            try:
                agent, forced = self._agent(record)
                agent = self._at_its_share(agent, record, assumed)
                share_bps = agent.share_bps if self.plan.is_experiment else None
                after = self._decide(record, agent, forced, route, before, assumed)
            except Refused as refused:
                after = Ending(None, "", "refused", refused.code)
        self._note(record)
        return Replayed(record, before, after, share_bps, frozenset(assumed))

    def usage_of(self, agent: str) -> Usage | None:
        """What the calls of an agent used on average so far, rounded up; None before the first that told."""
        calls, prompt, completion = self._usage.get(agent, (0, 0, 0))
        return Usage(prompt_tokens=-(-prompt // calls), completion_tokens=-(-completion // calls)) if calls else None

    def has_same_price(self, record: CallRecord, agent: str, target: Target) -> bool:
        """Whether a model costs what it did cost: then the recorded cost stands, with what no usage tells of."""
        key = (record.agent, agent, target.ref)
        if key not in self._same_prices:
            was = self.was.agents.get(record.agent)
            known = (*was.finetuned, *was.baseline) if was is not None else ()
            former = next((one for one in known if one.ref == target.ref), None) or self.was.targets.find(target.ref)
            self._same_prices[key] = former is not None and _rates(former.price) == _rates(target.price)
        return self._same_prices[key]

    # --- Who, which arm, which models --------------------------------------------------------------------------------

    def _agent(self, record: CallRecord) -> tuple[AgentPlan, Variant | None]:
        """The agent, and the arm that is forced. Raises `Refused` as `identify` would."""
        plan = self.plan
        key = self._keys.get(record.key)
        if plan.keys and key is None:
            raise Refused("invalid_api_key", "the policy has no such key")
        found = plan.agents.get(record.agent) if record.agent_from not in ("unknown", "raw model") else None
        if record.agent_from == "raw model":
            found = plan.raw_agent(record.model_asked)
        if found is None and plan.unknown_agent == "refuse":
            raise Refused("model_not_found", "the policy serves no unknown agents")
        agent = found or plan.agents[plan.default_agent]
        if key is not None and key.agents and agent.name not in key.agents:
            raise Refused("agent_not_allowed", "the key may not use it")
        if found is None:
            return agent, "baseline"
        # What the headers say of a caller who is not trusted is passed over.
        if record.variant_from != "override" or (key is not None and not key.trusted):
            return agent, None
        if not plan.overrides.variant:
            raise Refused("override_not_allowed", "the policy lets no caller choose the variant")
        return agent, record.variant

    def _decide(
        self, record: CallRecord, agent: AgentPlan, forced: Variant | None, route: Route, before: Ending,
        assumed: set[Assumption],
    ) -> Ending:  # fmt: skip
        if forced is None and not self._is_bucket_known(record, agent):
            assumed.add("bucket_unknown")
            self._spend(self.after, record)
            return before
        variant, _, _, chain = self.plan.assign_bucket(agent, record.bucket, variant=forced)
        if before.end == "left" or (before.end == "refused" and record.error not in LIFTED):
            # The caller would have left, and the kill switch stopped it, under any policy.
            self._spend(self.after, record)
            return before._replace(variant=variant)
        key = record.key if self.plan.keys else ""
        on = Dimensions(agent.name, key, record.user, record.operation, chain[0].ref, variant)
        return _Walk(self, record, route, before, on, assumed).down(self._cheaper_first(record, on, chain))

    def _at_its_share(self, agent: AgentPlan, record: CallRecord, assumed: set[Assumption]) -> AgentPlan:
        """The agent at the share by which the arm of this call is decided.

        That of a rollout is state, and a policy only says where it starts: where it says the same, the share stays.
        """
        share_bps = agent.share_bps if self._share_bps is None else self._share_bps
        was = self.was.agents.get(agent.name)
        starts_alike = self.was.is_experiment and was is not None and was.share_bps == agent.share_bps
        if self._share_bps is None and record.stage and record.share_bps is not None and starts_alike:
            if record.share_bps != share_bps:
                assumed.add("share_kept")
            share_bps = record.share_bps
        return agent if share_bps == agent.share_bps else agent._replace(share_bps=share_bps)

    def _is_bucket_known(self, record: CallRecord, agent: AgentPlan) -> bool:
        """Whether the recorded bucket is that of this agent's salt, or does not matter."""
        if not (self.plan.use_finetuned and self.plan.is_experiment) or agent.name == RAW_AGENT:
            return True
        was = self.was.agents.get(agent.name)
        same_salt = was is None or was.salt == agent.salt
        return same_salt or record.bucket is None or agent.share_bps in (0, BUCKETS)

    def _cheaper_first(self, record: CallRecord, on: Dimensions, chain: tuple[Target, ...]) -> tuple[Target, ...]:
        """The chain with a cheaper model in front where a cap's share from which to use it is reached."""
        for rule in self.after.rules:
            if rule.over_share is None or not rule.applies(on):
                continue
            place = place_of(rule, on, record.at_ms)
            used = self.after.used(place)
            is_over = used >= rule.over_share * rule.limit
            # What calls in flight held counted, too. Where the account stands as it stood, the record knows better.
            if self.was_rules.get(rule.id) == rule and used == self.before.used(place):
                is_over = record.switched_by == rule.label or (is_over and bool(record.switched_by))
            cheaper = self.plan.targets.find(rule.use) if is_over else None
            if cheaper is not None:
                others = [target for target in chain if target.ref != cheaper.ref]
                return (cheaper, *others) if len(chain) > 1 else (cheaper,)
        return chain

    # --- What was spent ----------------------------------------------------------------------------------------------

    def _before(self, record: CallRecord, route: Route) -> Ending:
        """How the call ended, with the cap that most likely refused it: the record does not name it."""
        ending = ending_of(record)
        if ending.end == "refused" and record.error in SHORT:
            rule = self.before.tightest(on_of(record, next_ref(record, route)), record.at_ms)
            return ending._replace(why=rule.label) if rule is not None else ending
        return ending

    def _note(self, record: CallRecord) -> None:
        self._spend(self.before, record)
        usage = record.usage
        if usage is not None:
            calls, prompt, completion = self._usage.get(record.agent, (0, 0, 0))
            self._usage[record.agent] = calls + 1, prompt + usage.prompt_tokens, completion + usage.completion_tokens

    def _spend(self, spending: Spending, record: CallRecord) -> None:
        for attempt, amounts in taken(record):
            spending.add(on_of(record, attempt.ref), amounts, reserved_ms(record, attempt))


class _Walk:
    """One call's way down its new chain, spending as it goes."""

    def __init__(
        self, replayer: Replayer, record: CallRecord, route: Route, before: Ending, on: Dimensions,
        assumed: set[Assumption],
    ) -> None:  # fmt: skip
        self._replayer = replayer
        self._record, self._route, self._before = record, route, before
        self._on = on
        self._assumed = assumed
        self._tries: dict[str, list[Attempt]] = {}
        for attempt in record.attempts:
            self._tries.setdefault(attempt.ref, []).append(attempt)
        self._answer = record.attempts[-1] if before.end == "answered" and record.attempts else None
        self._requests = 1
        self._at_ms = record.at_ms
        self._model = self._fault = ""
        self._cost_nusd = self._tokens = 0

    def down(self, chain: tuple[Target, ...]) -> Ending:
        """Model after model, until one answers or there is no more."""
        for target in chain:
            if target.ref in self._tries:
                ending = self._again(target)
            elif target.ref in self._route.closed:
                self._assumed.add("failed_again")
                ending = None
            else:
                ending = self._anew(target)
            if ending is not None:
                return ending
        if self._before.end == "refused":
            # It was refused at a further try of the same model.
            return self._anew(chain[-1])
        return self._ended("failed", self._fault or "not available")

    def _again(self, target: Target) -> Ending | None:
        """What the model did to this call, it does again; None: on to the next."""
        tries = self._tries[target.ref]
        for attempt in tries:
            self._at_ms = reserved_ms(self._record, attempt)
            nusd = self._repriced(target, attempt) if attempt is self._answer else attempt.cost_nusd
            amounts = Amounts() if is_void(attempt) else Amounts(nusd, self._requests, attempt.tokens)
            refused = self._take(target, amounts)
            if refused is not None or attempt is self._answer:
                return refused or self._ended("answered")
            self._assumed.add("failed_again")
            self._fault = str(attempt.fault)
        fault = tries[-1].fault
        gives_up = fault is not None and REMEDIES[fault].then is Then.GIVE_UP
        return self._ended("failed", self._fault) if gives_up else None

    def _anew(self, target: Target) -> Ending:
        """The record does not know this model for this call: it answers, if there is the money."""
        if self._record.error in SHORT and self._is_still_short():
            return self._ended("refused", self._before.why)
        refused = self._take(target, self._estimated(target))
        return refused or self._ended("answered")

    def _take(self, target: Target, amounts: Amounts) -> Ending | None:
        """Spend what an attempt takes; or the refusal, and then it is not begun."""
        spending, on = self._replayer.after, self._on
        if on.model != target.ref:
            on = on._replace(model=target.ref)
        if target.price is None and any(rule.unit == "usd" and rule.applies(on) for rule in spending.rules):
            return self._ended("refused", "model_not_priced")
        rule = spending.take(on, amounts, self._at_ms)
        if rule is not None:
            return self._ended("refused", rule.label)
        self._requests -= amounts.requests
        self._cost_nusd += amounts.nusd
        self._tokens += amounts.tokens
        self._model = target.ref
        return None

    def _is_still_short(self) -> bool:
        """Whether the cap that refused the call, as far as one can tell, has no more left than it had then.

        How much the call would have wanted to hold is not recorded, only that it was more than there was.
        """
        record, replayer = self._record, self._replayer
        on = on_of(record, next_ref(record, self._route))
        was = replayer.before.tightest(on, record.at_ms)
        rule = replayer.rules.get(was.id) if was is not None else None
        if was is None or rule is None:
            return False
        return replayer.after.left(rule, on, record.at_ms) <= replayer.before.left(was, on, record.at_ms)

    def _repriced(self, target: Target, attempt: Attempt) -> int:
        """What the recorded answer costs now."""
        usage = self._record.usage
        if self._replayer.has_same_price(self._record, self._on.agent, target):
            return attempt.cost_nusd
        if target.price is None:
            self._assumed.add("price_unknown")
            return 0
        if usage is None:
            self._assumed.add("cost_kept")
            return attempt.cost_nusd
        return cost_nusd(target.price, usage)

    def _estimated(self, target: Target) -> Amounts:
        """What a model is taken to use of which the record says nothing: what the one that answered did use."""
        usage = self._record.usage
        if usage is None and self._answer is not None:
            self._assumed.add("cost_kept")
            return Amounts(self._answer.cost_nusd, self._requests, self._answer.tokens)
        if usage is None:
            usage = self._replayer.usage_of(self._record.agent)
            self._assumed.add("usage_unknown" if usage is None else "usage_estimated")
        used = usage or Usage()
        if target.price is None:
            self._assumed.add("price_unknown")
        nusd = cost_nusd(target.price, used) if target.price is not None and usage is not None else 0
        return Amounts(nusd, self._requests, used.prompt_tokens + used.completion_tokens)

    def _ended(self, end: Literal["answered", "refused", "failed"], why: str = "") -> Ending:
        variant: Variant = "finetuned" if self._on.variant == "finetuned" else "baseline"
        return Ending(variant, self._model, end, why, self._cost_nusd, self._tokens)


def _rates(price: Price | None) -> Price | None:
    """A price without where it is from."""
    return None if price is None else msgspec.structs.replace(price, source="")
