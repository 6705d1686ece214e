"""The replay itself, quick: real gateway processes, a cap that binds, a bill and a ledger that agree."""

from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gateway.lab import azure
from gateway.lab.azure import Figures, Order, Row

TRACE = Path(__file__).parents[1] / "data" / "azure_llm_conv_2023.csv.gz"
ROWS = 150


def paper() -> Console:
    return Console(file=StringIO(), width=160, highlight=False)


def text_of(screen: Console) -> str:
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def figures(**more: object) -> Figures:
    well = {
        "order": Order(1, "clamp"), "calls": 3, "cap_nusd": 100, "billed_nusd": 99, "ledger_nusd": 99,
        "wrong_accounts": 0, "at_first_refusal": 0.95, "at_first_exceeded": None,
        "outcomes": Counter({"passed": 2, "budget_reserved": 1}), "clamped": 0, "waited": 0, "took_s": 1.0,
    }  # fmt: skip
    return Figures(**{**well, **more})


def test_the_trace_is_whole_and_in_order() -> None:
    trace = azure.read_trace(TRACE)
    assert len(trace) == 19_366
    assert sum(row.prompt_tokens for row in trace) == 22_361_870
    assert sum(row.completion_tokens for row in trace) == 4_088_665
    assert [row.at_s for row in trace] == sorted(row.at_s for row in trace)
    assert trace[:2] == [Row(0.0, 374, 44), Row(4.315, 396, 109)]


@pytest.mark.parametrize("generated, asked", [(1, 64), (64, 64), (65, 128), (128, 128), (129, 256), (1000, 1024)])
def test_a_client_asks_for_the_next_power_of_two(generated: int, asked: int) -> None:
    assert Row(0, 10, generated).max_tokens == asked


def test_the_providers_price_is_rounded_up_once() -> None:
    assert azure.cost_nusd(0, 0) == 0
    assert azure.cost_nusd(1_000_000, 1_000_000) == azure.INPUT + azure.OUTPUT
    assert azure.cost_nusd(3, 0) == 1_200


@pytest.mark.parametrize("order", [Order(1, "clamp"), Order(3, "refuse")])
async def test_a_cap_that_binds_is_used_and_not_exceeded(order: Order) -> None:
    screen = paper()
    assert await azure.run(azure.read_trace(TRACE)[:ROWS], [order], screen, speed=60), text_of(screen)
    _, *cells = text_of(screen).splitlines()[-1].split()[:5]
    when_short, billed_usd, overshoot, _ = cells
    assert (when_short, overshoot) == (order.when_short, "0")
    # How much is usable is measured by `make caps` and depends on the machine; that most of it is, does not.
    assert (
        float(billed_usd) > 0.8 * azure.CAP_SHARE * sum(row.cost_nusd for row in azure.read_trace(TRACE)[:ROWS]) / 1e9
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"billed_nusd": 101, "ledger_nusd": 101},
        {"ledger_nusd": 98},
        {"wrong_accounts": 1},
        {"outcomes": Counter({"passed": 2, "internal_error": 1})},
        {"outcomes": Counter({"passed": 2, "TimeoutError": 1})},
    ],
)
def test_a_run_holds_only_where_bill_cap_and_ledger_agree(wrong: dict[str, object]) -> None:
    assert figures().holds
    assert not figures(**wrong).holds


def test_the_table_has_a_row_per_replay_and_a_dash_where_nobody_was_refused() -> None:
    screen = paper()
    screen.print(azure.table_of([figures(), figures(order=Order(4, "refuse"), at_first_refusal=None)]))
    first, second = [line.split() for line in text_of(screen).splitlines()[-2:]]
    assert first[:2] == ["1", "clamp"]
    assert first[4:7] == ["95.00%", "-", "99.00%"]
    assert second[:2] == ["4", "refuse"]
    assert second[4] == "-"


def test_an_unknown_option_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        azure.main(["--slow"])
    assert "--slow" in capsys.readouterr().err
