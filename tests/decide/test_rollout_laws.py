"""Whatever pilot, people and evidence do in whatever order, these laws of a rollout hold.

The decisions are those of decide/rollout.py and decide/rollout_by_hand.py, the users those of decide/assign.py.
"""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.decide.assign import BUCKETS, bucket_of, is_treated
from gateway.decide.rollout import Decision, advance, begin, recommendation
from gateway.decide.rollout_by_hand import Order, Refusal, next_stage, pause, rearm, resume, roll_back, set_share
from gateway.decide.rollout_evidence import Look
from gateway.domain.experiment import GuardVerdict, Verdict
from gateway.domain.rollout import PILOT, Change, Event, Phase, RolloutState, replay
from tests.rolling import AUTOMATIC, NOW_MS, Found, look_of, plan_of

USERS = [bucket_of("qa_agent", f"user-{number}") for number in range(300)]
PLANS = {
    mode + on: plan_of(AUTOMATIC.replace("automatic", mode) + f'rollback_on = "{on}"', start=start)
    for mode, on, start in (
        ("automatic", "breached", 10), ("automatic", "worse", 0), ("automatic", "nothing", 12.5),
        ("manual", "breached", 10),
    )
}  # fmt: skip
GUARDS: list[GuardVerdict] = ["holds", "holds", "holds", "breached", "undecided", "too few"]
VERDICTS: list[Verdict] = ["better", "worse", "undecided", "too few"]


@st.composite
def looks(draw: st.DrawFn) -> tuple[Found, Found, bool, tuple[int, int], int, int] | None:
    """What a look may find: two guardrails, a mismatch, users, age in ms, and how many stages ago it was made."""
    if draw(st.integers(0, 5)) == 0:
        return None
    found = [Found(draw(st.sampled_from(GUARDS)), draw(st.sampled_from(VERDICTS))) for _ in range(2)]
    users = draw(st.sampled_from([(0, 0), (99, 100), (100, 100), (100, 100), (5_000, 800)]))
    age_ms, back = draw(st.sampled_from([0, 0, 0, 119_999, 200_000])), draw(st.sampled_from([0, 0, 0, 1]))
    return found[0], found[1], draw(st.integers(0, 4)) == 0, users, age_ms, back


class Rollouts(RuleBasedStateMachine):
    """A rollout, its audit log beside it, and what each step must not do."""

    @initialize(plan=st.sampled_from(sorted(PLANS)))
    def begins(self, plan: str) -> None:
        self.plan = PLANS[plan]
        self.now_ms = NOW_MS
        first = begin("qa_agent", plan=self.plan, now_ms=self.now_ms)
        assert first.change is not None
        self.state: RolloutState = first.state
        self.log: list[Change] = [first.change]
        self.mismatched: set[int] = set()

    @rule(ms=st.sampled_from([1, 30_000, 1_800_000, 3_600_000, 90_000_000]))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms

    @rule(seen=looks())
    def the_pilot_looks(self, seen: tuple[Found, Found, bool, tuple[int, int], int, int] | None) -> None:
        look, before = self.look(seen), self.state
        decision = advance(before, look, now_ms=self.now_ms, plan=self.plan)
        assert decision == advance(before, look, now_ms=self.now_ms, plan=self.plan), "the same twice"
        self.take(decision, PILOT)
        share = self.state.share_bps
        if look is not None and look.evidence.mismatch.is_found and self.now_ms - look.at_ms <= 120_000:
            self.mismatched.add(before.experiment)
        if before.phase in (Phase.BASELINE, Phase.PAUSED, Phase.ROLLED_BACK):
            where = (self.state.phase, share, self.state.by, self.state.why)
            assert where == (before.phase, before.share_bps, before.by, before.why), "a person has it in hand"
        if before.experiment in self.mismatched:
            assert self.state.has_mismatch or self.state.phase is Phase.ROLLED_BACK, "what was found stays found"
            assert share <= before.share_bps
            assert decision.action not in ("cleared", "completed")
        if share > before.share_bps:
            assert self.plan.is_automatic
            assert share in [stage.share_bps for stage in self.plan.stages], "only the plan's shares"
            assert look is not None, "never without evidence"
            assert (look.experiment, look.stage) == (before.experiment, before.stage)
            assert self.now_ms - look.at_ms <= 120_000
            assert min(look.users_treated, look.users_control) >= 100
            assert not look.evidence.mismatch.is_found
            assert not before.has_mismatch
            assert all(finding.guard == "holds" for finding in look.evidence.findings if finding.guardrail)
            assert self.now_ms - before.share_since_ms >= 3_600_000
            assert recommendation(before, look, now_ms=self.now_ms, plan=self.plan).word == "proceed"
        if share < before.share_bps:
            assert (share, self.state.phase) == (0, Phase.ROLLED_BACK)
            assert recommendation(before, look, now_ms=self.now_ms, plan=self.plan).word == "roll back"

    @rule(
        seen=looks(),
        percent=st.sampled_from([0, 5, 10, 12.5, 25, 50, 60, 95, 100, -1, 101]),
        is_forced=st.booleans(),
        why=st.sampled_from(["", "I know better"]),
    )
    def a_person_sets_a_share(
        self, seen: tuple[Found, Found, bool, tuple[int, int], int, int] | None, percent: float, is_forced: bool,
        why: str,
    ) -> None:  # fmt: skip
        order = Order("ann", self.now_ms, why, is_forced=is_forced)
        before, look = self.state, self.look(seen)
        found = set_share(before, percent, order, look=look, plan=self.plan)
        if percent < 0 or percent > 100:
            assert isinstance(found, Refusal)
        elif percent * 100 < before.share_bps:
            assert isinstance(found, Decision), "lowering is always allowed"
        self.take(found, "ann")
        if self.state.share_bps > before.share_bps:
            assert before.phase is not Phase.ROLLED_BACK
            said = recommendation(before, look, now_ms=self.now_ms, plan=self.plan).word
            assert said != "roll back" or (is_forced and why and self.state.phase is Phase.PAUSED)

    @rule(
        seen=looks(),
        what=st.sampled_from(["next", "pause", "resume", "back", "rearm"]),
        is_forced=st.booleans(),
    )
    def a_person_orders(
        self, seen: tuple[Found, Found, bool, tuple[int, int], int, int] | None, what: str, is_forced: bool
    ) -> None:
        order, look, before = Order("ann", self.now_ms, "because", is_forced=is_forced), self.look(seen), self.state
        found = {
            "next": lambda: next_stage(before, order, look=look, plan=self.plan),
            "pause": lambda: pause(before, order),
            "resume": lambda: resume(before, order, look=look, plan=self.plan),
            "back": lambda: roll_back(before, order, look=look),
            "rearm": lambda: rearm(before, order),
        }[what]()
        self.take(found, "ann")
        assert self.state.share_bps <= before.share_bps or what == "next"
        if before.phase is Phase.ROLLED_BACK and what != "rearm":
            assert self.state == before, "nothing rises from a rollback but a new experiment"

    @invariant()
    def the_log_tells_the_whole_story(self) -> None:
        if hasattr(self, "log"):
            lines = [msgspec.json.encode(change) for change in self.log]
            assert replay(msgspec.json.decode(line, type=Change) for line in lines) == self.state

    @invariant()
    def the_state_makes_sense(self) -> None:
        if not hasattr(self, "state"):
            return
        assert 0 <= self.state.share_bps <= self.plan.ceiling_bps, "the holdback is kept"
        assert (self.state.share_bps == 0) is (self.state.phase in (Phase.BASELINE, Phase.ROLLED_BACK))
        assert self.state.experiment == 1 + sum(change.event is Event.REARMED for change in self.log)
        assert self.state.first_stage <= self.state.stage <= self.state.version

    def look(self, seen: tuple[Found, Found, bool, tuple[int, int], int, int] | None) -> Look | None:
        if seen is None:
            return None
        success, latency, is_mismatch, users, age_ms, back = seen
        look = look_of(
            self.state, self.now_ms - age_ms, plan=self.plan, users=users, is_mismatch=is_mismatch,
            success_rate=success, p95_latency=latency,
        )  # fmt: skip
        return look._replace(stage=self.state.stage - back)

    def take(self, found: Decision | Refusal, by: str) -> None:
        """What the store would do; and what holds for every step and every refusal."""
        assert found.reasons
        assert all(reason.strip() for reason in found.reasons)
        if isinstance(found, Refusal) or found.change is None:
            assert isinstance(found, Refusal) or found.state == self.state
            return
        assert found.change.by == by
        assert found.state.version == self.state.version + 1
        before, after = self.treated(self.state.share_bps), self.treated(found.state.share_bps)
        if found.state.share_bps >= self.state.share_bps:
            assert before <= after, "raising only adds users"
        else:
            last_added = {
                number for number in before if found.state.share_bps <= USERS[number] < self.state.share_bps
            }  # fmt: skip
            assert before - after == last_added, "lowering takes back exactly the last ones added"
        self.state = found.state
        self.log.append(found.change)

    def treated(self, share_bps: int) -> set[int]:
        assert 0 <= share_bps <= BUCKETS
        return {number for number, bucket in enumerate(USERS) if is_treated(bucket, share_bps)}


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
