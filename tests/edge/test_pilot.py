"""The pilot: it takes the steps that the evidence calls for, alone among its kind, and none on no evidence."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway.decide.plan import Plan
from gateway.decide.rollout_by_hand import Order, pause
from gateway.decide.rollout_evidence import Look
from gateway.domain.rollout import PILOT, Change, Event, Phase, RolloutState
from gateway.edge import pilot as piloting
from gateway.edge.looking import look_beside
from gateway.edge.pilot import Pilot
from gateway.store.experiments import Experiments
from gateway.store.rollouts import LEAD_MS
from tests.journey import PATIENCE_S
from tests.running import RunningGateway, running_gateway
from tests.scripted import Turn, scripted
from tests.steering import MANUAL, ROLLOUT, Clock, bring, of_agent, told, users_at

AGENT = "qa_agent"
HOUR_S = 3600.0
GOOD: dict[str, Any] = {}
BAD = {"success": (0.97, 0.5)}
SKEWED = {"dropped": 0.5}
TAKES_NOTHING_BACK = MANUAL.replace("[rollout]", '[rollout]\nrollback_on = "nothing"')


class Bridge:
    """A gateway whose own pilot has gone, and pilots at a time that is handed in."""

    def __init__(self, gateway: RunningGateway, store: Path) -> None:
        self.gateway, self.store, self.clock = gateway, store, Clock()

    def pilot(self, holder: str = "one") -> Pilot:
        return Pilot(self.gateway.runtime, self.store, holder=holder, clock=self.clock)

    @property
    def state(self) -> RolloutState:
        return told(self.store)[0][AGENT]

    @property
    def changes(self) -> list[Change]:
        return of_agent(told(self.store)[1], AGENT)

    def bring(self, **seen: Any) -> None:
        bring(self.store, users_at(self.state, **seen))


@asynccontextmanager
async def bridge(tmp_path: Path, policy: str = ROLLOUT) -> AsyncIterator[Bridge]:
    async with running_gateway(tmp_path, policy=policy) as gateway:
        own = gateway.gateway._pilot
        assert own is not None
        await own.stop()
        here = Bridge(gateway, tmp_path / "gateway.db")
        # From when its rollouts began, by the clock of the gateway.
        here.clock.now_ms = here.state.share_since_ms
        yield here


# Seven processes, one after the other, at the low priority that looks have: where much else is to be done, they wait.
@pytest.mark.timeout(300)
async def test_on_good_evidence_it_climbs_stage_by_stage_to_the_end_and_each_step_is_audited(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        pilot = here.pilot()
        for _ in range(6):
            here.bring()
            here.clock.passes(HOUR_S)
            await pilot.step()
        await pilot.stop()
        assert [change.share_bps for change in here.changes] == [1000, 2500, 5000, 7500, 9500, 9500]
        assert [change.event for change in here.changes] == ["began", *["raised"] * 4, "completed"]
        for change in here.changes[1:]:
            assert change.by == PILOT
            assert any("2 guardrails hold" in reason for reason in change.reasons)
            assert "success rate" in change.evidence
        assert here.state.phase is Phase.COMPLETED
        # The next look changes nothing.
        before = told(here.store)
        await here.pilot().step()
        assert told(here.store) == before


@pytest.mark.parametrize("policy", [ROLLOUT, MANUAL], ids=["automatic", "manual"])
async def test_a_breach_is_taken_back_at_the_next_look_and_told(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def slack(turn: Turn) -> None:
        heard.put_nowait(turn.json()["text"])
        await turn.reply(b"ok")

    async with scripted(slack) as receiver:
        alerting = f'[alerting]\nenabled = true\nslack_webhook = "{receiver.base_url}/hook"\n'
        async with bridge(tmp_path, policy + alerting) as here:
            here.bring(**BAD)
            # Long before it has baked.
            here.clock.passes(60)
            pilot = here.pilot()
            with caplog.at_level(logging.ERROR, "gateway"):
                await pilot.step()
            assert (here.state.phase, here.state.share_bps) == (Phase.ROLLED_BACK, 0)
            assert "past the guardrail of 10 points less" in here.changes[-1].reasons[0]
            (line,) = [record.message for record in caplog.records]
            assert line.startswith("Rollout of qa_agent: rolled_back, 10 % -> 0 %, by pilot: success rate")
            async with asyncio.timeout(PATIENCE_S):
                assert (await heard.get()).startswith("Rollout of qa_agent: rolled_back, 10 %")
            # It stays there, whatever comes.
            before = told(here.store)
            here.clock.passes(24 * HOUR_S)
            await pilot.step()
            assert told(here.store) == before


class Slow(Clock):
    """Whatever is done takes five hours: longer than evidence may be old."""

    def __call__(self) -> float:
        self.passes(5 * HOUR_S)
        return super().__call__()


async def test_a_look_that_takes_long_is_acted_on_all_the_same(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**BAD)
        here.clock = Slow(here.clock.now_ms)
        await here.pilot().step()
        assert here.state.phase is Phase.ROLLED_BACK


async def test_users_who_do_not_arrive_as_assigned_hold_it(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        here.bring(users=6_000, **SKEWED)
        here.clock.passes(HOUR_S)
        await here.pilot().step()
        assert (here.state.phase, here.state.share_bps) == (Phase.HOLD, 1000)
        assert "the arms do not have the users they should" in here.changes[-1].reasons[0]


@pytest.mark.parametrize(
    ("policy", "seen", "after_s"),
    [
        (ROLLOUT, None, 30 * 24 * HOUR_S), (ROLLOUT, GOOD, HOUR_S - 1), (ROLLOUT, {"users": 400}, HOUR_S),
        (MANUAL, GOOD, HOUR_S), (TAKES_NOTHING_BACK, BAD, HOUR_S),
    ],
    ids=["no data", "not baked", "too few users", "manual", "told to take nothing back"],
)  # fmt: skip
async def test_otherwise_it_stays(tmp_path: Path, policy: str, seen: dict[str, Any] | None, after_s: float) -> None:
    async with bridge(tmp_path, policy) as here:
        if seen is not None:
            here.bring(**seen)
        before = told(here.store)
        here.clock.passes(after_s)
        await here.pilot().step()
        assert told(here.store) == before


async def test_in_manual_mode_users_who_do_not_arrive_as_assigned_are_noted_and_nobody_is_moved(tmp_path: Path) -> None:
    async with bridge(tmp_path, MANUAL) as here:
        here.bring(users=6_000, **SKEWED)
        here.clock.passes(HOUR_S)
        pilot = here.pilot()
        for _ in range(2):
            await pilot.step()
        assert [change.event for change in here.changes] == [Event.BEGAN, Event.MISMATCHED]
        assert (here.state.phase, here.state.share_bps, here.state.has_mismatch) == (Phase.RAMPING, 1000, True)


async def test_what_a_person_paused_on_a_breach_stays_and_the_breach_is_shown(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        with Experiments(here.store, clock=here.clock) as experiments:
            decided = pause(here.state, Order("ann", here.clock.now_ms))
            assert getattr(decided, "change", None) is not None
            experiments.apply("dev", decided.change)  # type: ignore[union-attr, arg-type]
        here.bring(**BAD)
        pilot = here.pilot()
        await pilot.step()
        assert here.state.phase is Phase.PAUSED
        figures = {declared.name: values for declared, values in pilot.figures()}
        assert (("qa_agent",), -1.0) in figures["gateway_rollout_recommendation"]
        assert figures["gateway_pilot_is_leading"] == [((), 1.0)]


@pytest.mark.parametrize(
    ("policy", "seen", "is_step_taken"),
    [
        (MANUAL, GOOD, False), (ROLLOUT.replace("min_users = 50", "min_users = 5000"), GOOD, False),
        (TAKES_NOTHING_BACK, BAD, False), ("[models]\nuse_finetuned = true\n", GOOD, False),
        (ROLLOUT + "# Nothing else.\n", GOOD, True),
    ],
    ids=["manual", "more users", "nothing is taken back", "no experiment", "the same"],
)  # fmt: skip
async def test_no_step_is_taken_under_a_policy_that_a_reload_replaced_during_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, seen: dict[str, Any], is_step_taken: bool
) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**seen)
        here.clock.passes(HOUR_S)
        before = told(here.store)

        async def look_and_reload(*asked: Any, **at: Any) -> Sequence[Look]:
            looks = await look_beside(*asked, **at)
            await here.gateway.reload(policy=policy)
            return looks

        monkeypatch.setattr(piloting, "look_beside", look_and_reload)
        pilot = here.pilot()
        await pilot.step()
        assert (told(here.store) != before, AGENT in pilot.recommended) == (is_step_taken, is_step_taken)


# --- One leader ------------------------------------------------------------------------------------------------------


async def test_of_two_pilots_one_acts_and_the_other_follows_when_its_time_is_over(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        one, two = here.pilot("one"), here.pilot("two")
        await one.step()
        here.bring(**BAD)
        before = told(here.store)
        await two.step()
        assert (one.is_leading, two.is_leading, two.recommended) == (True, False, {})
        assert told(here.store) == before
        # The first one is never heard of again.
        here.clock.passes(LEAD_MS / 1000 - 1)
        await two.step()
        assert told(here.store) == before
        here.clock.passes(1)
        await two.step()
        assert two.is_leading
        assert here.state.phase is Phase.ROLLED_BACK


async def test_who_looks_for_long_leads_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bridge(tmp_path) as here:
        one, two = here.pilot("one"), here.pilot("two")
        led: list[tuple[bool, bool]] = []

        async def looks_for_long(*asked: Any, **at: Any) -> Sequence[Look]:
            # Ten times as long as anybody is waited for.
            for _ in range(20):
                here.clock.passes(LEAD_MS / 2000)
                renewed.clear()
                await asyncio.wait_for(renewed.wait(), PATIENCE_S)
                await two.step()
                led.append((one.is_leading, two.is_leading))
            return await look_beside(*asked, **at)

        renewed = asyncio.Event()
        leads = one._leads

        async def leads_and_says_so(plan: Plan) -> bool:
            is_leading = await leads(plan)
            renewed.set()
            return is_leading

        monkeypatch.setattr(one, "_leads", leads_and_says_so)
        monkeypatch.setattr(piloting, "RENEW_S", 0.01)
        monkeypatch.setattr(piloting, "look_beside", looks_for_long)
        here.bring(**BAD)
        await one.step()
        assert led == [(True, False)] * 20
        assert here.state.phase is Phase.ROLLED_BACK


async def test_who_was_taken_for_gone_during_a_look_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bridge(tmp_path) as here:
        one, two = here.pilot("one"), here.pilot("two")

        async def stands_still(*_: Any, **__: Any) -> Sequence[Look]:
            here.clock.passes(LEAD_MS / 1000)
            monkeypatch.setattr(piloting, "look_beside", look_beside)
            await two.step()
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        monkeypatch.setattr(piloting, "RENEW_S", 0.01)
        monkeypatch.setattr(piloting, "look_beside", stands_still)
        await asyncio.wait_for(one.step(), PATIENCE_S)
        assert (one.is_leading, two.is_leading) == (False, True)
        assert "another gateway has taken the lead during a look" in caplog.text


async def test_between_looks_the_lead_is_kept_and_one_that_is_free_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piloting, "RENEW_S", 0.01)
    async with bridge(tmp_path) as here:
        one, two = here.pilot("one"), here.pilot("two")
        await one.step()
        resting = asyncio.create_task(one._rest(HOUR_S))
        await two.step()
        for _ in range(5):
            here.clock.passes(LEAD_MS / 2000)
            with Experiments(here.store, clock=here.clock) as experiments:
                async with asyncio.timeout(PATIENCE_S):
                    # Until it has said so again.
                    while not await asyncio.to_thread(_reaches, here.store, here.clock.now_ms + LEAD_MS):
                        pass
                assert not experiments.lead("dev", "two")
        # Never heard of again, long before the next look of either would be due.
        resting.cancel()
        here.clock.passes(LEAD_MS / 1000)
        await asyncio.wait_for(two._rest(HOUR_S), PATIENCE_S)
        await two.step()
        assert two.is_leading


def _reaches(store: Path, until_ms: float) -> bool:
    with closing(sqlite3.connect(store)) as database:
        (found,) = database.execute("SELECT until_ms FROM leaders").fetchone()
    return bool(found == until_ms)


async def test_who_stops_lets_another_lead_at_once(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        one, two = here.pilot("one"), here.pilot("two")
        await one.step()
        await one.stop()
        await two.step()
        assert (one.is_leading, two.is_leading) == (False, True)


async def test_what_was_decided_on_a_state_that_is_no_more_changes_nothing_and_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**BAD)
        plan, state = here.gateway.runtime.plan, here.state
        (look,) = await look_beside(here.store, "dev", [(state, plan.rollouts[AGENT])], now_ms=here.clock.now_ms)
        with Experiments(here.store, clock=here.clock) as experiments:
            decided = pause(state, Order("ann", here.clock.now_ms))
            experiments.apply("dev", decided.change)  # type: ignore[union-attr, arg-type]
        before = told(here.store)
        await here.pilot()._act(plan, [state], [look])
        assert told(here.store) == before
        assert "Rollout of" not in caplog.text


async def test_who_is_stopped_while_acting_ends_the_step_and_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**BAD)
        other = sqlite3.connect(here.store, isolation_level=None)

        async def look_and_lock(*asked: Any, **at: Any) -> Sequence[Look]:
            looks = await look_beside(*asked, **at)
            # Somebody else writes, so that the step has to wait.
            other.execute("BEGIN IMMEDIATE")
            return looks

        monkeypatch.setattr("gateway.edge.pilot.look_beside", look_and_lock)
        pilot = here.pilot()
        pilot.start()
        async with asyncio.timeout(PATIENCE_S):
            while pilot._acting is None:
                await asyncio.to_thread(lambda: None)
        stopping = asyncio.create_task(pilot.stop())
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
        other.close()
        await stopping
        assert here.state.phase is Phase.ROLLED_BACK
        assert "Rollout of qa_agent: rolled_back" in caplog.text


def children() -> list[str]:
    """The processes that this one has started and that are still there."""
    found: list[str] = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # It has ended since it was listed.
            found += (thread / "children").read_text().split()
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
async def test_who_is_stopped_while_looking_leaves_no_process_no_lead_and_no_half_step(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**BAD)
        before, own = told(here.store), children()
        one, two = here.pilot("one"), here.pilot("two")
        one.start()
        async with asyncio.timeout(PATIENCE_S):
            while children() == own:
                await asyncio.to_thread(lambda: None)
        await one.stop()
        assert children() == own
        assert told(here.store) == before
        await two.step()
        assert two.is_leading
        assert here.changes[-1].event is Event.ROLLED_BACK


# --- When something is wrong ------------------------------------------------------------------------------------------


async def test_a_store_that_is_away_is_told_of_once_and_is_not_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with bridge(tmp_path) as here:
        here.bring(**BAD)
        pilot = here.pilot()
        here.store.rename(tmp_path / "away.db")
        with caplog.at_level(logging.WARNING, "gateway.rollout"):
            for _ in range(3):
                await pilot.step()
            (line,) = [record.message for record in caplog.records]
            assert "no rollout is looked at until this is mended" in line
            assert "there is no ledger at" in line
            assert not here.store.exists()
            (tmp_path / "away.db").rename(here.store)
            await pilot.step()
            assert caplog.records[-1].message == "the rollouts are looked at again"
        assert here.state.phase is Phase.ROLLED_BACK


async def test_without_an_experiment_nobody_leads(tmp_path: Path) -> None:
    async with bridge(tmp_path) as here:
        pilot = here.pilot("one")
        await pilot.step()
        await here.gateway.reload(policy="[models]\nuse_finetuned = true\n")
        before = told(here.store)
        await pilot.step()
        assert (pilot.is_leading, pilot.recommended) == (False, {})
        assert told(here.store) == before
