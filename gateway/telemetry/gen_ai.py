"""The metrics of OpenTelemetry's conventions for generative AI, counted where somebody exports them.

An operation is one attempt at one model, not a call: a call that fell back is two. The names, units and edges are those
of `semantic-conventions-genai` at commit 004902b, which goes with semantic-conventions 1.42; all are of status
"Development". Like everything that is counted, it is bounded: provider, model and error are names that the
configuration or the table of faults has, or `other`; and of what a provider says that it answered with, a few names per
model are kept, the first that come.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from gateway.decide.plan import Plan
from gateway.decide.targets import Target
from gateway.domain.call import Attempt, CallRecord
from gateway.domain.errors import FaultKind
from gateway.domain.settings import split_ref
from gateway.telemetry.distribution import Distribution, Exemplar, Figures
from gateway.telemetry.metrics import OTHER, Declared, Kind

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(4**power for power in range(14))
# A model's alias moves from one dated name to the next now and then; whoever tells of more is `other`.
MAX_ANSWERED = 8
# What a name may be, so that nothing else of a provider's answer can become an attribute.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_OPERATION = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "gen_ai.response.model")
_NAME = "gen_ai.client.operation"

DURATION = Declared(
    f"{_NAME}.duration", Kind.HISTOGRAM, "One attempt at a model, to its end.", (*_OPERATION, "error.type"), "s"
)
TO_FIRST_CHUNK = Declared(
    f"{_NAME}.time_to_first_chunk", Kind.HISTOGRAM, "Streams: from the attempt's start to content.", _OPERATION, "s"
)
PER_CHUNK = Declared(
    f"{_NAME}.time_per_output_chunk", Kind.HISTOGRAM, "Streams: from each chunk to the next.", _OPERATION, "s"
)
TOKEN_USAGE = Declared(
    "gen_ai.client.token.usage",
    Kind.HISTOGRAM,
    "Tokens of one answer, as the provider bills them.",
    (*_OPERATION, "gen_ai.token.type"),
    "{token}",
)
GEN_AI = (DURATION, TO_FIRST_CHUNK, PER_CHUNK, TOKEN_USAGE)

# The conventions' names for those that have one; a compatible server goes by its name in the configuration.
_PROVIDERS = {"openai": "openai", "mistral": "mistral_ai", "simulator": "simulator"}


class _Cell:
    """What is counted of one model's answers under one name that its provider gave."""

    __slots__ = ("chunk_s", "first_chunk_s", "input_tokens", "output_tokens", "succeeded_s")

    def __init__(self) -> None:
        self.succeeded_s = Distribution(SECONDS)
        self.first_chunk_s = Distribution(SECONDS)
        self.chunk_s = Distribution(SECONDS)
        self.input_tokens = Distribution(TOKENS)
        self.output_tokens = Distribution(TOKENS)


class _Model:
    """What is counted for one model of one provider."""

    __slots__ = ("cells", "failed_s", "room")

    def __init__(self, room: int) -> None:
        self.failed_s: dict[FaultKind, Distribution] = {}
        # By the name that the provider gave, empty where it gave none; and how many more there may be.
        self.cells = {"": _Cell()}
        self.room = room

    def answered(self, name: str) -> _Cell:
        """The cell of a name that has none yet."""
        if self.room and _MODEL_NAME.fullmatch(name):
            self.room -= 1
        else:
            name = OTHER
        return self.cells.get(name) or self.cells.setdefault(name, _Cell())


class Operations:
    """Counts the attempts of each call that has ended, and the chunks of streams as they come."""

    def __init__(self, plan: Plan) -> None:
        self._models: dict[tuple[str, str], _Model] = {}
        self.take_plan(plan)

    def take_plan(self, plan: Plan) -> None:
        """Learn the names that may become attributes. What was counted under names that are gone stays."""
        targets = [target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)]
        self._by_ref = {target.ref: self._model(_provider(target), target.model) for target in targets}
        self._providers = providers_of(plan)

    def call_ended(self, record: CallRecord) -> None:
        """Count a call's attempts, and the tokens of the last one, which is the one that answered."""
        attempts = record.attempts
        if not attempts:
            return
        if len(attempts) > 1:
            for attempt in attempts[:-1]:
                self._attempt_ended(attempt, record)
        attempt = attempts[-1]
        cell = self._attempt_ended(attempt, record, record.model_answered)
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

    def chunks_came(self, ref: str, answered: str, count: int, waited_s: float) -> None:
        """Count chunks of a stream that came together, `waited_s` after the one before them: none is its first."""
        model = self._by_ref.get(ref) or self._unnamed(ref)
        chunk_s = (model.cells.get(answered) or model.answered(answered)).chunk_s
        chunk_s.counts[bisect_left(SECONDS, waited_s)] += 1
        chunk_s.sum += waited_s
        # The others had come with it.
        chunk_s.counts[0] += count - 1

    def figures(self) -> Iterator[Figures]:
        """Every metric of GEN_AI with its present values; what never happened is left out."""
        models = [(("chat", *names), model) for names, model in self._models.items()]
        cells = [((*names, answered), cell) for names, model in models for answered, cell in model.cells.items()]
        lasted = [((*labels, ""), cell.succeeded_s) for labels, cell in cells]
        lasted += [((*names, "", kind), lost_s) for names, model in models for kind, lost_s in model.failed_s.items()]
        used = [
            ((*labels, kind), values)
            for labels, cell in cells
            for kind, values in (("input", cell.input_tokens), ("output", cell.output_tokens))
        ]
        yield DURATION, [(labels, values) for labels, values in lasted if values.count]
        yield TO_FIRST_CHUNK, [(labels, cell.first_chunk_s) for labels, cell in cells if cell.first_chunk_s.count]
        yield PER_CHUNK, [(labels, cell.chunk_s) for labels, cell in cells if cell.chunk_s.count]
        yield TOKEN_USAGE, [(labels, values) for labels, values in used if values.count]

    def _attempt_ended(self, attempt: Attempt, record: CallRecord, answered: str = "") -> _Cell:
        """Count one, and find the cell of its answer."""
        model = self._by_ref.get(attempt.ref) or self._unnamed(attempt.ref)
        fault = attempt.fault
        if fault is None:
            cell = model.cells.get(answered) or model.answered(answered)
            lasted_s = cell.succeeded_s
        else:
            cell = model.cells[""]
            lasted_s = model.failed_s.get(fault) or model.failed_s.setdefault(fault, Distribution(SECONDS))
        value_s = attempt.duration_ms / 1000
        lasted_s.counts[bisect_left(SECONDS, value_s)] += 1
        lasted_s.sum += value_s
        if attempt.span_id:
            at_ms = record.at_ms + attempt.started_ms + attempt.duration_ms
            lasted_s.exemplify(Exemplar(record.trace_id, attempt.span_id, value_s, at_ms))
        return cell

    def _began(self, attempts: list[Attempt], first_ms: float) -> tuple[_Cell, Attempt]:
        """The attempt that was under way when content came: earlier ones had none, later ones only went on."""
        begun = [attempt for attempt in attempts if attempt.started_ms <= first_ms] or attempts[:1]
        model = self._by_ref.get(begun[-1].ref) or self._unnamed(begun[-1].ref)
        return model.cells[""], begun[-1]

    def _unnamed(self, ref: str) -> _Model:
        """For a model that only its caller has named."""
        return self._model(self._providers.get(split_ref(ref)[0], OTHER), OTHER)

    def _model(self, provider: str, model: str) -> _Model:
        found = self._models.get((provider, model))
        # A compatible server may answer with the very name that its caller made up.
        return found or self._models.setdefault((provider, model), _Model(0 if model == OTHER else MAX_ANSWERED))


def providers_of(plan: Plan) -> Mapping[str, str]:
    """The conventions' names of the providers that the configuration names: by upstream, and by model's reference."""
    targets = [target for agent in plan.agents.values() for target in (*agent.finetuned, *agent.baseline)]
    by_upstream = {target.upstream: _provider(target) for target in targets}
    # The policy may have one upstream serve what the reference says is another's.
    return by_upstream | {target.ref: _provider(target) for target in targets}


def _provider(target: Target) -> str:
    return _PROVIDERS.get(target.kind, target.upstream)
