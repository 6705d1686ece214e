"""Whole processes: start, traffic, reload under load, drain, and death at any moment."""

import asyncio
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
import pytest

from gateway.config import Loaded
from gateway.domain.settings import Settings
from gateway.store.journal import journal_files
from tests.process import PATIENCE_S, POLICY, Files, Process, process
from tests.running import CHAT, chat, running_gateway
from tests.scripted import DONE, Turn, delta, event, finish, says, scripted


class Load:
    """Callers who ask one question after the other, every second one as a stream; what they got whole is kept."""

    def __init__(self, gateway: Process, callers: int = 4) -> None:
        self.statuses: list[int] = []
        self.ids: list[str] = []
        self.models: list[str] = []
        self.errors: list[BaseException] = []
        self._gateway = gateway
        self._stopping = False
        self._changed = asyncio.Condition()
        self._callers = [asyncio.create_task(self._call()) for _ in range(callers)]

    async def more(self, count: int = 20) -> None:
        """Wait for so many further answers."""
        wanted = len(self.ids) + count
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: len(self.ids) >= wanted or bool(self.errors))

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._callers)

    async def _call(self) -> None:
        stream = False
        while not self._stopping:
            stream = not stream
            try:
                async with self._gateway.post(stream=stream) as response:
                    body = await response.read()
            except aiohttp.ClientError as error:
                self.errors.append(error)
                self._stopping = True
            else:
                assert (b"[DONE]" in body) is (stream and response.status == 200)
                self.statuses.append(response.status)
                self.ids.append(response.headers["x-request-id"])
                self.models.append(response.headers.get("x-gateway-model", ""))
            async with self._changed:
                self._changed.notify_all()


async def test_it_starts_serves_and_ends_when_asked_to(tmp_path: Path) -> None:
    async with scripted(says("Pa", "ris")) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            status, request_id, body = await gateway.ask()
            assert (status, body["choices"][0]["message"]["content"]) == (200, "Paris")
            assert (await gateway.admin("/readyz"))[0] == 200
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
        assert [record.id for record in files.records()] == [request_id]


async def test_reloads_under_load_fail_no_request(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            load = Load(gateway)
            await load.more()
            # The file changes, and nobody says so.
            files.write_config(model="b")
            await gateway.logged("configuration reloaded")
            await load.more()
            # A signal, and nothing has changed; then many at once.
            gateway.child.send_signal(signal.SIGHUP)
            await gateway.logged("configuration reloaded")
            for _ in range(5):
                gateway.child.send_signal(signal.SIGHUP)
            await load.more()
            # The upstream is replaced too, with calls on their way to it.
            files.write_config(model="c", more="[upstreams.first.timeouts]\nstall_s = 7.0")
            while "first/c" not in load.models:
                await load.more(1)
            await load.stop()
            assert not load.errors
            assert set(load.statuses) == {200}
            assert set(load.models) == {"first/a", "first/b", "first/c"}
            # Never back to what was read before.
            assert load.models.index("first/c") > load.models.index("first/b")
            assert {record.id for record in files.records()} == set(load.ids)


async def test_a_bad_file_leaves_the_last_good_one_in_force_and_is_told_everywhere(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            load = Load(gateway, callers=2)
            await load.more(5)
            files.write_policy("[models]\nuse_finetuned = 3\nunknwon_agent = 1\n")
            line = await gateway.logged("reload refused")
            assert line["level"] == "error"
            assert "unknwon_agent" in line["message"]
            await load.more(5)
            status, body = await gateway.admin("/readyz")
            told = msgspec.json.decode(body)["config"]
            assert (status, told["is_current"]) == (200, False)
            assert "use_finetuned" in told["reload_error"]
            assert await gateway.metric("gateway_config_is_current 0.0")
            assert await gateway.metric('gateway_config_reloads_total{result="failed"} 1.0')
            files.write_policy(POLICY)
            await gateway.logged("configuration reloaded")
            told = msgspec.json.decode((await gateway.admin("/readyz"))[1])["config"]
            assert told == {"is_current": True, "reload_error": None, "at_next_start": []}
            assert await gateway.metric("gateway_config_is_current 1.0")
            await load.stop()
            assert set(load.statuses) == {200}


async def test_every_version_of_a_mounted_configuration_is_taken_over(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"

    def mount(version: int, text: str) -> None:
        """As the kubelet does it: a new folder, the link `..data` moved over, the old folder removed."""
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "config.toml").write_text(text)
        (tmp_path / "..data_tmp").symlink_to(f"..{version}")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        shutil.rmtree(tmp_path / f"..{version - 1}", ignore_errors=True)

    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        text = config.read_text()
        mount(0, text)
        config.unlink()
        config.symlink_to("..data/config.toml")
        async with process(files) as gateway:
            load = Load(gateway, callers=1)
            await load.more()
            for version, model in enumerate("bcd", start=1):
                mount(version, text.replace('"first/a"', f'"first/{model}"'))
                async with asyncio.timeout(PATIENCE_S):
                    while f"first/{model}" not in load.models:
                        await load.more(1)
            await load.stop()
            assert set(load.statuses) == {200}


# --- Reloading, seen from inside -------------------------------------------------------------------------------------


async def test_of_two_reloads_the_later_one_stays_in_force(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running:
        gateway, load = running.gateway, running.gateway._load_again
        first_reads, first_may_end = threading.Event(), threading.Event()
        old = load(gateway._loaded.settings)

        def reads_early_and_ends_late(_: Settings) -> Loaded:
            gateway._load_again = load
            first_reads.set()
            assert first_may_end.wait(PATIENCE_S)
            return old

        gateway._load_again = reads_early_and_ends_late
        first = asyncio.ensure_future(gateway.reload())
        await asyncio.to_thread(first_reads.wait, PATIENCE_S)
        policy = tmp_path / "policies" / "dev.toml"
        policy.write_text(policy.read_text() + "[limits]\nmax_tokens = 7\n")
        second = asyncio.ensure_future(gateway.reload())
        # A reload that did not wait its turn would read, and be done, before the first one ends.
        await asyncio.to_thread(load, gateway._loaded.settings)
        first_may_end.set()
        await asyncio.gather(first, second)
        assert running.runtime.plan.limits.max_tokens == 7


@pytest.mark.parametrize("damage", ["not UTF-8", "not TOML", "gone", "a folder"])
async def test_whatever_is_wrong_with_a_file_the_last_good_one_serves_on(tmp_path: Path, damage: str) -> None:
    async with running_gateway(tmp_path) as running:
        plan = running.runtime.plan
        config = tmp_path / "config.toml"
        good = config.read_text()
        match damage:
            case "not UTF-8":
                config.write_bytes(b'[server]\ndata = "\xff"\n')
            case "not TOML":
                config.write_text("[server\n")
            case _:
                config.unlink()
                if damage == "a folder":
                    config.mkdir()
        await running.gateway.reload()
        assert running.runtime.plan is plan
        assert "config.toml" in running.runtime.reload_error
        if config.is_dir():
            config.rmdir()
        config.write_text(good)
        await running.gateway.reload()
        assert running.runtime.reload_error == ""


@pytest.mark.parametrize("fault", [OSError(24, "Too many open files"), RuntimeError("a bug")])
async def test_a_reload_that_breaks_is_one_that_failed(tmp_path: Path, fault: Exception) -> None:
    async with running_gateway(tmp_path) as running:
        gateway, load = running.gateway, running.gateway._load_again

        def breaks(_: Settings) -> Loaded:
            raise fault

        gateway._load_again = breaks
        await gateway.reload()
        assert running.runtime.reload_error == str(fault)
        assert not running.runtime.observer.is_current
        gateway._load_again = load
        await gateway.reload()
        assert running.runtime.reload_error == ""


async def test_what_is_read_at_start_only_stays_in_force_and_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_gateway(tmp_path, server='user_salt = "one"') as running:
        store, hashed = running.runtime.effective["store"], running.runtime.plan.kept_user("ann")
        config = tmp_path / "config.toml"
        good = config.read_text()
        changed = good.replace("gateway.db", "other.db").replace('"one"', '"two"')
        config.write_text(changed + "[upstreams.sim.timeouts]\nstall_s = 3.0\n")
        await running.gateway.reload()
        # What can be in force is.
        assert running.runtime.plan.agents["qa_agent"].baseline[0].timeouts.stall_s == 3.0
        assert running.runtime.effective["store"] == store
        assert running.runtime.plan.kept_user("ann") == hashed
        assert running.runtime.at_next_start == ("server", "store")
        assert "not in force before the next start: what has changed in [server], [store]" in caplog.text
        config.write_text(good)
        await running.gateway.reload()
        assert running.runtime.at_next_start == ()


async def test_an_upstream_that_stays_as_it_is_keeps_its_connections(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running:
        pools = dict(running.runtime.upstreams)
        await running.gateway.reload()
        assert running.runtime.upstreams == pools
        config = tmp_path / "config.toml"
        config.write_text(config.read_text() + "[upstreams.sim.timeouts]\nstall_s = 3.0\n")
        await running.gateway.reload()
        assert running.runtime.upstreams["sim"] is not pools["sim"]
        assert running.runtime.plan.agents["qa_agent"].baseline[0].timeouts.stall_s == 3.0


# --- The end ---------------------------------------------------------------------------------------------------------


async def waits_in_the_middle(turn: Turn) -> None:
    """A stream that goes on when the test says so."""
    await turn.begin_stream()
    await turn.event(delta("Pa"))
    await turn.may_go_on.wait()  # type: ignore[attr-defined]
    for data in (delta("ris"), finish(), DONE):
        await turn.event(data)
    await turn.end()


async def test_sigterm_lets_a_stream_in_flight_end_and_takes_no_new_call(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def scene(turn: Turn) -> None:
        turn.may_go_on = go_on  # type: ignore[attr-defined]
        await waits_in_the_middle(turn)

    async with scripted(scene) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            async with gateway.post(stream=True) as response:
                await response.content.readuntil(event(delta("Pa")))
                gateway.child.send_signal(signal.SIGTERM)
                await gateway.logged("draining")
                # The socket is closed a turn of the loop later than the log says so, and who got in until then is told.
                with suppress(aiohttp.ClientConnectionError):
                    async with (
                        aiohttp.ClientSession() as other,
                        other.post(f"{gateway.data_url}{CHAT}", json=chat()) as refused,
                    ):
                        assert (await refused.json())["error"]["code"] == "draining"
                go_on.set()
                rest = await asyncio.wait_for(response.content.read(), PATIENCE_S)
            assert event(delta("ris")) in rest
            assert rest.endswith(event(DONE))
            assert await gateway.ended() == 0
        (record,) = files.records()
        assert (record.status, record.client_left) == (200, False)


async def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    async def scene(turn: Turn) -> None:
        turn.may_go_on = asyncio.Event()  # type: ignore[attr-defined]
        await waits_in_the_middle(turn)

    async with scripted(scene) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway, gateway.post(stream=True) as response:
            await response.content.readuntil(event(delta("Pa")))
            gateway.child.send_signal(signal.SIGTERM)
            await gateway.logged("draining")
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 1
            # The caller was not told that this was all.
            text = b""
            with suppress(aiohttp.ClientPayloadError):
                text = await asyncio.wait_for(response.content.read(), PATIENCE_S)
            assert b"[DONE]" not in text


async def test_what_does_not_end_within_the_drain_is_cut_off_and_recorded(tmp_path: Path) -> None:
    async def scene(turn: Turn) -> None:
        turn.may_go_on = asyncio.Event()  # type: ignore[attr-defined]
        await waits_in_the_middle(turn)

    async with scripted(scene) as provider:
        files = Files(tmp_path, provider)
        files.write_config(server="drain_s = 0.1")
        async with process(files) as gateway, gateway.post(stream=True) as response:
            await response.content.readuntil(event(delta("Pa")))
            gateway.child.send_signal(signal.SIGTERM)
            assert await gateway.ended() == 0
            with pytest.raises(aiohttp.ClientPayloadError):
                await asyncio.wait_for(response.content.read(), PATIENCE_S)
        (record,) = files.records()
        assert record.cost_basis == "bound"
        assert (record.status, record.error, record.client_left) == (503, "draining", False)
        await provider.turns[0].peer_left.wait()


async def test_what_was_answered_before_a_kill_is_in_the_journal(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        for _ in range(3):
            async with process(files) as gateway:
                load = Load(gateway, callers=8)
                await load.more(50)
                gateway.child.kill()
                await load.stop()
                assert len(load.ids) >= 50
                kept = {record.id for record in files.records()}
                assert set(load.ids) <= kept


async def test_a_kill_does_not_refill_a_cap(tmp_path: Path) -> None:
    # A total has no window, so the test does not care what time it is.
    cap = '[[caps]]\nscope = "global"\nper = "total"\nrequests = 5\n'
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        files.write_policy(POLICY + cap)
        async with process(files) as gateway:
            assert [(await gateway.ask())[0] for _ in range(3)] == [200] * 3
            gateway.child.kill()
            await gateway.ended()
        async with process(files) as gateway:
            assert [(await gateway.ask())[0] for _ in range(4)] == [200, 200, 429, 429]
            gateway.child.kill()
            await gateway.ended()
        async with process(files) as gateway:
            status, _, body = await gateway.ask()
            assert (status, body["error"]["code"]) == (429, "budget_exceeded")
        assert len(provider.turns) == 5


async def test_a_torn_last_line_is_cut_off_at_start(tmp_path: Path) -> None:
    async with scripted(says("Paris")) as provider:
        files = Files(tmp_path, provider)
        async with process(files) as gateway:
            await gateway.ask()
            gateway.child.kill()
            await gateway.ended()
        (journal,) = journal_files(tmp_path / "journal")
        journal.write_bytes(journal.read_bytes() + b'deadbeef {"id": "req-')
        async with process(files) as gateway:
            assert (await gateway.ask())[0] == 200
            line = await gateway.logged("torn")
            assert line["level"] == "warning"
        assert len(files.records()) == 2
