"""What the `costs` commands share: a ledger that opens or says why not, and a name for the audit log."""

import getpass
from pathlib import Path

import click
import pytest

from gateway.cli.ledger import Chosen, desk, login_name, span_or_exit
from gateway.store.store import StoreError
from tests.ledgers import NOON_MS, NOON_S, House

CHOSEN = Chosen(Path("config.toml"), Path("policies"), "production")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch, policy="")


def test_a_desk_has_the_ledger_the_plan_and_the_moment(house: House) -> None:
    with desk(CHOSEN, is_new_allowed=True) as opened:
        assert (opened.env, opened.now_s, opened.now_ms) == ("production", NOON_S, NOON_MS)
        assert opened.plan.env == "production"
        assert opened.ledger.stops("production") == []
    with pytest.raises(StoreError):
        opened.ledger.stops("production")


def test_what_goes_wrong_at_the_desk_is_said_and_is_exit_status_1(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, desk(CHOSEN):
        raise AssertionError("there is no ledger")
    assert ended.value.code == 1
    with pytest.raises(SystemExit), desk(CHOSEN, is_new_allowed=True):
        raise StoreError("the disk is full")
    assert capsys.readouterr().err == (
        "there is no ledger at state/gateway.db; a gateway makes it when it first serves\nthe disk is full\n"
    )


@pytest.mark.parametrize("error", [KeyError("uid"), OSError("no name")])
def test_who_has_only_a_number_is_known_by_it(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def nobody() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert login_name().startswith("uid ")


@pytest.mark.parametrize(
    ("since", "until", "option"), [("x", "", "--since"), ("1h", "x", "--until"), ("1h", "2h", "--until")]
)
def test_a_wrong_time_names_its_option(since: str, until: str, option: str) -> None:
    with pytest.raises(click.BadParameter) as wrong:
        span_or_exit(since, until, NOON_MS)
    assert wrong.value.param_hint == option
