"""The file: its mode, its migrations, and the words that are said where it cannot be used."""

import errno
import os
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from gateway.store.experiments import Experiments
from gateway.store.ledger import Ledger
from gateway.store.schema import _MIGRATIONS, VERSION, OpenFile, open_database, reason, transaction
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, StoreError
from tests.outcomes import outcome


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fill(path: Path, rows: int = 2_000) -> None:
    database = open_database(path)
    database.executemany(
        "INSERT INTO audit (at_ms, who, what, details) VALUES (?, 'me', 'test', ?)",
        [(number, "x" * 50) for number in range(rows)],
    )
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def test_a_new_file_is_its_owners_alone_and_so_are_its_companions(tmp_path: Path) -> None:
    path = tmp_path / "state" / "ledger.db"
    before = os.umask(0)
    try:
        database = open_database(path)
    finally:
        os.umask(before)
    database.execute("INSERT INTO audit (at_ms, who, what, details) VALUES (0, '', '', '')")
    assert {name.name: mode_of(name) for name in path.parent.iterdir()} == {
        "ledger.db": 0o600,
        "ledger.db-wal": 0o600,
        "ledger.db-shm": 0o600,
    }
    database.close()


def test_a_file_that_was_opened_to_others_is_closed_to_them_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    open_database(path).close()
    path.chmod(0o644)
    open_database(path).close()
    assert mode_of(path) == 0o600


def test_a_file_is_opened_again_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, 3)
    database = open_database(path)
    assert database.execute("SELECT count(*) FROM audit").fetchone() == (3,)
    assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_who_only_reads_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with pytest.raises(StoreError, match=r"there is no ledger at .*ledger\.db"):
        open_database(path, is_new_allowed=False)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_gateways_file_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = open_database(path)
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    with pytest.raises(StoreError, match=rf"newer gateway \(schema {VERSION + 1}, this one knows {VERSION}\)"):
        open_database(path)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION + 1,)
    database.close()


def test_a_file_that_is_something_else_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    text = "when,agent,usd\n" * 1_000
    path.write_text(text)
    with pytest.raises(StoreError, match="not a ledger, or damaged"):
        open_database(path)
    assert path.read_text() == text


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    data = bytearray(path.read_bytes())
    # Every page but those of the schema loses its middle.
    for start in range(30 * 4096, len(data), 4096):
        data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged.*move it away to begin anew"):
        open_database(path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreError, match="damaged"):
        open_database(path)


def test_a_place_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be opened: (Not a directory|File exists)"):
        open_database(tmp_path / "file" / "ledger.db")


def test_a_directory_in_the_files_place_is_told_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.mkdir(mode=0o755)
    with pytest.raises(StoreError, match="cannot be opened: Is a directory"):
        open_database(path)
    assert mode_of(path) == 0o755


def test_one_that_is_moved_away_while_it_is_opened_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    fill(path)
    chmod = Path.chmod

    def chmod_and_lose(self: Path, mode: int) -> None:
        chmod(self, mode)
        self.rename(tmp_path / "away.db")

    monkeypatch.setattr(Path, "chmod", chmod_and_lose)
    with pytest.raises(StoreError, match="cannot be opened: it, or its directory, is not there"):
        open_database(path, is_new_allowed=False)
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="cannot be opened: Permission denied"):
            open_database(tmp_path / "ledger.db")
    finally:
        tmp_path.chmod(0o700)


def test_two_that_open_at_once_migrate_once(tmp_path: Path) -> None:
    threads = 6
    barrier = Barrier(threads)

    def opened(path: Path) -> int:
        barrier.wait()
        database = open_database(path)
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.close()
        return int(version)

    with ThreadPoolExecutor(threads) as pool:
        for number in range(10):
            path = tmp_path / f"{number}.db"
            assert list(pool.map(opened, [path] * threads)) == [VERSION] * threads


def test_a_ledger_of_the_first_schema_keeps_its_rows_and_gains_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = sqlite3.connect(path, isolation_level=None)
    database.executescript(f"{_MIGRATIONS[0]} PRAGMA user_version = 1;")
    columns = (
        "'c1.1', 5, 'dev', 'qa_agent', '', '', 'inference', 'm', '', 7, 1, 3, 1, 2, 'posted', 'exact', 'gateway', ''"
    )
    database.execute(f"INSERT INTO ledger VALUES ({columns}, NULL, NULL)")
    database.execute("INSERT INTO holders VALUES ('gateway-1', 5, 0, 3, 99, '[]')")
    database.close()
    with Ledger(path, clock=lambda: 1.0) as ledger:
        assert [(row.id, row.amounts.nusd) for row in ledger.rows("dev")] == [("c1.1", 7)]
    store = SqliteStore(path, clock=lambda: 1.0)
    # A gateway goes on where its journal had been told.
    assert store.join("gateway-1", ()) == (3, 99)
    store.sync(Batch(outcomes=[outcome("c1")]))
    store.close()
    with Experiments(path, clock=lambda: 1.0) as experiments:
        assert experiments.outcome("c1") == outcome("c1")
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (VERSION,)
    database.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("CREATE TABLE stops (mine TEXT)")  # In the way of one of the later statements.
    database.close()
    with pytest.raises(StoreError, match="stops already exists"):
        open_database(path)
    database = sqlite3.connect(path)
    assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("stops",)]
    assert database.execute("PRAGMA user_version").fetchone() == (0,)
    database.close()


def test_a_locked_file_is_told_in_bounded_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StoreError, match="another process keeps it locked"):
            open_database(path, busy_s=0.05)
    finally:
        other.close()
    open_database(path).close()


def audited(database: sqlite3.Connection) -> int:
    (count,) = database.execute("SELECT count(*) FROM audit").fetchone()
    return int(count)


def note_and_break(database: sqlite3.Connection, path: Path, note: str) -> None:
    with transaction(database, path) as begun:
        begun.execute(note)
        begun.execute("SELECT * FROM nowhere")


def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = open_database(path)
    note = "INSERT INTO audit (at_ms, who, what, details) VALUES (1, 'me', 'test', '{}')"
    with transaction(database, path) as begun:
        begun.execute(note)
    with pytest.raises(KeyError), transaction(database, path) as begun:
        raise KeyError(begun.execute(note))
    with pytest.raises(StoreError, match=f"the ledger at {path} cannot be used: no such table"):
        note_and_break(database, path, note)
    assert audited(database) == 1
    assert not database.in_transaction
    database.close()


def test_who_only_reads_sees_one_moment_and_keeps_no_writer_waiting(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    reader = open_database(path)
    with transaction(reader, path, "DEFERRED") as begun:
        assert audited(begun) == 0
        fill(path, rows=3)
        assert audited(begun) == 0
    assert audited(reader) == 3
    reader.close()


@pytest.mark.parametrize("kind", [Ledger, Experiments, SqliteStore], ids=lambda kind: kind.__name__)
def test_whoever_opened_the_file_has_let_go_of_it_at_the_end(kind: Callable[..., OpenFile], tmp_path: Path) -> None:
    with kind(tmp_path / "ledger.db", clock=lambda: 0.0) as opened, opened._transaction() as database:
        assert audited(database) == 0
    with pytest.raises(StoreError, match=r"cannot be used: .*closed"), opened._transaction("DEFERRED"):
        pass


def test_reasons_say_what_it_means_and_what_was_said() -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device", "/x")) == "No space left on device"
    assert reason(sqlite3.ProgrammingError("closed")) == "closed"
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY | 5 << 8  # An extended code.
    assert reason(error) == "another process keeps it locked (database is locked)"
