"""Reload when the files change or on SIGHUP. Says when; what a reload does is the composition root's affair.

Folders are watched, not files: editors and Kubernetes both replace a file by another, which a watch on the file misses.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

log = logging.getLogger("gateway.reload")
# Editors write in several steps; what comes within this time is one change.
SETTLE_MS = 200


async def watch_files(folders: Iterable[Path], reload: Callable[[], Awaitable[None]]) -> None:
    """Call `reload` after each change of a TOML file in `folders`, until cancelled."""
    # Imported here: a process that does not watch need not pay for it.
    from watchfiles import Change, awatch

    def is_config(change: Change, path: str) -> bool:
        # Kubernetes swaps the link `..data`, which is the only thing that changes by name.
        return path.endswith((".toml", "..data"))

    async for _ in awatch(*folders, watch_filter=is_config, debounce=SETTLE_MS, recursive=False):
        await reload()


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
