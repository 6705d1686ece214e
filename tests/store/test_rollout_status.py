"""A rollout as plain values: what they say is what the state, the look and the audit log say, and JSON can hold it."""

import msgspec

from gateway.decide.rollout import Cause, change_by
from gateway.domain.experiment import METRICS
from gateway.domain.rollout import Event, Phase
from gateway.store.rollout_status import change_line, status_of
from tests.rolling import HOUR_MS, MANUAL, NOW_MS, PLAN, Found, begun, first, look_of

STATE = begun()


def test_it_says_where_a_rollout_stands_and_what_its_calls_say() -> None:
    look = look_of(STATE)
    found = status_of(STATE, look, PLAN, now_ms=NOW_MS + HOUR_MS)
    assert (found["agent"], found["phase"], found["mode"]) == ("qa_agent", "ramping", "automatic")
    assert (found["share_percent"], found["next_percent"], found["experiment"]) == (10.0, 25.0, 1)
    assert found["since"] == "2026-11-21T00:00:00Z"
    assert found["users"] == {"finetuned": 2_000, "baseline": 9_000}
    assert found["users_at_stage"] == {"finetuned": 100, "baseline": 100}
    assert (found["recommendation"], found["sample_ratio_mismatch"]) == ("proceed", False)
    assert [metric["metric"] for metric in found["metrics"]] == list(METRICS)
    assert msgspec.json.decode(msgspec.json.encode(found)) == found


def test_what_speaks_against_it_is_its_recommendation() -> None:
    look = look_of(STATE, success_rate=Found("breached", "worse"))
    found = status_of(STATE, look, PLAN, now_ms=NOW_MS + HOUR_MS)
    assert found["recommendation"] == "roll back"
    assert (found["metrics"][0]["verdict"], found["metrics"][0]["guardrail"]) == ("worse", "breached")
    held = status_of(STATE, look_of(STATE, is_mismatch=True), MANUAL, now_ms=NOW_MS + HOUR_MS)
    assert (held["recommendation"], held["sample_ratio_mismatch"], held["mode"]) == ("hold", True, "manual")


def test_at_the_last_stage_there_is_no_next_one() -> None:
    decision = change_by(STATE, Event.RAISED, 9_500, Cause(NOW_MS, "ann", ("a test",)))
    found = status_of(decision.state, look_of(decision.state), PLAN, now_ms=NOW_MS)
    assert (found["share_percent"], found["next_percent"]) == (95.0, None)


def test_a_line_of_the_audit_log_has_all_of_it() -> None:
    change = first().change
    assert change is not None
    line = change_line(change)
    assert (line["event"], line["phase"], line["by"]) == ("began", Phase.RAMPING.value, "pilot")
    assert (line["from_percent"], line["share_percent"], line["version"], line["forced"]) == (0.0, 10.0, 1, False)
    assert line["at"] == "2026-11-21T00:00:00Z"
    # One by one, so that nothing that a change knows is left out.
    assert len(line) == len(msgspec.structs.fields(change))
    assert msgspec.json.decode(msgspec.json.encode(line)) == line
