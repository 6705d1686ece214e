"""Operations as the conventions for generative AI count them: attempts, the answer's tokens, the first chunk."""

import random
from pathlib import Path

import pytest

from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.money import Usage
from gateway.telemetry.distribution import Distribution
from gateway.telemetry.gen_ai import (
    DURATION,
    GEN_AI,
    MAX_ANSWERED,
    PER_CHUNK,
    SECONDS,
    TO_FIRST_CHUNK,
    TOKEN_USAGE,
    TOKENS,
    Operations,
    providers_of,
)
from gateway.telemetry.metrics import METRICS, Declared, Kind
from tests.planning import CONFIG, plan_of

FINETUNED, BASELINE, FURTHER = "mistral/ft:qa", "mistral/base", "openai/gpt-4o"


def record(
    *attempts: Attempt, first_chunk_ms: float | None = None, usage: Usage | None = None, answered: str = ""
) -> CallRecord:
    return CallRecord(
        id="c",
        at_ms=1,
        env="dev",
        attempts=list(attempts),
        first_chunk_ms=first_chunk_ms,
        usage=usage,
        model_answered=answered,
    )


def attempt(ref: str = FINETUNED, ms: float = 100.0, *, at: int = 0, fault: FaultKind | None = None) -> Attempt:
    return Attempt(ref=ref, started_ms=at, duration_ms=ms, fault=fault)


def shown(operations: Operations, declared: Declared) -> dict[tuple[str, ...], Distribution]:
    """By labels, without the operation's name, which is always the same."""
    (rows,) = [rows for one, rows in operations.figures() if one is declared]
    found = {}
    for labels, values in rows:
        assert isinstance(values, Distribution)
        assert labels[0] == "chat"
        assert len(labels) == len(declared.labels)
        found[labels[1:]] = values
    return found


def test_the_names_and_edges_are_those_of_the_conventions() -> None:
    assert [(one.name, one.unit) for one in GEN_AI] == [
        ("gen_ai.client.operation.duration", "s"),
        ("gen_ai.client.operation.time_to_first_chunk", "s"),
        ("gen_ai.client.operation.time_per_output_chunk", "s"),
        ("gen_ai.client.token.usage", "{token}"),
    ]
    assert [0.01 * 2**power for power in range(14)] == pytest.approx(SECONDS)
    assert (TOKENS[0], TOKENS[-1], len(TOKENS)) == (1, 67_108_864, 14)
    assert all(one.kind is Kind.HISTOGRAM and one.dotted == one.name for one in GEN_AI)
    assert not {one.dotted for one in METRICS} & {one.dotted for one in GEN_AI}


def test_nothing_is_shown_of_what_never_happened() -> None:
    assert [rows for _, rows in Operations(plan_of()).figures()] == [[], [], [], []]


def test_every_attempt_counts_for_its_own_model_and_provider() -> None:
    operations = Operations(plan_of())
    operations.call_ended(
        record(
            attempt(FINETUNED, 40.0, fault=FaultKind.SERVER),
            attempt(FINETUNED, 50.0, at=41, fault=FaultKind.SERVER),
            attempt(BASELINE, 10.0, at=92, fault=FaultKind.CONNECT),
            attempt(FURTHER, 640.0, at=103),
        )
    )
    found = shown(operations, DURATION)
    assert {labels: (values.count, pytest.approx(values.sum)) for labels, values in found.items()} == {
        ("mistral_ai", "ft:qa", "", "server"): (2, 0.09),
        ("mistral_ai", "base", "", "connect"): (1, 0.01),
        ("openai", "gpt-4o", "", ""): (1, 0.64),
    }
    # An edge belongs to its own bucket: 0.01 is the first one's, 0.64 the seventh's.
    assert found["mistral_ai", "base", "", "connect"].counts[0] == 1
    assert found["openai", "gpt-4o", "", ""].counts[6] == 1


def test_a_call_without_an_attempt_is_no_operation() -> None:
    operations = Operations(plan_of())
    operations.call_ended(record(usage=Usage(prompt_tokens=1, completion_tokens=1), first_chunk_ms=1.0))
    assert [rows for _, rows in operations.figures()] == [[], [], [], []]


def test_tokens_are_those_of_the_model_that_answered() -> None:
    operations = Operations(plan_of())
    usage = Usage(prompt_tokens=4, completion_tokens=5)
    operations.call_ended(record(attempt(fault=FaultKind.RESET), attempt(BASELINE), usage=usage))
    found = shown(operations, TOKEN_USAGE)
    assert {labels: (values.sum, values.counts.index(1)) for labels, values in found.items()} == {
        ("mistral_ai", "base", "", "input"): (4, 1),
        ("mistral_ai", "base", "", "output"): (5, 2),
    }
    # Of an answer whose usage nobody knows there is nothing to tell.
    operations.call_ended(record(attempt(FURTHER)))
    assert shown(operations, TOKEN_USAGE).keys() == found.keys()


@pytest.mark.parametrize("size", [0, 1, 2, 67_108_864, 67_108_865, 10**12])
def test_any_number_of_tokens_has_a_bucket(size: int) -> None:
    operations = Operations(plan_of())
    operations.call_ended(record(attempt(), usage=Usage(prompt_tokens=size, completion_tokens=0)))
    assert shown(operations, TOKEN_USAGE)["mistral_ai", "ft:qa", "", "input"].count == 1


@pytest.mark.parametrize(
    ("first_chunk_ms", "model", "waited_s"),
    [
        (20.0, "ft:qa", 0.02),  # Joined: the second only went on.
        (99.9, "ft:qa", 0.0999),
        (100.0, "base", 0.0),
        (130.0, "base", 0.03),
    ],
)
def test_the_first_chunk_is_timed_from_the_attempt_that_brought_it(
    first_chunk_ms: float, model: str, waited_s: float
) -> None:
    operations = Operations(plan_of())
    both = (attempt(FINETUNED, 90.0, fault=FaultKind.CUT), attempt(BASELINE, 50.0, at=100))
    operations.call_ended(record(*both, first_chunk_ms=first_chunk_ms))
    ((labels, values),) = shown(operations, TO_FIRST_CHUNK).items()
    assert labels == ("mistral_ai", model, "")
    assert values.sum == pytest.approx(waited_s)


def test_a_start_that_was_rounded_up_is_not_a_wait_below_zero() -> None:
    operations = Operations(plan_of())
    operations.call_ended(record(attempt(at=1), first_chunk_ms=0.6))
    ((_, values),) = shown(operations, TO_FIRST_CHUNK).items()
    assert (values.sum, values.count) == (0, 1)


def test_strangers_names_are_one_and_a_known_upstream_is_still_told() -> None:
    operations = Operations(plan_of())
    dice = random.Random(5)
    kinds = list(FaultKind)
    for _ in range(10_000):
        word = f"{dice.getrandbits(64):x}"
        ref = dice.choice((f"openai/{word}", f"{word}/{word}", word, "", "/", f"openai/{word}/{word}"))
        fault = dice.choice((None, *kinds))
        usage = Usage(prompt_tokens=dice.getrandbits(20), completion_tokens=dice.getrandbits(20))
        operations.call_ended(record(attempt(ref, dice.expovariate(0.001), fault=fault), usage=usage))
    found = shown(operations, DURATION)
    assert {labels[:2] for labels in found} == {("openai", "other"), ("other", "other")}
    assert len(found) == 2 * (len(kinds) + 1)
    assert sum(values.count for values in found.values()) == 10_000


# --- The name that a provider says it answered with ------------------------------------------------------------------


def test_an_answers_own_name_is_told_of_its_attempt_and_of_no_other() -> None:
    operations = Operations(plan_of())
    usage = Usage(prompt_tokens=4, completion_tokens=5)
    failed, answered = attempt(FINETUNED, fault=FaultKind.CUT), attempt(FURTHER, at=100)
    operations.call_ended(record(failed, answered, usage=usage, answered="gpt-4o-2024-08-06", first_chunk_ms=120.0))
    named = ("openai", "gpt-4o", "gpt-4o-2024-08-06")
    assert shown(operations, DURATION).keys() == {("mistral_ai", "ft:qa", "", "cut"), (*named, "")}
    assert shown(operations, TO_FIRST_CHUNK).keys() == {named}
    assert shown(operations, TOKEN_USAGE).keys() == {(*named, "input"), (*named, "output")}


def test_a_provider_that_makes_up_names_gets_a_few_of_them_and_the_rest_are_one() -> None:
    operations = Operations(plan_of())
    for number in range(1_000):
        operations.call_ended(record(attempt(BASELINE), answered=f"made-up-{number}"))
        operations.chunks_came(BASELINE, f"in-a-stream-{number}", 1, 0.01)
    found = shown(operations, DURATION) | shown(operations, PER_CHUNK)
    names = {labels[2] for labels in found}
    assert len(names) == MAX_ANSWERED + 1
    assert "other" in names
    assert sum(values.count for values in shown(operations, DURATION).values()) == 1_000
    # Another model has room of its own.
    operations.call_ended(record(attempt(FURTHER), answered="gpt-4o-2024-08-06"))
    assert ("openai", "gpt-4o", "gpt-4o-2024-08-06", "") in shown(operations, DURATION)


@pytest.mark.parametrize("name", ["two words", "a\nb", "-", "x" * 129, "ключ", "<b>", '"', "the user said: 42"])
def test_what_is_no_name_of_a_model_never_becomes_an_attribute(name: str) -> None:
    operations = Operations(plan_of())
    operations.call_ended(record(attempt(), answered=name))
    ((labels, _),) = shown(operations, DURATION).items()
    assert labels[2] == "other"
    # Nor is room taken for it.
    for number in range(MAX_ANSWERED):
        operations.call_ended(record(attempt(), answered=f"name-{number}"))
    assert len(shown(operations, DURATION)) == MAX_ANSWERED + 1


def test_of_a_model_that_its_caller_named_the_answers_name_is_the_callers_too() -> None:
    operations = Operations(plan_of())
    for number in range(20):
        operations.call_ended(record(attempt(f"openai/own-{number}"), answered=f"own-{number}"))
    assert shown(operations, DURATION).keys() == {("openai", "other", "other", "")}


# --- Chunks ----------------------------------------------------------------------------------------------------------


def test_each_chunk_is_timed_from_the_one_before_it_and_those_that_came_together_waited_once() -> None:
    operations = Operations(plan_of())
    operations.chunks_came(FURTHER, "gpt-4o-mini", 1, 0.03)
    operations.chunks_came(FURTHER, "gpt-4o-mini", 4, 0.5)
    ((labels, values),) = shown(operations, PER_CHUNK).items()
    assert labels == ("openai", "gpt-4o", "gpt-4o-mini")
    assert (values.count, values.sum) == (5, 0.53)
    assert values.counts[:7] == [3, 0, 1, 0, 0, 0, 1]


# --- Names -----------------------------------------------------------------------------------------------------------


def test_providers_are_known_by_upstream_and_by_model_even_where_another_serves_it() -> None:
    assert providers_of(plan_of())["mistral"] == "mistral_ai"
    assert providers_of(plan_of())["openai/gpt-4o"] == "openai"
    served = providers_of(plan_of(policy='[models]\nupstream = "sim"\n'))
    assert served["mistral/base"] == "simulator"


def test_a_sampled_attempt_leaves_its_own_span_where_it_was_counted() -> None:
    operations = Operations(plan_of())
    traced = attempt(FINETUNED, 50.0, at=100)
    traced.span_id = "b" * 16
    found = record(attempt(FINETUNED, 20.0), traced)
    found.trace_id = "a" * 32
    operations.call_ended(found)
    values = shown(operations, DURATION)["mistral_ai", "ft:qa", "", ""]
    assert values.exemplars is not None
    assert {place: tuple(left) for place, left in values.exemplars.items()} == {3: ("a" * 32, "b" * 16, 0.05, 151.0)}


def test_a_reload_learns_new_names_and_forgets_no_count() -> None:
    operations = Operations(plan_of())
    operations.call_ended(record(attempt()))
    operations.call_ended(record(attempt("mistral/ft:qa-2")))
    operations.take_plan(plan_of(config=CONFIG.replace("mistral/ft:qa", "mistral/ft:qa-2")))
    operations.call_ended(record(attempt("mistral/ft:qa-2")))
    assert {labels: values.count for labels, values in shown(operations, DURATION).items()} == {
        ("mistral_ai", "ft:qa", "", ""): 1,
        ("mistral_ai", "other", "", ""): 1,
        ("mistral_ai", "ft:qa-2", "", ""): 1,
    }


def test_the_documentation_has_each_with_its_unit_and_attributes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for one in GEN_AI:
        labels = ", ".join(f"`{label}`" for label in one.labels[4:]) or "–"
        assert f"| `{one.name}` | histogram | {one.unit} | {labels} | {one.help} |" in text
