"""The report says every figure it was given, and each assumption in words."""

from io import StringIO
from typing import Any, get_args

from rich.console import Console

from gateway.decide.recorded import Ending
from gateway.decide.replay import Assumption, Replayed
from gateway.domain.call import CallRecord
from gateway.lab.replay import About, findings_of
from gateway.lab.replay_report import ASSUMED, show

NOON_MS = 1_795_262_400_000
BEFORE = Ending("baseline", "sim/base[1]", "answered", "", 1_000_000, 1_200)


def replayed(after: Ending, *assumed: Any, before: Ending = BEFORE, id: str = "req-1") -> Replayed:
    record = CallRecord(id=id, at_ms=NOON_MS, env="dev", agent="qa_agent", share_bps=1_000)
    return Replayed(record, before, after, 1_000, frozenset(assumed))


def shown(*calls: Replayed, agent: str = "") -> str:
    about = About(
        env="dev", since_ms=0, until_ms=NOON_MS, policy="next.toml", was="policies/dev.toml", agent=agent,
        counted=0, elsewhere=0, torn=0,
    )  # fmt: skip
    screen = Console(file=StringIO(), width=140, highlight=False)
    show(about, findings_of(calls, agent=agent), screen)
    assert isinstance(screen.file, StringIO)
    return "\n".join(" ".join(line.split()) for line in screen.file.getvalue().splitlines())


def test_every_assumption_has_its_words() -> None:
    assert set(ASSUMED) == set(get_args(Assumption))


def test_without_calls_it_says_so() -> None:
    assert shown() == (
        "dev, 1970-01-01T00:00:00Z to 2026-11-21T12:00:00Z: calls made under policies/dev.toml, "
        "replayed under next.toml\nNo such call was recorded."
    )


def test_a_call_that_moves_is_in_every_table_it_belongs_to() -> None:
    text = shown(replayed(Ending("finetuned", "sim/ft", "answered", "", 4_000_000, 1_200), "cost_kept"))
    for line in (
        "recorded 1 1 0 0 0 $0.001 1,200",
        "replayed 1 1 0 0 0 $0.004 1,200",
        "difference 0 0 0 0 0 +$0.003 0",
        "1 of 1 call would go otherwise.",
        "qa_agent 1 1 $0.001 $0.004 +$0.003",
        "qa_agent variant baseline -> finetuned 1",
        # What a name holds is no markup.
        "qa_agent model sim/base[1] -> sim/ft 1",
        "2026-11-21T12:00:00Z req-1 qa_agent baseline, sim/base[1] finetuned, sim/ft +$0.003",
        f"1 call: {ASSUMED['cost_kept']}",
    ):
        assert line in text.splitlines()
    assert "refused by" not in text


def test_a_refusal_is_told_with_its_cap_and_its_first_time() -> None:
    text = shown(replayed(Ending("baseline", "", "refused", "global 20.00 usd per hour")), agent="qa_agent")
    assert "calls of qa_agent made under" in text
    assert "global 20.00 usd per hour 2026-11-21T12:00:00Z 0 1" in text
    assert "difference 0 -1 +1 0 0 -$0.001 -1,200" in text
    assert "refused: global 20.00 usd per hour -$0.001" in text


def test_a_refusal_that_is_gone_has_no_first_time() -> None:
    text = shown(replayed(BEFORE, before=Ending("baseline", "", "refused", "user 3 requests per day")))
    assert "user 3 requests per day - 1 0" in text


def test_where_nothing_changes_there_is_no_table_of_changes() -> None:
    text = shown(replayed(BEFORE))
    assert "No call would go otherwise." in text
    assert "changes of most cost" not in text
    assert "what moves" not in text
