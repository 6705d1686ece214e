"""What a request sees of a reload: the old plan or the new one, and never a mixture."""

import asyncio
from pathlib import Path

from tests.raw_http import check_refusal, connected, ordinary, request
from tests.running import AT_ONCE, POLICY, running_gateway

FINETUNED = "[models]\nuse_finetuned = true\n"


async def test_a_call_that_began_before_a_reload_ends_as_it_began(tmp_path: Path) -> None:
    body = ordinary()
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"Expect: 100-continue\r\nContent-Length: %d\r\n" % len(body)))
        # It is in the journey now, and waits for its body.
        await connection.line()
        await gateway.reload(policy=FINETUNED)
        connection.send(body)
        assert (await connection.reply()).headers["x-gateway-variant"] == "baseline"
        connection.send(request(body=body))
        assert (await connection.reply()).headers["x-gateway-variant"] == "finetuned"


async def test_connections_outlive_a_reload(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for policy, variant in ((POLICY, "baseline"), (FINETUNED, "finetuned")) * 3:
            await gateway.reload(policy=policy)
            assert gateway.runtime.reload_error == ""
            connection.send(request(body=ordinary()))
            assert (await connection.reply()).headers["x-gateway-variant"] == variant


async def test_keys_that_a_reload_brings_hold_from_the_next_request(tmp_path: Path) -> None:
    keys = f'{POLICY}\n[[keys]]\nname = "app"\nsha256 = "{"0" * 64}"\n'
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        await gateway.reload(policy=keys)
        connection.send(request(body=ordinary()))
        check_refusal(await connection.reply(), 401, "invalid_api_key")


async def test_what_belongs_to_the_process_stays(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, simulated=AT_ONCE) as gateway:
        runtime = gateway.runtime
        kept = (runtime.books, runtime.journal, runtime.observer, runtime.server, runtime.standing)
        plan = runtime.plan
        await gateway.reload(policy=FINETUNED)
        assert (runtime.books, runtime.journal, runtime.observer, runtime.server, runtime.standing) == kept
        assert runtime.plan is not plan
        assert runtime.effective["policy"]["models"]["use_finetuned"] is True


async def test_what_is_read_on_for_a_caller_who_left_gets_its_time_at_the_end(tmp_path: Path) -> None:
    may_end = asyncio.Event()
    async with running_gateway(tmp_path) as gateway:
        journey = asyncio.create_task(may_end.wait())
        gateway.runtime.lingering.add(journey)
        journey.add_done_callback(gateway.runtime.lingering.discard)
        ending = asyncio.create_task(gateway.runtime.end_lingering(600.0))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not journey.done()
        may_end.set()
        await ending
        assert journey.result()


async def test_what_takes_longer_is_ended_and_nothing_goes_on_before_it_has(tmp_path: Path) -> None:
    done = []

    async def reads_on() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            done.append("its books are closed")

    async with running_gateway(tmp_path) as gateway:
        journey = asyncio.create_task(reads_on())
        await asyncio.sleep(0)
        gateway.runtime.lingering.add(journey)
        journey.add_done_callback(gateway.runtime.lingering.discard)
        await gateway.runtime.end_lingering(-1.0)
        assert done == ["its books are closed"]
        assert journey.cancelled()
