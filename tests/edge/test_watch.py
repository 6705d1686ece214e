"""When a reload is asked for: after a change of a file, however it is made, and on a signal."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.edge import watch
from gateway.edge.watch import reload_on, watch_files

# So long that only a hang can reach it.
PATIENCE_S = 20.0


@asynccontextmanager
async def watched(*folders: Path) -> AsyncIterator[asyncio.Semaphore]:
    """Watches; the semaphore is released at each reload."""
    reloads = asyncio.Semaphore(0)

    async def reload() -> None:
        reloads.release()

    task = asyncio.create_task(watch_files(folders, reload))
    # The watch is in place before the task waits for the first time.
    await asyncio.sleep(0)
    try:
        yield reloads
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def writes(folder: Path) -> None:
    (folder / "dev.toml").write_text("b = 2\n")


def replaces(folder: Path) -> None:
    (folder / "draft").write_text("b = 2\n")
    (folder / "draft").replace(folder / "dev.toml")


def removes(folder: Path) -> None:
    (folder / "dev.toml").unlink()


def adds(folder: Path) -> None:
    (folder / "staging.toml").write_text("b = 2\n")


def swaps_as_kubernetes_does(folder: Path) -> None:
    (folder / "..version_2").mkdir()
    (folder / "..data_tmp").symlink_to("..version_2")
    (folder / "..data_tmp").replace(folder / "..data")


@pytest.mark.parametrize("change", [writes, replaces, removes, adds, swaps_as_kubernetes_does])
async def test_a_change_is_noticed_however_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(watch, "SETTLE_MS", 10)
    (tmp_path / "dev.toml").write_text("a = 1\n")
    async with watched(tmp_path) as reloads:
        change(tmp_path)
        await asyncio.wait_for(reloads.acquire(), PATIENCE_S)


async def test_a_folder_that_is_replaced_is_watched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_MS", 10)
    monkeypatch.setattr(watch, "LOOK_MS", 10)
    folder = tmp_path / "policies"
    folder.mkdir()
    async with watched(folder) as reloads:
        folder.rename(tmp_path / "old")
        folder.mkdir()
        # For what was changed while nobody watched, and then for what is.
        await asyncio.wait_for(reloads.acquire(), PATIENCE_S)
        (folder / "dev.toml").write_text("a = 1\n")
        await asyncio.wait_for(reloads.acquire(), PATIENCE_S)


async def test_a_mounted_file_is_watched_through_all_of_its_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLE_MS", 10)
    monkeypatch.setattr(watch, "LOOK_MS", 10)
    mount, config = tmp_path / "mount", tmp_path / "mount" / "config.toml"
    mount.mkdir()

    def swap(version: int) -> None:
        """As the kubelet does it: a new folder, the link `..data` moved over, the old folder removed."""
        (mount / f"..{version}").mkdir()
        (mount / f"..{version}" / "config.toml").write_text(f"version = {version}\n")
        (mount / "..data_tmp").symlink_to(f"..{version}")
        (mount / "..data_tmp").replace(mount / "..data")
        if version:
            shutil.rmtree(mount / f"..{version - 1}")

    swap(0)
    config.symlink_to("..data/config.toml")
    seen: list[str] = []
    changed = asyncio.Condition()

    async def reload() -> None:
        async with changed:
            seen.append(config.read_text())
            changed.notify_all()

    task = asyncio.create_task(watch_files([config], reload))
    await asyncio.sleep(0)
    try:
        for version in (1, 2, 3):
            swap(version)
            async with asyncio.timeout(PATIENCE_S), changed:
                await changed.wait_for(lambda: bool(seen) and seen[-1] == f"version = {version}\n")  # noqa: B023
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_folder_that_is_gone_for_a_while_is_told_of_once_and_watched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "SETTLE_MS", 10)
    monkeypatch.setattr(watch, "LOOK_MS", 10)
    folder = tmp_path / "release" / "policies"
    folder.mkdir(parents=True)
    async with watched(folder) as reloads:
        shutil.rmtree(folder.parent)
        async with asyncio.timeout(PATIENCE_S):
            while "no change of the configuration is noticed" not in caplog.text:
                await asyncio.to_thread(lambda: None)
        folder.mkdir(parents=True)
        await asyncio.wait_for(reloads.acquire(), PATIENCE_S)
    assert caplog.text.count("no change of the configuration is noticed") == 1
    assert "changes of the configuration are noticed again" in caplog.text


async def test_every_folder_is_watched_and_watching_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_MS", 10)
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    async with watched(*folders) as reloads:
        for round_number in range(2):
            for folder in folders:
                (folder / f"{round_number}.toml").write_text("a = 1\n")
                await asyncio.wait_for(reloads.acquire(), PATIENCE_S)


async def test_a_signal_reloads_each_time() -> None:
    reloads = asyncio.Semaphore(0)

    async def reload() -> None:
        reloads.release()

    reload_on(signal.SIGHUP, reload)
    try:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.wait_for(reloads.acquire(), PATIENCE_S)
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
