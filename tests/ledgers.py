"""Ledgers for tests of what people see of them: rows by hand, and accounts as a gateway that serves makes them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from gateway.cli import ledger as cli_ledger
from gateway.cli.main import main
from gateway.config import Loaded, Paths, load
from gateway.decide.caps import Rule
from gateway.domain.ledger import Amounts, Dimensions, LedgerRow
from gateway.store.ledger import Ledger
from gateway.store.sqlite import SqliteStore
from gateway.store.store import Ask, Batch, Spot
from tests.planning import CONFIG, ROUTING

NOON_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z
NOON_S = NOON_MS / 1000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
USD = 1_000_000_000
QA = Dimensions(agent="qa_agent", key="web", user="u1", model="mistral/small", variant="finetuned")
LEGAL = Dimensions(agent="legal_agent", user="u2", operation="benchmark", model="mistral/base", variant="baseline")


def row(id: str, nusd: int = USD, **changes: object) -> LedgerRow:
    """A row of production's at noon, posted."""
    known = LedgerRow(id=id, at_ms=NOON_MS, env="production", on=QA, amounts=Amounts(nusd, 1, 100))
    return msgspec.structs.replace(known, **changes)


def serve(
    path: Path,
    rules: Sequence[Rule],
    rows: Iterable[LedgerRow] = (),
    *,
    callers: Sequence[Dimensions] = (QA, LEGAL),
    held: int = 0,
    now_s: float = NOON_S,
) -> None:
    """Bring rows as a gateway does, with an account of every rule for these callers; `held` of each is in flight.

    The gateway is not heard of again: its leases stay.
    """
    store = SqliteStore(path, clock=lambda: now_s)
    store.join("gateway-1", rules)
    spots: dict[Spot, Ask] = {}
    for rule in rules:
        for on in callers:
            if rule.applies(on) or not rule.scope:
                window = rule.window(now_s)
                spot = Spot(rule.account(on), window.start_s)
                spots[spot] = Ask(rule, on, spot, window.end_s, held, held)
    store.sync(Batch(rows=list(rows), asks=list(spots.values())))
    if held:
        store.sync(Batch(held=[(spot, held) for spot in spots]))
    store.close()


class House:
    """A directory with a configuration in it, a person at the terminal there, and a clock that stands at noon."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, policy: str) -> None:
        self.path = path
        (path / "policies").mkdir()
        (path / "config.toml").write_text(CONFIG)
        (path / "policies" / "production.toml").write_text(policy)
        (path / "policies" / "dev.toml").write_text("")
        (path / "policies" / "routing.toml").write_text(ROUTING)
        monkeypatch.chdir(path)
        monkeypatch.setattr(cli_ledger, "clock", lambda: NOON_S)

    @property
    def ledger_path(self) -> Path:
        return self.path / "state" / "gateway.db"

    def load(self) -> Loaded:
        return load(Paths(Path("config.toml"), Path("policies")), "production", litellm_map={}, want_secrets=False)

    def serve(self, *rows: LedgerRow, held: int = 0) -> None:
        """A gateway has served, and these are its rows."""
        self.ledger_path.parent.mkdir(exist_ok=True)
        serve(self.ledger_path, self.load().plan.rules, rows, held=held)

    def ledger(self) -> Ledger:
        return Ledger(self.ledger_path, clock=lambda: NOON_S)

    def run(self, *arguments: str, stdin: bytes = b"") -> Result:
        """`gateway costs ...` in production."""
        variables = {"GATEWAY_ENV": "production", "GENESIS_ENV": None, "LOGNAME": "ann"}
        return CliRunner().invoke(main, ["costs", *arguments], input=stdin, env=variables, catch_exceptions=False)
