"""Books, journal and ledger of one process, opened and closed in the right order. A part of the composition root.

At start: the journal's lock, the store, what the last life and vanished neighbours left in their journals, the rules.
A gateway that cannot open its ledger does not start. The invariant: whatever a journal holds is in the ledger before
the first call is admitted, and a hold that never ended is in doubt there, never free.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gateway.config import Loaded
from gateway.decide.budget import Books
from gateway.decide.caps import Rule
from gateway.domain.errors import Refused
from gateway.domain.settings import Settings
from gateway.domain.spans import DAY_MS
from gateway.edge.bookkeeper import Bookkeeper, RolloutStates
from gateway.store.journal import Journal, Position, claim_all, segments
from gateway.store.journal_reader import Replay
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, Crossing, Store, StoreError

log = logging.getLogger("gateway.budget")
SQLITE = "sqlite:///"
_MIB = 2**20


class CannotKeepBooks(OSError):
    """Journal or ledger cannot be used; the message says which and why."""


class Treasury:
    """Everything that knows of money in one process."""

    def __init__(self, books: Books, journal: Journal, bookkeeper: Bookkeeper, lock: int) -> None:
        self.books = books
        self.journal = journal
        self.bookkeeper = bookkeeper
        self._lock = lock

    @classmethod
    async def open(
        cls,
        loaded: Loaded,
        tell: Callable[[Crossing], None],
        take_rollouts: Callable[[RolloutStates], None] = lambda _: None,
    ) -> "Treasury":
        """Open everything and tell the ledger what it does not know yet.

        `take_rollouts` hears where the rollouts stand, by environment and agent, already from here when any has begun.
        Raises `CannotKeepBooks`; nothing is left open then.
        """
        settings, rules = loaded.settings, loaded.plan.rules
        try:
            with ExitStack() as opened, ExitStack() as others:
                (own, lock), *orphans = claim_all(Path(settings.journal.dir))
                opened.callback(os.close, lock)
                for _, orphan_lock in orphans:
                    others.callback(os.close, orphan_lock)
                for directory, _ in orphans:
                    _adopt(directory, settings, rules)
                store = open_store(settings)
                opened.callback(store.close)
                told = Position(*store.join(own.name, rules))
                left = _replay(own, told)
                journal = Journal(
                    own,
                    fsync=settings.journal.sync == "fsync",
                    segment_bytes=settings.journal.segment_mb * _MIB,
                    max_behind_bytes=settings.journal.max_behind_mb * _MIB,
                )
                opened.callback(journal.close)
                journal.append(*left.unresolved)
                books = Books(rules)
                bookkeeper = Bookkeeper(
                    books, journal, store, tell=tell, take_rollouts=take_rollouts,
                    answer_s=settings.store.timeout_ms / 1000, keep_segments=settings.journal.keep_segments,
                )  # fmt: skip
                await bookkeeper.start(left.rows, left.outcomes)
                opened.pop_all()
        except (StoreError, Refused) as error:
            raise CannotKeepBooks(str(error)) from error
        except OSError as error:
            raise CannotKeepBooks(f"the journal in {settings.journal.dir} cannot be used: {error.strerror}") from error
        return cls(books, journal, bookkeeper, lock)

    def take_rules(self, rules: tuple[Rule, ...]) -> None:
        """Other caps are in force from now on."""
        self.books.change_rules(rules)
        self.bookkeeper.take_rules(rules)

    async def close(self) -> None:
        """Tell the ledger everything, give every lease back, flush, unlock."""
        with ExitStack() as left:
            left.callback(os.close, self._lock)
            left.callback(self._close_journal)
            await self.bookkeeper.stop()

    def _close_journal(self) -> None:
        try:
            self.journal.close()
        except OSError as error:
            # Nothing can be done about it now, and others are to be closed after it.
            log.error("the end of the journal in %s may not be on the disk: %s", self.journal.directory, error.strerror)


def ledger_path(settings: Settings) -> Path:
    """Where the SQLite ledger stands. Raises `StoreError` for a store that this version does not have."""
    if not settings.store.url.startswith(SQLITE):
        raise StoreError("store.url: only sqlite:///path is there yet; PostgreSQL follows")
    return Path(settings.store.url.removeprefix(SQLITE))


def open_store(settings: Settings) -> Store:
    """The store that the configuration names. Raises `StoreError`."""
    keep_calls_ms = settings.store.keep_calls_days * DAY_MS
    return SqliteStore(ledger_path(settings), clock=time.time, keep_calls_ms=keep_calls_ms)


def _replay(directory: Path, told: Position) -> Replay:
    left = Replay(directory, told)
    for torn in left.torn:
        log.warning("line %d of %s is torn and was left out", torn.line, torn.path)
    if left.unresolved:
        log.warning("%d attempts were under way when this gateway ended last: they are in doubt", len(left.unresolved))
    return left


def _adopt(directory: Path, settings: Settings, rules: tuple[Rule, ...]) -> None:
    """Tell the ledger what a process left that did not come back: its rows, its calls, its doubts, its leases."""
    numbers = segments(directory)
    if not numbers:
        return
    with _opened(settings) as store:
        told = Position(*store.join(directory.name, rules))
        left = _replay(directory, told)
        store.sync(Batch(rows=left.rows, outcomes=left.outcomes, told=Position(numbers[-1] + 1, 0)))
        store.leave()


@contextmanager
def _opened(settings: Settings) -> Iterator[Store]:
    store = open_store(settings)
    try:
        yield store
    finally:
        store.close()
