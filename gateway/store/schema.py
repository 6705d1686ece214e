"""The SQLite file: how it is opened, what is in it, how an older one is brought up to date, and its transactions.

Almost all in it is integers and text: nUSD, unix milliseconds, unix seconds for windows. The file is its owner's alone
(0600). Migrations only go forward, one transaction each; a file from a newer gateway is refused, not guessed at.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Literal, Self

from gateway.store.store import StoreError

# A writer waits this long for another process's transaction, which is a few milliseconds long.
BUSY_S = 2.0

_MIGRATIONS = (
    """
    -- One row per attempt that is resolved, or per entry by hand. Never changed, but for its state when doubt ends.
    CREATE TABLE ledger (
        id TEXT PRIMARY KEY, at_ms INTEGER NOT NULL, env TEXT NOT NULL,
        agent TEXT NOT NULL, key TEXT NOT NULL, user TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL,
        variant TEXT NOT NULL, nusd INTEGER NOT NULL, requests INTEGER NOT NULL, tokens INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
        state TEXT NOT NULL, basis TEXT NOT NULL, source TEXT NOT NULL, note TEXT NOT NULL,
        -- Only in rows of source 'lease', which are the lease of a process that vanished. Such a row counts in the
        -- account that is named here and in no other, and is taken back when the process, `holder`, is there again.
        account TEXT, holder TEXT
    ) WITHOUT ROWID;
    CREATE INDEX ledger_by_time ON ledger (env, at_ms);
    -- For a user's first call in a window: 0.5 ms instead of 250 among 200,000 rows. As counting.py writes it.
    CREATE INDEX ledger_by_user ON ledger (env, coalesce(nullif(user, ''), '-'), at_ms);
    CREATE INDEX ledger_in_doubt ON ledger (env, at_ms) WHERE state = 'in_doubt';
    CREATE INDEX ledger_of_leases ON ledger (account) WHERE account IS NOT NULL;
    CREATE INDEX ledger_of_lost ON ledger (holder) WHERE holder IS NOT NULL;

    -- Sums over the ledger, one per rule, value of its scope, and window. `posted` holds what is in doubt, too.
    -- `dims`: the values that make a call count here, as a JSON list in the order of Dimensions.
    CREATE TABLE accounts (
        account TEXT NOT NULL, start_s INTEGER NOT NULL, end_s INTEGER, rule_id TEXT NOT NULL,
        env TEXT NOT NULL, unit TEXT NOT NULL, dims TEXT NOT NULL,
        posted INTEGER NOT NULL, in_doubt INTEGER NOT NULL, wanted_ms INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (account, start_s)
    ) WITHOUT ROWID;

    -- What processes may spend from memory, and how much of it calls in flight hold.
    CREATE TABLE leases (
        account TEXT NOT NULL, start_s INTEGER NOT NULL, holder TEXT NOT NULL,
        amount INTEGER NOT NULL, held INTEGER NOT NULL,
        PRIMARY KEY (account, start_s, holder)
    ) WITHOUT ROWID;
    CREATE INDEX accounts_wanted ON accounts (wanted_ms) WHERE wanted_ms > 0;
    CREATE INDEX leases_by_holder ON leases (holder);

    CREATE TABLE holders (
        holder TEXT PRIMARY KEY, seen_ms INTEGER NOT NULL, is_lost INTEGER NOT NULL DEFAULT 0,
        told_segment INTEGER NOT NULL DEFAULT 0, told_offset INTEGER NOT NULL DEFAULT 0,
        -- The rules it counts under, as a JSON list of their ids.
        rule_ids TEXT NOT NULL DEFAULT '[]'
    ) WITHOUT ROWID;

    -- The rules in force, as JSON, so that a row that anybody brings is counted under all of them.
    CREATE TABLE rules (rule_id TEXT PRIMARY KEY, env TEXT NOT NULL, rule TEXT NOT NULL) WITHOUT ROWID;

    -- Shares of a limit that were told of, once per window.
    CREATE TABLE crossings (
        account TEXT NOT NULL, start_s INTEGER NOT NULL, share REAL NOT NULL, at_ms INTEGER NOT NULL,
        PRIMARY KEY (account, start_s, share)
    ) WITHOUT ROWID;

    CREATE TABLE stops (
        env TEXT NOT NULL, dimension TEXT NOT NULL, value TEXT NOT NULL,
        by TEXT NOT NULL, why TEXT NOT NULL, at_ms INTEGER NOT NULL,
        PRIMARY KEY (env, dimension, value)
    ) WITHOUT ROWID;

    -- Who did what by hand, and why. Only ever added to.
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, details TEXT NOT NULL
    );
    """,
    """
    -- One row per call that a model was asked for: domain/outcome.py. Only its cost may change, where a doubt ends. In
    -- the order of coming, not of ids, which are random: an experiment's calls lie together, and are read in a half of
    -- the time.
    CREATE TABLE calls (
        id TEXT NOT NULL UNIQUE, at_ms INTEGER NOT NULL, env TEXT NOT NULL, agent TEXT NOT NULL,
        experiment INTEGER NOT NULL, stage INTEGER NOT NULL, share_bps INTEGER NOT NULL, variant TEXT NOT NULL,
        bucket INTEGER, user TEXT NOT NULL, key TEXT NOT NULL, operation TEXT NOT NULL, model TEXT NOT NULL,
        -- NULL where nobody knows: the caller left.
        is_success INTEGER, is_fallback INTEGER NOT NULL, error TEXT NOT NULL,
        -- The cell is that of domain/experiment.py:bucket_of_ms.
        latency_us INTEGER NOT NULL, latency_cell INTEGER NOT NULL, first_chunk_us INTEGER,
        cost_nusd INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
    );
    CREATE INDEX calls_of_experiment ON calls (env, agent, experiment, at_ms);
    CREATE INDEX calls_by_time ON calls (env, at_ms);

    -- What a caller said last of a call, from -1 to 1.
    CREATE TABLE feedback (
        call_id TEXT NOT NULL, caller TEXT NOT NULL, at_ms INTEGER NOT NULL, score REAL NOT NULL, label TEXT NOT NULL,
        PRIMARY KEY (call_id, caller)
    ) WITHOUT ROWID;

    -- Where each agent's rollout stands, as JSON, and every change that led there. Changes are only ever added.
    CREATE TABLE rollouts (
        env TEXT NOT NULL, agent TEXT NOT NULL, version INTEGER NOT NULL, state TEXT NOT NULL,
        PRIMARY KEY (env, agent)
    ) WITHOUT ROWID;
    CREATE TABLE rollout_changes (
        env TEXT NOT NULL, agent TEXT NOT NULL, version INTEGER NOT NULL, at_ms INTEGER NOT NULL, change TEXT NOT NULL,
        PRIMARY KEY (env, agent, version)
    ) WITHOUT ROWID;

    -- Who looks at the rollouts of an environment, for all processes.
    CREATE TABLE leaders (env TEXT PRIMARY KEY, holder TEXT NOT NULL, until_ms INTEGER NOT NULL) WITHOUT ROWID;
    """,
)
VERSION = len(_MIGRATIONS)


# SQLite's own words tell what it saw, not what it means. By primary result code.
_REASONS = {
    sqlite3.SQLITE_BUSY: "another process keeps it locked",
    sqlite3.SQLITE_LOCKED: "another process keeps it locked",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it, or its directory, cannot be written to",
    sqlite3.SQLITE_CANTOPEN: "it, or its directory, is not there or not accessible",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore it, or move it away to begin anew",
    sqlite3.SQLITE_NOTADB: "it is not a ledger, or damaged; restore it, or move it away to begin anew",
}


class OpenFile:
    """The file while somebody uses it: open until it is closed. Raises `StoreError`.

    From any thread, but one call at a time. `clock` gives unix seconds.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float],
        is_new_allowed: bool = True,
        is_checked: bool = False,
        busy_s: float = BUSY_S,
    ) -> None:
        self._path = path
        self._clock = clock
        self._database = open_database(path, is_new_allowed=is_new_allowed, is_checked=is_checked, busy_s=busy_s)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transaction(
        self, kind: Literal["DEFERRED", "IMMEDIATE"] = "IMMEDIATE"
    ) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._database, self._path, kind)


def open_database(
    path: Path, *, is_new_allowed: bool = True, is_checked: bool = True, busy_s: float = BUSY_S
) -> sqlite3.Connection:
    """The database at `path`, made where there is none, checked and up to date. Raises `StoreError`.

    The connection is in autocommit mode, so transactions are begun and ended by those who need them; it may be used
    from any thread, by one at a time. `is_checked` of False leaves out reading the whole file for damage, which takes
    seconds from a gigabyte on.
    """
    try:
        if not path.exists():
            if not is_new_allowed:
                raise StoreError(f"there is no ledger at {path}; a gateway makes it when it first serves")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made before SQLite does, so that it is never readable for others, not even for a moment.
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        # The mode is set, not only asked for: SQLite gives its -wal and -shm files that of the database.
        path.chmod(0o600)
        # SQLite itself makes none: one that is moved away at this moment is not there, and not a new one.
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=busy_s,
            isolation_level=None,
            check_same_thread=False,
        )
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"the ledger at {path} cannot be opened: {reason(error)}") from error
    try:
        _switch_to_wal(database, busy_s)
        # The journal is what a power cut is survived by; the ledger only has to be whole.
        database.execute("PRAGMA synchronous = NORMAL")
        found = "ok"
        if is_checked:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StoreError(
                f"the ledger at {path} is damaged ({found.splitlines()[-1]}); restore it, or move it away to begin anew"
            )
        _migrate(database, path)
    except sqlite3.Error as error:
        database.close()
        raise unusable(path, error) from error
    except StoreError:
        database.close()
        raise
    return database


@contextmanager
def transaction(
    database: sqlite3.Connection, path: Path, kind: Literal["DEFERRED", "IMMEDIATE"] = "IMMEDIATE"
) -> Iterator[sqlite3.Connection]:
    """All or nothing for those who write; one snapshot for those who only read (`DEFERRED`). Raises `StoreError`."""
    try:
        database.execute(f"BEGIN {kind}")
        try:
            yield database
            database.execute("COMMIT")
        finally:
            # SQLite has ended it by itself after some errors, such as a full disk.
            if database.in_transaction:
                database.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise unusable(path, error) from error


def unusable(path: Path, error: sqlite3.Error) -> StoreError:
    """The error for the ledger's users: which file, and why."""
    return StoreError(f"the ledger at {path} cannot be used: {reason(error)}")


def reason(error: Exception) -> str:
    """What went wrong in words that help, and what the system or SQLite said, without paths twice over."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Errors of the module itself, such as a closed connection, have no code. Extended codes end in the primary one.
    meaning = _REASONS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return f"{meaning} ({error})" if meaning else str(error)


def _switch_to_wal(database: sqlite3.Connection, busy_s: float) -> None:
    """Readers and a writer side by side. Two that switch a new file at once do not wait of themselves."""
    until_s = monotonic() + busy_s
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > until_s:
                raise
        sleep(0.005)


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise StoreError(f"the ledger at {path} is of a newer gateway (schema {version}, this one knows {VERSION})")
    if version == VERSION:
        return
    database.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have been quicker while this one waited.
        (version,) = database.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
            for statement in script.split(";"):
                if statement.strip():
                    database.execute(statement)
            database.execute(f"PRAGMA user_version = {number}")
        database.execute("COMMIT")
    except BaseException:
        # SQLite has ended it by itself after some errors, such as a full disk.
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
