"""A real gateway's journal, replayed: under its own policy nothing changes, under another what that one says."""

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiohttp import ClientSession

from gateway.config import Loaded, Paths, load
from gateway.decide.plan import Plan
from gateway.decide.replay import Replayed, Replayer
from gateway.domain.call import CallRecord
from gateway.domain.ledger import LedgerRow
from gateway.lab.replay import Findings, Journal, findings_of, plain, read_journal, replay_calls
from gateway.store.ledger import Ledger
from tests.running import CHAT, chat, running_gateway

FOREVER_MS = 2**60
AGENTS = """
[agents.qa_agent]
finetuned = "sim/fault:503@0.5-qa"
baseline  = "sim/simulator-small"
fallbacks = ["sim/simulator-large"]
defaults  = { max_tokens = 64 }

[agents.support_agent]
finetuned = "sim/ft:support"
baseline  = "sim/fault:cut@0.4"
defaults  = { max_tokens = 32 }

[agents.legal_agent]
finetuned = "sim/fault:400-filter@0.3"
baseline  = "sim/simulator-small"
defaults  = { max_tokens = 32 }
"""
PRICES = """
[prices."sim/*"]
input_usd_per_mtok  = "0.20"
output_usd_per_mtok = "0.80"
[prices."sim/simulator-large"]
input_usd_per_mtok  = "2"
output_usd_per_mtok = "8"
"""
POLICY = """
[models]
unknown_agent    = "baseline"
allow_raw_models = true
[ab_testing]
enabled            = true
rollout_percentage = {share}
[overrides]
variant  = true
fallback = true
[retries]
base_s = 0.001
[breakers]
consecutive = 3
open_s      = 30
[budget]
when_short = "refuse"
[[caps]]
scope    = "agent"
per      = "total"
usd      = "{usd}"
[[caps]]
scope    = "user"
per      = "total"
requests = {requests}
over_pct = 60
use      = "sim/cheap"
"""


def policy(*, share: float = 40, usd: str = "0.0015", requests: int = 6) -> str:
    return POLICY.format(share=share, usd=usd, requests=requests)


class Left:
    """What the gateway left behind when it had ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal"

    def load(self, policy: str | None = None) -> Loaded:
        """Its configuration, with its own policy or another."""
        file = None
        if policy is not None:
            file = self.folder / "other.toml"
            file.write_text(policy)
        paths = Paths(self.folder / "config.toml", self.folder / "policies")
        return load(paths, "dev", litellm_map={}, environ={}, policy_file=file)

    def read(self) -> Journal:
        return read_journal(self.journal, "dev", FOREVER_MS, lambda done: None)

    def replay(self, plan: Plan | None = None, **how: Any) -> list[Replayed]:
        was = self.load().plan
        return list(replay_calls(Replayer(was, plan or was, **how), self.read().calls, 0, lambda done: None))

    def rows(self) -> list[LedgerRow]:
        with Ledger(self.folder / "gateway.db", clock=lambda: 0.0, is_new_allowed=False) as ledger:
            return list(ledger.rows("dev"))

    def bytes(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


async def traffic(url: str) -> None:
    """Calls of every kind that a record can tell of."""
    async with ClientSession() as session:

        async def call(text: str, *, headers: dict[str, str] | None = None, **fields: Any) -> None:
            async with session.post(f"{url}{CHAT}", json=chat(text, **fields), headers=headers) as reply:
                await reply.read()

        for number in range(90):
            agent = ("qa_agent", "support_agent", "legal_agent")[number % 3]
            await call(f"question {number}", model=agent, user=f"u{number % 17}", stream=number % 4 == 0)
        for number in range(12):
            forced = {"x-gateway-variant": ("finetuned", "baseline")[number % 2]}
            await call(f"forced {number}", headers=forced, user=f"f{number % 3}")
        for number in range(4):
            await call(f"alone {number}", headers={"x-gateway-fallback": "off"}, user=f"a{number}")
            await call(f"whoever {number}", model="no_such_agent", user=f"w{number}")
            await call(f"raw {number}", model="sim/simulator-large", user=f"r{number}")
            await call(f"nobody {number}")
            await call(f"too many {number}", n=99)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def left(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Left]:
    folder = tmp_path_factory.mktemp("replay")
    async with running_gateway(folder, agents=AGENTS, policy=policy(), config=PRICES) as gateway:
        await traffic(gateway.data_url)
    yield Left(folder)


def kinds(records: list[CallRecord]) -> Counter[str]:
    """How many calls there are of each kind that matters here."""
    found: Counter[str] = Counter()
    for record in records:
        found[record.error or "answered"] += 1
        found[f"variant by {record.variant_from}"] += 1
        found["fallback"] += record.is_fallback
        found["fallback, nothing tried before"] += record.is_fallback and len(record.attempts) == 1
        found["retried"] += len(record.attempts) > len({attempt.ref for attempt in record.attempts})
        found["switched"] += bool(record.switched_by)
        found["in doubt"] += any(attempt.is_in_doubt for attempt in record.attempts)
    return found


def test_the_run_holds_what_a_replay_can_get_wrong(left: Left) -> None:
    found = kinds(left.read().calls)
    assert all(
        found[kind] >= 2
        for kind in (
            "answered", "budget_exceeded", "upstream_cut", "content_filter", "variant by override",
            "variant by unknown agent", "variant by no user", "fallback", "fallback, nothing tried before", "retried",
            "switched", "in doubt",
        )
    ), found  # fmt: skip


def test_under_the_policy_that_was_in_force_no_call_goes_otherwise(left: Left) -> None:
    """Over fallbacks, retries, open breakers, overrides, refusals by caps, cheaper models and what is in doubt."""
    replayed = left.replay()
    assert [one for one in replayed if one.before != one.after] == []
    assert [one.share_bps for one in replayed] == [one.record.share_bps for one in replayed]


def test_before_and_after_add_up_to_what_the_ledger_has(left: Left) -> None:
    found = findings_of(left.replay())
    spent = [row.amounts for row in left.rows()]
    for sums in (found.whole.before, found.whole.after):
        assert sums.cost_nusd == sum(amounts.nusd for amounts in spent) > 0
        assert sums.tokens == sum(amounts.tokens for amounts in spent)


def test_a_replay_writes_nothing(left: Left) -> None:
    before = left.bytes()
    left.replay(left.load().plan, share_bps=10_000)
    assert left.bytes() == before


def adds_up(found: Findings) -> None:
    """The agents' figures are the whole's, and each call has one end."""
    for when in ("before", "after"):
        whole = getattr(found.whole, when)
        parts = [getattr(moves, when) for moves in found.agents.values()]
        for name in whole.__struct_fields__:
            assert getattr(whole, name) == sum(getattr(part, name) for part in parts)
        assert whole.calls == whole.answered + whole.refused + whole.failed + whole.left
        assert sum(getattr(refusal, when) for refusal in found.refusals) == whole.refused
    assert found.whole.changed == sum(moves.changed for moves in found.agents.values())


@pytest.mark.parametrize(
    "other",
    [
        policy(share=0),
        policy(share=100),
        policy(usd="0.0001", requests=2),
        policy(usd="1000", requests=1000),
        "",
        "[models]\nuse_finetuned = false\n",
    ],
)
def test_totals_add_up_whatever_the_policy(left: Left, other: str) -> None:
    found = findings_of(left.replay(left.load(other).plan))
    adds_up(found)
    assert found.whole.changed > 0
    assert found.whole.before.calls == len(left.read().calls)


def test_raising_the_share_only_moves_users_from_the_baseline(left: Left) -> None:
    generous = {"usd": "1000", "requests": 1_000_000}
    one, two = (left.load(policy(share=share, **generous)).plan for share in (40, 80))  # type: ignore[arg-type]
    lower, higher = left.replay(one), left.replay(two)
    moved = Counter((low.after.variant, high.after.variant) for low, high in zip(lower, higher, strict=True))
    assert moved["baseline", "finetuned"] > 0
    assert moved["finetuned", "baseline"] == 0


def test_a_cap_that_is_lowered_refuses_and_says_from_when_on(left: Left) -> None:
    found = findings_of(left.replay(left.load(policy(requests=2)).plan))
    label = "user 2 requests in total"
    (refusal,) = [refusal for refusal in found.refusals if refusal.why == label]
    refused = [one for one in left.replay(left.load(policy(requests=2)).plan) if one.after.why == label]
    assert (refusal.before, refusal.after) == (0, len(refused))
    assert refusal.first_ms == refused[0].record.at_ms
    assert found.whole.after.answered < found.whole.before.answered


def test_a_cap_that_is_lifted_answers_what_it_refused(left: Left) -> None:
    found = findings_of(left.replay(left.load(policy(usd="1000", requests=1_000_000)).plan))
    assert found.whole.before.refused > found.whole.after.refused
    assert found.assumed["usage_estimated"] > 0


# --- The sums --------------------------------------------------------------------------------------------------------


def test_one_agent_s_calls_are_shown_and_the_others_still_count(left: Left) -> None:
    plan = left.load(policy(usd="0.0001", requests=2)).plan
    whole, one = findings_of(left.replay(plan)), findings_of(left.replay(plan), agent="qa_agent")
    adds_up(one)
    assert list(one.agents) == ["qa_agent"]
    assert one.agents["qa_agent"] == whole.agents["qa_agent"] == one.whole


def test_the_largest_changes_come_first_in_either_direction(left: Left) -> None:
    replayed = left.replay(left.load(policy(share=100)).plan)
    found = findings_of(replayed, limit=5).largest
    differences = sorted((abs(one.after.cost_nusd - one.before.cost_nusd) for one in replayed), reverse=True)
    assert [abs(change.difference_nusd) for change in found] == differences[:5]
    assert findings_of(replayed, limit=0).largest == []


def test_calls_before_the_time_are_not_replayed_but_have_spent(left: Left) -> None:
    calls = left.read().calls
    middle_ms = calls[len(calls) // 2].at_ms
    was, plan = left.load().plan, left.load(policy(usd="0.0001", requests=3)).plan
    later = list(replay_calls(Replayer(was, plan), calls, middle_ms, lambda done: None))
    assert [one.record for one in later] == [call for call in calls if call.at_ms >= middle_ms]
    alone = list(replay_calls(Replayer(was, plan), [one.record for one in later], 0, lambda done: None))
    ends = [Counter(one.after.end for one in found)["refused"] for found in (later, alone)]
    assert ends[0] > ends[1]


def test_a_shadow_is_no_call_of_anybody_s_but_has_spent(left: Left) -> None:
    real = next(call for call in left.read().calls if call.status == 200 and call.user)
    shadow = msgspec.structs.replace(real, id="s", shadow_of=real.id, variant_from="shadow")
    was, plan = left.load().plan, left.load(policy(requests=1)).plan
    (one,) = replay_calls(Replayer(was, was), [shadow, real], 0, lambda done: None)
    assert (one.record, one.after) == (real, one.before)
    (one,) = replay_calls(Replayer(was, plan), [shadow, real], 0, lambda done: None)
    assert one.after.why == "user 1 requests in total"


def test_only_the_calls_of_the_environment_and_the_time_are_read_and_progress_is_told(left: Left) -> None:
    calls = left.read().calls
    assert [call.at_ms for call in calls] == sorted(call.at_ms for call in calls)
    told: list[int] = []
    early = read_journal(left.journal, "dev", calls[10].at_ms, told.append)
    assert early.calls == [call for call in calls if call.at_ms < calls[10].at_ms]
    assert told == [len(calls)]
    assert read_journal(left.journal, "production", FOREVER_MS, told.append) == Journal([], len(calls), 0)


def test_a_torn_line_is_counted_and_the_rest_is_read(left: Left, tmp_path: Path) -> None:
    whole = b"".join(path.read_bytes() for path in sorted(left.journal.rglob("*.journal")))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "00000001.journal").write_bytes(whole + b'0badc0de {"event": "ca\n')
    found = read_journal(tmp_path, "dev", FOREVER_MS, lambda done: None)
    assert (len(found.calls), found.torn) == (len(left.read().calls), 1)


def test_machines_get_dollars_as_text_and_times_in_iso(left: Left) -> None:
    replayed = left.replay(left.load(policy(share=100)).plan)
    found = findings_of(replayed, limit=1)
    read = msgspec.json.decode(msgspec.json.encode(plain(found)))
    assert read["whole"]["before"]["calls"] == len(replayed)
    (change,) = read["largest"]
    assert change["at"].endswith("Z")
    assert change["after"]["variant"] == "finetuned"
    assert change["difference_usd"] == f"{found.largest[0].difference_nusd / 1e9:.9f}".rstrip("0")
