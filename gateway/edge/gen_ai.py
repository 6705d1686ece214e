"""The metrics of OpenTelemetry's conventions for generative AI, counted where somebody exports them.

An operation is one attempt at one model, not a call: a call that fell back is two. The names, units and edges are those
of `semantic-conventions-genai` at commit 004902b, which goes with semantic-conventions 1.42; all are of status
"Development". It costs 0.4 µs a call, 0.6 a stream, and nothing where nobody exports. Like everything that is counted,
it is bounded by the plan: provider, model and error are names that the configuration or the table of faults has, or
`other`.
"""

from bisect import bisect_left
from collections.abc import Iterator

from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.settings import split_ref
from gateway.edge.observe import OTHER, Declared, Distribution, Figures, Kind

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**power for power in range(14))
_OPERATION = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model")
_NAME = "gen_ai.client.operation"

DURATION = Declared(
    f"{_NAME}.duration", Kind.HISTOGRAM, "One attempt at a model, to its end.", (*_OPERATION, "error.type"), "s"
)
TO_FIRST_CHUNK = Declared(
    f"{_NAME}.time_to_first_chunk", Kind.HISTOGRAM, "Streams: from the attempt's start to content.", _OPERATION, "s"
)
TOKEN_USAGE = Declared(
    "gen_ai.client.token.usage",
    Kind.HISTOGRAM,
    "Tokens of one answer, as the provider bills them.",
    (*_OPERATION, "gen_ai.token.type"),
    "{token}",
)
GEN_AI = (DURATION, TO_FIRST_CHUNK, TOKEN_USAGE)

# The conventions' names for those that have one; a compatible server goes by its name in the configuration.
_PROVIDERS = {"openai": "openai", "mistral": "mistral_ai", "simulator": "simulator"}


class _Cell:
    """What is counted for one model of one provider."""

    __slots__ = ("failed_s", "first_chunk_s", "input_tokens", "output_tokens", "succeeded_s")

    def __init__(self) -> None:
        self.succeeded_s = Distribution(SECONDS)
        self.failed_s: dict[FaultKind, Distribution] = {}
        self.first_chunk_s = Distribution(SECONDS)
        self.input_tokens = Distribution(TOKENS)
        self.output_tokens = Distribution(TOKENS)


class Operations:
    """Counts the attempts of each call that has ended."""

    def __init__(self, plan: Plan) -> None:
        self._cells: dict[tuple[str, str], _Cell] = {}
        self.take_plan(plan)

    def take_plan(self, plan: Plan) -> None:
        """Learn the names that may become attributes. Cells of names that are gone stay."""
        targets = [target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)]
        self._by_ref = {target.ref: self._cell(_provider(target), target.model) for target in targets}
        self._providers = {target.upstream: _provider(target) for target in targets}

    def call_ended(self, record: CallRecord) -> None:
        """Count a call's attempts, and the tokens of the last one, which is the one that answered."""
        attempts = record.attempts
        if not attempts:
            return
        if len(attempts) > 1:
            for attempt in attempts[:-1]:
                self._attempt_ended(attempt)
        attempt = attempts[-1]
        cell = self._attempt_ended(attempt)
        usage = record.usage
        if usage is not None:
            # Distribution.add, written out here and below: calling it costs half as much again.
            tokens, count = cell.input_tokens, usage.prompt_tokens
            tokens.counts[bisect_left(TOKENS, count)] += 1
            tokens.sum += count
            tokens, count = cell.output_tokens, usage.completion_tokens
            tokens.counts[bisect_left(TOKENS, count)] += 1
            tokens.sum += count
        first_ms = record.first_chunk_ms
        if first_ms is not None:
            if attempt.started_ms > first_ms:
                cell, attempt = self._began(attempts, first_ms)
                # `started_ms` is rounded, so that it may be half a millisecond late.
                first_ms = max(first_ms, attempt.started_ms)
            first_s = cell.first_chunk_s
            value_s = (first_ms - attempt.started_ms) / 1000
            first_s.counts[bisect_left(SECONDS, value_s)] += 1
            first_s.sum += value_s

    def figures(self) -> Iterator[Figures]:
        """Every metric of GEN_AI with its present values; what never happened is left out."""
        cells = [(("chat", *names), cell) for names, cell in self._cells.items()]
        lasted = [
            ((*labels, error), values)
            for labels, cell in cells
            for error, values in (("", cell.succeeded_s), *cell.failed_s.items())
        ]
        used = [
            ((*labels, kind), values)
            for labels, cell in cells
            for kind, values in (("input", cell.input_tokens), ("output", cell.output_tokens))
        ]
        yield DURATION, [(labels, values) for labels, values in lasted if values.count]
        yield TO_FIRST_CHUNK, [(labels, cell.first_chunk_s) for labels, cell in cells if cell.first_chunk_s.count]
        yield TOKEN_USAGE, [(labels, values) for labels, values in used if values.count]

    def _attempt_ended(self, attempt: Attempt) -> _Cell:
        cell = self._by_ref.get(attempt.ref) or self._unnamed(attempt.ref)
        fault = attempt.fault
        if fault is None:
            lasted_s = cell.succeeded_s
        else:
            lasted_s = cell.failed_s.get(fault) or cell.failed_s.setdefault(fault, Distribution(SECONDS))
        value_s = attempt.duration_ms / 1000
        lasted_s.counts[bisect_left(SECONDS, value_s)] += 1
        lasted_s.sum += value_s
        return cell

    def _began(self, attempts: list[Attempt], first_ms: float) -> tuple[_Cell, Attempt]:
        """The attempt that was under way when content came: earlier ones had none, later ones only went on."""
        begun = [attempt for attempt in attempts if attempt.started_ms <= first_ms] or attempts[:1]
        return self._by_ref.get(begun[-1].ref) or self._unnamed(begun[-1].ref), begun[-1]

    def _unnamed(self, ref: str) -> _Cell:
        """For a model that only its caller has named."""
        return self._cell(self._providers.get(split_ref(ref)[0], OTHER), OTHER)

    def _cell(self, provider: str, model: str) -> _Cell:
        return self._cells.get((provider, model)) or self._cells.setdefault((provider, model), _Cell())


def _provider(target: Target) -> str:
    return _PROVIDERS.get(target.kind, target.upstream)
