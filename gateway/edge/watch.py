"""Reload when the files change or on SIGHUP. Says when; what a reload does is the composition root's affair.

Folders are watched, not files: editors and Kubernetes both replace a file by another, which a watch on the file misses.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path

log = logging.getLogger("gateway.reload")
# Editors write in several steps; what comes within this time is one change.
SETTLE_MS = 200
# How often somebody looks whether the folders are the same ones still, and tries again where they cannot be watched.
LOOK_MS = 2_000


async def watch_files(paths: Sequence[Path], reload: Callable[[], Awaitable[None]]) -> None:
    """Call `reload` after each change of a TOML file in these folders, or beside these files, until cancelled."""
    is_first, is_failing = True, False
    while True:
        try:
            async for _ in _changes(paths, is_first=is_first):
                if is_failing:
                    log.warning("changes of the configuration are noticed again")
                is_failing = False
                await reload()
        except (OSError, RuntimeError) as error:
            # It must go on: without it no change is ever noticed.
            if not is_failing:
                log.error("no change of the configuration is noticed until this is mended: %s", error)
            is_failing = True
            await asyncio.sleep(LOOK_MS / 1000)
        is_first = False


async def _changes(paths: Sequence[Path], *, is_first: bool) -> AsyncIterator[None]:
    """The changes of these, until a folder of them is another: a watch stays with what it was begun on.

    But for the first time there is one change at the beginning: what happened while nobody watched.
    """
    # Imported here: a process that does not watch need not pay for it.
    from watchfiles import Change, awatch

    def is_config(change: Change, path: str) -> bool:
        # Kubernetes swaps the link `..data`, which is the only thing that changes by name.
        return path.endswith((".toml", "..data"))

    watched = _folders(paths)
    is_news = not is_first
    async for changes in awatch(
        *watched, watch_filter=is_config, debounce=SETTLE_MS, recursive=False, rust_timeout=LOOK_MS,
        yield_on_timeout=True,
    ):  # fmt: skip
        if changes or is_news:
            yield
        is_news = False
        if _folders(paths) != watched:
            return


def _folders(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Where these lie and where links lead to, each with what tells it from another of that name. Raises OSError.

    Of a mounted ConfigMap the file is a link into a folder that the next version replaces by another.
    """
    ends = {end for path in paths for end in (path.absolute(), path.resolve())}
    found = {folder: folder.stat() for folder in sorted({end if end.is_dir() else end.parent for end in ends})}
    return {folder: (stat.st_dev, stat.st_ino) for folder, stat in found.items()}


def reload_on(signal_number: int, reload: Callable[[], Awaitable[None]]) -> None:
    """Call `reload` whenever the process gets this signal."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    def start() -> None:
        task = loop.create_task(_run(reload))
        running.add(task)
        task.add_done_callback(running.discard)

    loop.add_signal_handler(signal_number, start)


async def _run(reload: Callable[[], Awaitable[None]]) -> None:
    await reload()
