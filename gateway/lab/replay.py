"""A journal's calls through another plan, and what came of it in sums: the work behind `gateway replay`.

Reads the journal and nothing else, and writes nothing. The invariant: the sums by agent add up to those of the whole,
before as after.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import nlargest
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from gateway.decide.recorded import Ending
from gateway.decide.replay import Replayed, Replayer
from gateway.domain.call import CallRecord
from gateway.domain.money import format_usd
from gateway.domain.spans import format_time
from gateway.store.journal_reader import Torn, read_calls

_TELL_EVERY = 1_000
_TOLD_ALWAYS = frozenset({"bucket_unknown", "share_kept"})
Tell = Callable[[int], None]


class Journal(NamedTuple):
    """The calls of one environment, oldest first; of the others only how many there were, and how many torn lines."""

    calls: list[CallRecord]
    elsewhere: int
    torn: int


class Sums(msgspec.Struct, kw_only=True):
    """Calls by their end, and what their attempts took, what is in doubt included."""

    calls: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    left: int = 0
    cost_nusd: int = 0
    tokens: int = 0

    def add(self, ending: Ending) -> None:
        """Count a call that ends so."""
        self.calls += 1
        self.cost_nusd += ending.cost_nusd
        self.tokens += ending.tokens
        match ending.end:
            case "answered":
                self.answered += 1
            case "refused":
                self.refused += 1
            case "failed":
                self.failed += 1
            case "left":
                self.left += 1


class Moves(msgspec.Struct, kw_only=True):
    """An agent's calls, or all of them, and how many moved from what to what, as "baseline -> finetuned"."""

    before: Sums = msgspec.field(default_factory=Sums)
    after: Sums = msgspec.field(default_factory=Sums)
    changed: int = 0
    shares: dict[str, int] = msgspec.field(default_factory=dict)
    variants: dict[str, int] = msgspec.field(default_factory=dict)
    models: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, one: Replayed) -> None:
        """Count a call."""
        before, after = one.before, one.after
        self.before.add(before)
        self.after.add(after)
        if one.record.share_bps != one.share_bps:
            _move(self.shares, _percent(one.record.share_bps), _percent(one.share_bps))
        if before == after:
            return
        self.changed += 1
        # A refusal may have no arm and no model, and is counted as such.
        _move(self.variants, before.variant, after.variant)
        _move(self.models, before.model, after.model)


class Refusal(msgspec.Struct, kw_only=True):
    """A cap or an error code, and how many calls it refuses; `first_ms` is the first of them in the replay."""

    why: str
    before: int = 0
    after: int = 0
    first_ms: int | None = None


class Change(msgspec.Struct, kw_only=True):
    """A call that would end otherwise."""

    id: str
    at_ms: int
    agent: str
    difference_nusd: int
    before: dict[str, Any]
    after: dict[str, Any]


class About(msgspec.Struct, kw_only=True):
    """Which calls were replayed, and under what.

    `counted` calls were before them, or shadows, and were only counted; `torn` lines could not be read.
    """

    env: str
    since_ms: int
    until_ms: int
    policy: str
    was: str
    agent: str
    counted: int
    elsewhere: int
    torn: int


class Findings(msgspec.Struct, kw_only=True):
    """What came of a replay. `largest` are the changes of most cost, in either direction.

    `assumed` counts the changed calls that rest on each assumption, and all that could not be decided.
    """

    whole: Moves
    agents: dict[str, Moves]
    refusals: list[Refusal]
    largest: list[Change]
    assumed: dict[str, int]


def read_journal(root: Path, env: str, until_ms: int, tell: Tell) -> Journal:
    """Every call of `env` that began before `until_ms`; `tell` hears how many calls were read so far."""
    calls: list[CallRecord] = []
    elsewhere = torn = number = 0
    for number, line in enumerate(read_calls(root), start=1):
        if number % _TELL_EVERY == 0:
            tell(number)
        if isinstance(line, Torn):
            torn += 1
        elif line.env != env:
            elsewhere += 1
        elif line.at_ms < until_ms:
            calls.append(line)
    tell(number)
    # A record is written when its call ends, and each process has a journal of its own.
    calls.sort(key=attrgetter("at_ms"))
    return Journal(calls, elsewhere, torn)


def replay_calls(replayer: Replayer, calls: Iterable[CallRecord], since_ms: int, tell: Tell) -> Iterator[Replayed]:
    """The calls from `since_ms` on as they would be. Those before it, and shadows, only spend what they did spend."""
    for number, record in enumerate(calls, start=1):
        if number % _TELL_EVERY == 0:
            tell(number)
        if record.at_ms < since_ms or record.shadow_of:
            replayer.count(record)
        else:
            yield replayer.replay(record)


def findings_of(replayed: Iterable[Replayed], *, agent: str = "", limit: int = 10) -> Findings:
    """The sums; `agent` narrows them to one, by its recorded name. `limit`: so many single changes."""
    whole = Moves()
    agents: dict[str, Moves] = {}
    refusals: dict[str, Refusal] = {}
    assumed: Counter[str] = Counter()
    changes: list[Replayed] = []
    for one in replayed:
        if agent and one.record.agent != agent:
            continue
        whole.add(one)
        agents.setdefault(one.record.agent, Moves()).add(one)
        _count_refusals(refusals, one)
        is_changed = one.before != one.after
        assumed.update(one.assumed if is_changed else one.assumed & _TOLD_ALWAYS)
        if is_changed:
            changes.append(one)
    return Findings(
        whole=whole,
        agents=dict(sorted(agents.items())),
        refusals=sorted(refusals.values(), key=lambda refusal: (-refusal.after, -refusal.before, refusal.why)),
        largest=[_change(one) for one in nlargest(limit, changes, key=lambda one: abs(_difference_nusd(one)))],
        assumed=dict(sorted(assumed.items())),
    )


def plain(value: Any) -> Any:
    """The same for machines: dollars as text, times as ISO 8601."""
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.to_builtins(value))
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key.endswith("_nusd"):
            found[f"{key.removesuffix('_nusd')}_usd"] = format_usd(item)
        elif key.endswith("_ms"):
            found[key.removesuffix("_ms")] = None if item is None else format_time(item)
        else:
            found[key] = plain(item)
    return found


def _count_refusals(refusals: dict[str, Refusal], one: Replayed) -> None:
    before, after = one.before, one.after
    if before.end == "refused":
        refusals.setdefault(before.why, Refusal(why=before.why)).before += 1
    if after.end == "refused":
        refusal = refusals.setdefault(after.why, Refusal(why=after.why))
        refusal.after += 1
        if refusal.first_ms is None:
            refusal.first_ms = one.record.at_ms


def _change(one: Replayed) -> Change:
    record, before, after = one.record, one.before, one.after
    return Change(
        id=record.id, at_ms=record.at_ms, agent=record.agent, difference_nusd=_difference_nusd(one),
        before=before._asdict(), after=after._asdict(),
    )  # fmt: skip


def _difference_nusd(one: Replayed) -> int:
    return one.after.cost_nusd - one.before.cost_nusd


def _move(moves: dict[str, int], old: str | None, new: str | None) -> None:
    if old and new and old != new:
        moves[f"{old} -> {new}"] = moves.get(f"{old} -> {new}", 0) + 1


def _percent(share_bps: int | None) -> str:
    return "" if share_bps is None else f"{share_bps / 100:g} %"
