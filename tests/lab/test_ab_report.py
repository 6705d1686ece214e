"""The A/B report, read back: what to do first, and figures that are the journal's and the ledger's."""

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from gateway.domain.call import CallRecord
from gateway.domain.rollout import PILOT, Event
from gateway.lab.ab_figures import Asked, Figures, gather, nothing
from gateway.lab.ab_report import as_json, markdown, write_report
from gateway.store.experiments import Experiments
from tests.ledgers import DAY_MS, NOON_MS
from tests.planning import plan_of
from tests.running import CHAT, PRICES, RunningGateway, chat, running_gateway
from tests.trials import Effect, calls_of, climb, tell

POLICY = """
[ab_testing]
enabled = true
rollout_percentage = 10
[rollout]
holdback_percent = 5
bake_s = 3600
min_users = 50
guardrails = { success_rate = 0.06, mean_latency = 0.20 }
"""
PLAN = plan_of(POLICY, env="production")
PATIENCE_S = 20.0


class Desk:
    """Two experiments of a week: one that goes well, and one whose model fails too often."""

    def __init__(self, path: Path) -> None:
        self.out = path / "reports" / "ab_testing_results.md"
        store = path / "gateway.db"
        for agent, effect in (("qa_agent", Effect()), ("legal_agent", Effect(success=0.7, slower=1.6))):
            states = climb(store, PLAN.rollouts[agent], env="production", agent=agent)
            tell(store, calls_of(states, env="production", users=240, effect=effect))
        self.experiments = Experiments(store, clock=lambda: NOON_MS / 1000)
        asked = Asked(None, NOON_MS, windows=[("24h", DAY_MS), ("all", None)])
        self.figures = gather(self.experiments, PLAN, NOON_MS, asked)
        self.written = write_report(self.figures, self.out)
        self.text = self.out.read_text()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("trial"))
    yield made
    made.experiments.close()


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table(text: str, first: str) -> dict[str, list[str]]:
    """The lines of the table whose head begins with this cell, by their own first cell."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    found: dict[str, list[str]] = {}
    for line in lines:
        if not line:
            break
        name, *cells = (cell.strip().strip("`") for cell in line.split("|")[1:-1])
        found[name] = cells
    return found


def test_it_begins_with_what_to_do_and_why(desk: Desk) -> None:
    begin = desk.text.partition("\n## ")[0]
    rows = table(begin, "agent")
    assert [rows[agent][-1] for agent in ("legal_agent", "qa_agent")] == ["**roll back**", "**proceed**"]
    assert (
        "- `legal_agent`: **roll back.** Take the fine-tuned model back from the 50 % of users who have it: " in begin
    )
    assert (
        "- `qa_agent`: **proceed.** Raise the share from 50 % to 75 %: `gateway rollout advance --agent qa_agent`"
        in begin
    )
    assert re.search(r"\n  - success rate \d\d\.\d\d % against .* past the guardrail of 6 points less\n", begin)


def test_every_agent_has_its_metrics_its_calls_and_its_story(desk: Desk) -> None:
    for found in desk.figures.agents:
        text = section(desk.text, found.agent)
        metrics = table(text, "metric")
        assert list(metrics) == [
            "success rate", "mean latency", "p95 latency", "cost per 1,000 requests", "user satisfaction",
        ]  # fmt: skip
        assert "(at most 6 points less)" in metrics["success rate"][-1]
        assert table(text, "")["calls"] == [f"{found.arms.treated.calls:,}", f"{found.arms.control.calls:,}"]
        assert [line[2] for line in table(text, "when").values()] == ["25 % → 50 %", "10 % → 25 %", "0 % → 10 %"]
        assert "24h" in table(text, "window")
        assert "Users arrive in the arms as they were assigned" in text


def test_no_figure_has_nine_digits(desk: Desk) -> None:
    numbers = [found.replace(".", "").lstrip("0") for found in re.findall(r"\d+\.\d+", desk.text)]
    assert max(map(len, numbers)) <= 5


def test_all_agents_are_put_together_and_the_method_is_told(desk: Desk) -> None:
    assert len(table(section(desk.text, "All agents together"), "metric")) == 5
    assert "5 % at most" in section(desk.text, "How to read this")
    assert "docs/statistics.md" in section(desk.text, "How to read this")


def test_the_same_store_and_moment_give_the_same_bytes(desk: Desk, tmp_path: Path) -> None:
    again = write_report(desk.figures, tmp_path / desk.out.name)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in desk.written]
    assert len(again) == 7


def test_every_plot_that_is_shown_is_there(desk: Desk) -> None:
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", desk.text)
    assert sorted(shown) == sorted(f"ab_testing_results/{path.name}" for path in desk.written[1:])
    assert all((desk.out.parent / name).is_file() for name in shown)


def test_the_plots_of_a_report_without_a_suffix_are_where_it_shows_them(desk: Desk, tmp_path: Path) -> None:
    out, *plots = write_report(desk.figures, tmp_path / "results")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", out.read_text())
    assert sorted(tmp_path / name for name in shown) == sorted(plots)


def test_without_matplotlib_it_has_no_plots_and_says_so(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "report.md"
    assert write_report(desk.figures, out) == [out]
    assert "Without plots: the plots need matplotlib" in out.read_text()
    assert table(out.read_text(), "agent").keys() == {"legal_agent", "qa_agent", "all"}


def test_for_machines_it_is_the_same_in_full(desk: Desk) -> None:
    found = msgspec.json.decode(as_json(desk.figures))
    assert (found["env"], found["now_ms"], len(found["agents"])) == ("production", NOON_MS, 2)
    for one, known in zip(found["agents"], desk.figures.agents, strict=True):
        assert one["arms"]["treated"]["cost_nusd"] == known.arms.treated.cost_nusd
        assert one["evidence"]["findings"][0]["metric"] == "success_rate"
        assert one["advice"]["word"] == (known.advice.word if known.advice else None)


def only(figures: Figures) -> str:
    return markdown(figures, [], "folder")


def test_without_any_rollout_it_says_so() -> None:
    assert "**No rollout has begun in production**: a gateway that serves begins one" in only(nothing(PLAN, NOON_MS))
    none = nothing(plan_of("", env="production"), NOON_MS)
    assert "`ab_testing.enabled` is false. There is nothing to compare." in only(none)


def test_a_rollout_without_a_call_is_told_and_recommends_to_hold(tmp_path: Path) -> None:
    climb(tmp_path / "gateway.db", PLAN.rollouts["qa_agent"], env="production", agent="qa_agent", steps=())
    with Experiments(tmp_path / "gateway.db", clock=lambda: NOON_MS / 1000) as experiments:
        text = only(gather(experiments, PLAN, NOON_MS, Asked(None, NOON_MS)))
    assert "- `qa_agent`: **hold.** Leave the share at 10 %. Why:" in text
    assert "No call of this experiment was seen in that time." in text
    assert "### How it came here" in text


def test_an_arm_without_calls_is_told_as_too_few(tmp_path: Path) -> None:
    store = tmp_path / "gateway.db"
    states = climb(store, PLAN.rollouts["qa_agent"], env="production", agent="qa_agent", steps=())
    tell(store, [call for call in calls_of(states, env="production", users=60) if call.variant == "baseline"])
    with Experiments(store, clock=lambda: NOON_MS / 1000) as experiments:
        found = gather(experiments, PLAN, NOON_MS, Asked(None, NOON_MS))
    assert write_report(found, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert table(section(text, "qa_agent"), "metric")["success rate"][5] == "too few"
    assert table(section(text, "qa_agent"), "")["calls"][0] == "0"


def test_an_agent_that_is_gone_keeps_its_story_and_gets_no_advice(desk: Desk) -> None:
    agents = {name: agent for name, agent in PLAN.agents.items() if name != "qa_agent"}
    gone = PLAN._replace(agents=agents, rollouts={"legal_agent": PLAN.rollouts["legal_agent"]})
    text = only(gather(desk.experiments, gone, NOON_MS, Asked(NOON_MS - DAY_MS, NOON_MS, agents=["qa_agent"])))
    assert "- `qa_agent`: The configuration has no such agent any more, so nothing is recommended" in text
    assert len(table(section(text, "qa_agent"), "when")) == 3


# --- Real traffic ----------------------------------------------------------------------------------------------------

REAL = """
[ab_testing]
enabled = true
rollout_percentage = 50
[rollout]
guardrails = { success_rate = 0.02 }
[overrides]
variant = true
"""


async def served(gateway: RunningGateway) -> list[CallRecord]:
    """Calls of 40 users, some of which fail, have a forced arm or no user; once the store has been told of them."""
    async with aiohttp.ClientSession() as session:
        for number in range(120):
            headers = {"x-gateway-user": f"user-{number % 40}"} if number % 10 else {}
            if number % 12 == 5:
                headers["x-gateway-variant"] = "finetuned"
            body = chat(f"question {number}", model=("qa_agent", "support_agent")[number % 3 == 0])
            async with session.post(f"{gateway.data_url}{CHAT}", json=body, headers=headers) as reply:
                await reply.read()
    records = gateway.journal()
    store = gateway.runtime.journal.directory.parents[1] / "gateway.db"
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with Experiments(store, clock=lambda: 0.0) as experiments:
                if len(list(experiments.outcomes("dev"))) == len(records):
                    return records
            await asyncio.sleep(0.05)


async def test_its_calls_and_costs_are_the_journals_and_the_ledgers(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=REAL, config=PRICES) as gateway:
        records = await served(gateway)
        plan = gateway.runtime.plan
        rows = gateway.ledger()
        until_ms = max(record.at_ms for record in records) + 60_000
        with Experiments(tmp_path / "gateway.db", clock=lambda: until_ms / 1000) as experiments:
            figures = gather(experiments, plan, until_ms, Asked(None, until_ms))
    assert [found.agent for found in figures.agents] == ["qa_agent", "support_agent"]
    for found in figures.agents:
        mine = [record for record in records if record.agent == found.agent]
        arms = found.arms
        for arm, variant in ((arms.treated, "finetuned"), (arms.control, "baseline")):
            own = [one for one in mine if one.variant == variant and one.variant_from == "experiment"]
            assert arm.calls == len(own) > 10
            assert arm.users == len({one.user for one in own})
            assert arm.cost_nusd == sum(row.amounts.nusd for row in rows if row.id.rpartition(".")[0] in ids(own)) > 0
        assert arms.outside.calls == len([one for one in mine if one.variant_from != "experiment"]) > 0
        whole = arms.treated.cost_nusd + arms.control.cost_nusd + arms.outside.cost_nusd
        assert whole == sum(row.amounts.nusd for row in rows if row.on.agent == found.agent)
        assert found.state.by == PILOT
        assert [change.event for change in found.changes] == [Event.BEGAN]


def ids(records: list[CallRecord]) -> set[str]:
    return {record.id for record in records}
