"""The ledger on a terminal: every figure whole, every name as it is."""

import re
from io import BytesIO, StringIO, TextIOWrapper

import msgspec
import pytest
from rich.console import Console

from gateway.lab import cost_tables
from gateway.store.statement import AccountLine, Statement, StopLine
from tests.ledgers import USD, row


def shown(show: object, *values: object, width: int = cost_tables._WIDTH) -> str:
    paper = StringIO()
    show(*values, Console(file=paper, width=width, highlight=False))  # type: ignore[operator]
    return paper.getvalue()


ACCOUNT = AccountLine(
    cap="global 20.00 usd per hour", scope={}, unit="usd", limit="20.00", posted="1.234567891", held="0.00",
    in_doubt="0.00", remaining="18.765432109", leased="18.00", used_percent=6.1, burn_per_hour="1.00",
    exhausted_in_s=None, since="2026-11-21T12:00:00Z", resets="2026-11-21T13:00:00Z",
    resets_in_s=3_600,
)  # fmt: skip


def statement(*accounts: AccountLine, **changes: object) -> Statement:
    empty = Statement(
        env="production", at="2026-11-21T12:00:00Z", accounts=list(accounts), accounts_left_out={},
        idle=[], stops=[], in_doubt_usd="0.00",
        in_doubt_rows=0, spend=None,
    )  # fmt: skip
    return msgspec.structs.replace(empty, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "to its reset"),
        ({"exhausted_in_s": 0, "remaining": "0.00", "used_percent": 100.0}, "used up"),
        ({"exhausted_in_s": 2_700}, "45 min"),
        ({"resets": None, "resets_in_s": None}, "never"),
        ({"resets_in_s": 1_560}, "in 26 min"),
        ({"burn_per_hour": "12.345678901"}, "$12.3456 "),
        ({"burn_per_hour": "0.000000123"}, "$0.000000123"),
        ({"remaining": "-1.50", "used_percent": 107.5}, "-$1.50"),
        ({"used_percent": 107.5}, "██████████ 107.5 %"),
        ({"used_percent": 99.9}, "█████████░  99.9 %"),
        ({"used_percent": -1.0}, "░░░░░░░░░░  -1.0 %"),
        (
            {"unit": "tokens", "posted": 3, "held": 0, "in_doubt": 0, "burn_per_hour": 1, "remaining": 1_234_567},
            "1,234,567",
        ),
    ],
)
def test_an_account_is_a_line(changes: dict[str, object], said: str) -> None:
    text = shown(cost_tables.show_statement, statement(msgspec.structs.replace(ACCOUNT, **changes)))
    assert said in text


def test_the_largest_amounts_are_not_cut() -> None:
    huge = "9007199.254740991"
    account = msgspec.structs.replace(
        ACCOUNT, cap="agent+user 9007199.25 usd per month America/Argentina/Buenos_Aires", posted=huge, held=huge,
        in_doubt=huge, remaining=huge, scope={"agent": "a" * 64, "user": "f" * 32},
    )  # fmt: skip
    text = shown(cost_tables.show_statement, statement(account))
    assert text.count(f"${huge}") == 4
    assert "…" not in text


def test_brackets_in_names_are_not_markup() -> None:
    doubt = row("req-[red]1", state="in_doubt", note="[link=x]y[/link]")
    text = shown(cost_tables.show_doubts, [doubt], width=200)
    assert "req-[red]1" in text
    assert "[link=x]y[/link]" in text


def test_a_switch_says_how_it_is_taken_back() -> None:
    for dimension, value, scope in (("", "", ""), ("agent", "a", " agent=a"), ("user", "ab", " user-hash=ab")):
        stop = StopLine(dimension=dimension, value=value, by="ann", why="x", at="2026-11-21T12:00:00Z")
        assert f"`gateway costs resume{scope}`" in cost_tables.stop_text(stop)


def test_doubts_add_up() -> None:
    text = shown(cost_tables.show_doubts, [row(name, USD // 2, state="in_doubt") for name in "abc"])
    assert "1.50 usd in 3 rows" in text


def test_a_narrow_terminal_wraps_and_loses_nothing() -> None:
    assert cost_tables.console().width >= cost_tables._WIDTH


def test_a_terminal_without_unicode_gets_signs_it_has() -> None:
    paper = TextIOWrapper(BytesIO(), encoding="ascii")
    screen = Console(file=paper, width=cost_tables._WIDTH, highlight=False)
    cost_tables.show_statement(statement(msgspec.structs.replace(ACCOUNT, used_percent=50.0)), screen)
    paper.seek(0)
    assert "#####-----  50.0 %" in paper.read()


def test_a_long_list_of_doubts_is_cut_and_its_sum_is_not() -> None:
    text = shown(cost_tables.show_doubts, [row(f"req-{n}.", USD, state="in_doubt") for n in range(250)])
    assert len(re.findall(r"^req-", text, re.M)) == 200
    assert "and 50 more" in text
    assert "250.00 usd in 250 rows" in text
