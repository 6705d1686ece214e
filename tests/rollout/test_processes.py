"""Four real gateways on one store: a change reaches all, and who was treated stays so while the share rises.

Users are those around the shares, so that one who is moved wrongly is seen. What comes of itself is polled for.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from gateway.decide.assign import bucket_of, is_treated
from tests.process import PATIENCE_S, ROOT, Files, Process, process
from tests.scripted import says, scripted
from tests.steering import MANUAL, told

POLICY = MANUAL.replace("check_every_s = 3600", "check_every_s = 1")
SHARES = (1000, 2500, 5000)


def users_around(shares: tuple[int, ...]) -> dict[str, int]:
    """For each share the last user it treats and the first it does not, of many: name and bucket."""
    buckets = {f"u{number}": bucket_of("qa_agent", f"u{number}") for number in range(4_000)}
    found: dict[str, int] = {}
    for share in shares:
        inside = max((bucket, user) for user, bucket in buckets.items() if bucket < share)
        outside = min((bucket, user) for user, bucket in buckets.items() if bucket >= share)
        found |= {user: bucket for bucket, user in (inside, outside)}
    return found


USERS = users_around(SHARES)


class Fleet:
    """Gateways that share a store."""

    def __init__(self, files: Files, members: list[Process]) -> None:
        self.files, self.members = files, members

    async def shows(self, line: str) -> None:
        """Wait until every member shows this figure."""
        async with asyncio.timeout(PATIENCE_S):
            while not all([await member.metric(line) for member in self.members]):
                pass

    async def has_share(self, share_bps: int) -> None:
        await self.shows(f'gateway_rollout_share{{agent="qa_agent"}} {share_bps / 10_000}')

    async def check_arms(self, share_bps: int) -> None:
        """Every member gives every user the arm that bucket and share say, and tells that share."""
        for member in self.members:
            for user, bucket in USERS.items():
                async with member.post(user=user) as response:
                    wanted = "finetuned" if is_treated(bucket, share_bps) else "baseline"
                    assert (response.status, response.headers["x-gateway-variant"]) == (200, wanted)

    async def command(self, *arguments: str) -> tuple[int, str, str]:
        """`gateway ...`: exit status, stdout, stderr."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *arguments, "--env", "dev",
            cwd=self.files.folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, complaint = await asyncio.wait_for(child.communicate(), PATIENCE_S)
        assert child.returncode is not None
        return child.returncode, said.decode(), complaint.decode()

    async def order(self, action: str, **said: Any) -> tuple[int, Any]:
        """An order over HTTP, at the last member."""
        member = self.members[-1]
        url = f"{member.admin_url}/admin/rollout/qa_agent/{action}"
        async with asyncio.timeout(PATIENCE_S), member.session.post(url, json=said) as response:
            return response.status, await response.json()


@asynccontextmanager
async def fleet(tmp_path: Path, count: int = 4) -> AsyncIterator[Fleet]:
    async with scripted(says("Paris")) as provider, AsyncExitStack() as stack:
        files = Files(tmp_path, provider)
        files.write_policy(POLICY)
        members = [await stack.enter_async_context(process(files)) for _ in range(count)]
        yield Fleet(files, members)


async def test_a_change_reaches_all_and_moves_only_whom_it_must(tmp_path: Path) -> None:
    async with fleet(tmp_path) as here:
        await here.has_share(1000)
        await here.check_arms(1000)
        status, said, _ = await here.command("rollout", "set", "25", "--why", "a try")
        assert status == 0
        assert "10 % -> 25 % (a try)" in said
        await here.has_share(2500)
        await here.check_arms(2500)
        status, found = await here.order("set", percent=50, why="more", who="ann")
        assert (status, found["change"]["share_percent"]) == (200, 50.0)
        await here.has_share(5000)
        await here.check_arms(5000)

        # A member is killed, another one is told to read its files again, one comes back: the share stays.
        here.members[0].child.kill()
        await here.members[0].ended()
        here.files.write_policy(POLICY.replace("rollout_percentage = 10", "rollout_percentage = 90"))
        for member in here.members[1:]:
            member.child.send_signal(signal.SIGHUP)
            warning = await member.logged("ab_testing.rollout_percentage is 90 now")
            assert "qa_agent at 50 %. `gateway rollout set 90` changes that" in str(warning)
            await member.logged("configuration reloaded")
        async with process(here.files) as back:
            here.members[0] = back
            await here.has_share(5000)
            await here.check_arms(5000)
            # Lowering returns exactly those that were added last.
            status, found = await here.order("set", percent=25)
            assert (status, found["change"]["phase"]) == (200, "paused")
            await here.has_share(2500)
            await here.check_arms(2500)
            status, _, _ = await here.command("rollout", "rollback", "--why", "enough")
            assert status == 0
            await here.has_share(0)
            await here.check_arms(0)
            for name, value in (("rolled_back", "1.0"), ("ramping", "0.0")):
                await here.shows(f'gateway_rollout_phase{{agent="qa_agent",phase="{name}"}} {value}')
        _, changes = told(tmp_path / "gateway.db")
        assert [change.event for change in changes] == ["began", "raised", "raised", "lowered", "rolled_back"]
        # Each call was counted at the share that was in force for it.
        shares = {record.stage: record.share_bps for record in here.files.records()}
        assert shares == {1: 1000, 2: 2500, 3: 5000, 4: 2500, 5: 0}


async def test_one_leads_and_when_it_ends_another_does(tmp_path: Path) -> None:
    async with fleet(tmp_path, 2) as here:

        async def leading() -> list[bool]:
            return [
                await member.metric("gateway_pilot_is_leading 1.0")
                for member in here.members
                if member.child.returncode is None
            ]

        async with asyncio.timeout(PATIENCE_S):
            while (who := await leading()) not in ([True, False], [False, True]):
                pass
        leader = here.members[who.index(True)]
        leader.child.send_signal(signal.SIGTERM)
        assert await leader.ended() == 0
        async with asyncio.timeout(PATIENCE_S):
            while await leading() != [True]:
                pass


async def test_a_switched_on_experiment_counts_its_first_call_already(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            await gateway.ask(user="u1")
            files.write_policy(POLICY)
            gateway.child.send_signal(signal.SIGHUP)
            await gateway.logged("configuration reloaded")
            await gateway.ask(user="u1")
        before, after = files.records()
        assert (before.experiment, before.stage) == (0, 0)
        assert (after.experiment, after.stage, after.share_bps) == (1, 1, 1000)


async def test_explain_tells_the_share_in_force_or_that_it_is_only_the_start(tmp_path: Path) -> None:
    async with fleet(tmp_path, 1) as here:
        asked = ("explain", "--model", "qa_agent", "--user", "u1", "ping")
        await here.command("rollout", "set", "25")
        await here.has_share(2500)
        assert "share 25 %)" in (await here.command(*asked))[1]
        found = msgspec.json.decode((await here.command(*asked, "--json"))[1])
        assert (found["share_percent"], found["share_from"]) == (25.0, "rollout")
        async with here.members[0].session.post(
            f"{here.members[0].admin_url}/admin/explain",
            json={"model": "qa_agent", "user": "u1", "messages": [{"role": "user", "content": "ping"}]},
        ) as response:
            assert (await response.json())["share_percent"] == 25.0
        (tmp_path / "gateway.db").rename(tmp_path / "away.db")
        assert "share 10 %, where the policy starts a rollout" in (await here.command(*asked))[1]
        assert not (tmp_path / "gateway.db").exists()


async def test_calls_go_on_at_the_shares_in_force_while_the_store_is_away(tmp_path: Path) -> None:
    async with fleet(tmp_path, 1) as here:
        (member,) = here.members
        await here.command("rollout", "set", "25")
        await here.has_share(2500)
        (tmp_path / "gateway.db").rename(tmp_path / "away.db")
        await member.logged("no rollout is looked at until this is mended")
        await here.check_arms(2500)
        status, found = await here.order("set", percent=50)
        assert (status, found["error"]["code"]) == (503, "budget_unavailable")
        await here.check_arms(2500)
        (tmp_path / "away.db").rename(tmp_path / "gateway.db")
        await member.logged("the rollouts are looked at again")
        assert (await here.order("set", percent=50))[0] == 200
        await here.has_share(5000)
        # One line for the whole outage.
        assert len([line for line in member.lines if "no rollout is looked at" in line]) == 1
