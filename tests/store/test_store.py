"""The interface: what a kill switch covers, and that the SQLite store is a store."""

from pathlib import Path

import pytest

from gateway.domain.ledger import Dimensions
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Batch, Stop, Store

ON = Dimensions(agent="qa_agent", key="team-a", user="u1", model="m1", variant="finetuned")


@pytest.mark.parametrize(
    "dimension, value, env, is_covered",
    [
        ("", "", "dev", True),
        ("", "", "production", False),
        ("agent", "qa_agent", "dev", True),
        ("agent", "qa_agent", "production", False),
        ("agent", "qa", "dev", False),
        ("key", "team-a", "dev", True),
        ("user", "u1", "dev", True),
        ("model", "m1", "dev", True),
        ("operation", "inference", "dev", True),
        ("operation", "benchmark", "dev", False),
    ],
)
def test_a_stop_covers_its_environment_and_its_value_alone(
    dimension: str, value: str, env: str, is_covered: bool
) -> None:
    stop = Stop(env, dimension, value, by="ops", why="drill", at_ms=0)
    assert stop.covers("dev", ON) is is_covered


def test_the_sqlite_store_keeps_the_interface(tmp_path: Path) -> None:
    store: Store = SqliteStore(tmp_path / "ledger.db", clock=lambda: 1_800_000_000.0)
    assert store.join("a", ()) == (0, 0)
    assert store.sync(Batch()).holders == 1
    store.leave()
    store.close()
