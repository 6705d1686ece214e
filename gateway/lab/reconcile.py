"""The ledger against the provider's own figures, by day and model, and which doubts that settles. Pure.

Tokens decide, dollars only where tokens agree: a provider's dollars are rounded, and ours rest on a price table. What
is used past the gateway under the same account shows as more on the provider's side. The invariant: nothing is
proposed to be freed that the provider may have counted.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Literal, NamedTuple

from gateway.domain.ledger import Amounts, LedgerRow
from gateway.domain.settings import split_ref
from gateway.lab.provider_usage import UsageDay, merged

Verdict = Literal["equal", "explained by doubt", "price", "unexplained"]

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
# Providers round to cents, and ours is rounded up call by call: less than this, or than a thousandth, is no difference.
_CENT_NUSD = 10_000_000
# What stands behind a model's name for one version of it: gpt-4o-2024-08-06, mistral-small-2506.
_VERSION = r"-(?:\d{4}-\d{2}-\d{2}|\d{4})"


class BookedDay(NamedTuple):
    """What the ledger has for a model on a day in UTC.

    `sure` cost what it says; `unsure` is the most that everything else can have cost: what is in doubt, and what was
    posted by estimate or bound, since no usage came. `model` is as the provider knows it, without our upstream's name.
    """

    day: str
    model: str
    upstream: str = ""
    sure: Amounts = Amounts()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unsure: Amounts = Amounts()
    in_doubt: tuple[LedgerRow, ...] = ()
    has_estimates: bool = False


class Difference(NamedTuple):
    """One day and model, or several days: what we booked, what they counted, and what is to be made of it.

    `booked_as`: our names for the model, where they differ. `may_be_freed` are ids of rows in doubt that the provider
    cannot have counted; `may_be_posted` says of a row what it did cost.
    """

    day: str
    model: str
    ours: BookedDay
    theirs: UsageDay
    verdict: Verdict
    booked_as: tuple[str, ...] = ()
    may_be_freed: tuple[str, ...] = ()
    may_be_posted: tuple[tuple[str, Amounts], ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens more they counted than we are sure of; below zero: fewer."""
        return self.theirs.prompt_tokens + self.theirs.completion_tokens - self.ours.sure.tokens

    @property
    def nusd(self) -> int | None:
        """How much more they charge than we are sure of; None where they name no dollars."""
        return None if self.theirs.nusd is None else self.theirs.nusd - self.ours.sure.nusd


def booked_days(rows: Iterable[LedgerRow], *, upstream: str = "") -> list[BookedDay]:
    """The days of the ledger's rows, by day, upstream and model; with `upstream`, of that one alone.

    Entries by hand that name no upstream are no calls to a provider and are left out. `rows` are of every environment
    whose calls go to the same account there.
    """
    days: dict[tuple[str, str, str], BookedDay] = {}
    for row in rows:
        served_by, model = split_ref(row.on.model)
        if served_by and upstream in ("", served_by) and row.source != "lease" and row.state in ("posted", "in_doubt"):
            key = datetime.fromtimestamp(row.at_ms // 1000, UTC).date().isoformat(), model, served_by
            days[key] = _with_row(days.get(key, BookedDay(key[0], model, served_by)), row)
    return [days[key] for key in sorted(days)]


def reconcile(
    ours: Sequence[BookedDay],
    theirs: Sequence[UsageDay],
    *,
    today: str,
    upstream: str = "",
    names: Mapping[str, str] | None = None,
) -> list[Difference]:
    """Compare the days that the provider's figures cover, by day and model.

    `names` says which of their models one of ours is; without, an alias is matched with the one version that they
    counted. `upstream` says whose figures these are; without, ours are those of upstreams of which they counted a
    model, since one provider's silence is no news of another, and nothing is proposed if that leaves several. Nor is it
    about `today` (2026-11-21) and later, which the provider may not have counted yet.
    """
    covered = {day.day for day in theirs}
    if not covered:
        return []
    counted = {(day.day, day.model): day for day in theirs if day.model}
    known = _names(theirs)
    named = [(day, (names or {}).get(day.model) or _their_name(day.model, known)) for day in ours]
    upstreams = {upstream} if upstream else {day.upstream for day, model in named if model in known}
    booked: dict[tuple[str, str], BookedDay] = {}
    booked_as: dict[tuple[str, str], set[str]] = {}
    for day, model in named:
        if day.upstream in upstreams and min(covered) <= day.day <= max(covered):
            key = day.day, model
            booked[key] = _added(booked[key], day) if key in booked else day._replace(model=model)
            booked_as.setdefault(key, set()).update({day.model} - {model})
    differences = []
    for key in sorted({*booked, *counted}):
        found = _compare(booked.get(key, BookedDay(*key)), counted.get(key, UsageDay(*key, 0, 0, 0, 0)))
        if len(upstreams) > 1:
            found = found._replace(may_be_freed=(), may_be_posted=())
        differences.append(found._replace(booked_as=tuple(sorted(booked_as.get(key, ())))))
    return _prudent(differences, today, max(covered))


def over_all_days(differences: Sequence[Difference]) -> list[Difference]:
    """The same by model alone: a call at midnight is one day's for us and may be the next day's for them.

    `day` is the first and the last of them, 2026-11-01/2026-11-21. Proposes nothing; that is for single days.
    """
    by_model: dict[str, list[Difference]] = {}
    for difference in differences:
        by_model.setdefault(difference.model, []).append(difference)
    found = []
    for _, group in sorted(by_model.items()):
        day = f"{group[0].day}/{group[-1].day}"
        ours, theirs = group[0].ours, group[0].theirs
        for difference in group[1:]:
            ours, theirs = _added(ours, difference.ours), merged(theirs, difference.theirs)
        whole = _compare(ours._replace(day=day), theirs._replace(day=day))
        booked_as = sorted({name for difference in group for name in difference.booked_as})
        found.append(whole._replace(booked_as=tuple(booked_as), may_be_freed=(), may_be_posted=()))
    return found


def _compare(ours: BookedDay, theirs: UsageDay) -> Difference:
    gap = Amounts(
        0 if theirs.nusd is None else theirs.nusd - ours.sure.nusd,
        0 if theirs.requests is None else theirs.requests - ours.sure.requests,
        theirs.prompt_tokens + theirs.completion_tokens - ours.sure.tokens,
    )
    slack_nusd = max(_CENT_NUSD, ours.sure.nusd // 1000)
    is_same = gap.tokens == 0
    # More than we are sure of, and no more than all we have booked.
    is_within = 0 <= gap.tokens <= ours.unsure.tokens and -slack_nusd <= gap.nusd <= ours.unsure.nusd + slack_nusd
    verdict: Verdict = "unexplained"
    if is_same and abs(gap.nusd) <= slack_nusd:
        verdict = "explained by doubt" if any(ours.unsure) else "equal"
    elif is_within and any(ours.unsure):
        verdict = "explained by doubt"
    elif is_same:
        verdict = "price"
    found = Difference(ours.day, ours.model, ours, theirs, verdict)
    # An estimate may be short, and then what is left of their count says nothing about the doubts.
    if verdict != "explained by doubt" or ours.has_estimates or not ours.in_doubt:
        return found
    if is_same and gap.requests <= 0:
        return found._replace(may_be_freed=tuple(row.id for row in ours.in_doubt))
    if len(ours.in_doubt) == 1 and theirs.nusd is not None and not is_same:
        (row,) = ours.in_doubt
        cost = Amounts(max(0, gap.nusd), row.amounts.requests, gap.tokens)
        return found._replace(may_be_posted=((row.id, cost),))
    return found


def _prudent(differences: Sequence[Difference], today: str, last: str) -> list[Difference]:
    """The same without proposals that another line puts in question.

    1. Where they counted more than we can explain, under whatever name, that may be one of the day's doubts.
    2. A call in the last hour of a day may be counted on the next: it is free once that day is told, and even.
    """
    by_key = {(found.day, found.model): found for found in differences}
    open_days = {found.day for found in differences if found.verdict == "unexplained" and found.tokens > 0}

    def is_even(day: str, model: str) -> bool:
        return (
            day <= last
            and day < today
            and day not in open_days
            and ((day, model) not in by_key or by_key[day, model].tokens == 0)
        )

    prudent = []
    for found in differences:
        if found.day >= today or found.day in open_days:
            found = found._replace(may_be_freed=(), may_be_posted=())
        elif not is_even((date.fromisoformat(found.day) + timedelta(days=1)).isoformat(), found.model):
            late = {row.id for row in found.ours.in_doubt if row.at_ms % _DAY_MS >= _DAY_MS - _HOUR_MS}
            found = found._replace(may_be_freed=tuple(id for id in found.may_be_freed if id not in late))
        prudent.append(found)
    return prudent


def _with_row(day: BookedDay, row: LedgerRow) -> BookedDay:
    if row.state == "in_doubt":
        return day._replace(unsure=_sum(day.unsure, row.amounts), in_doubt=(*day.in_doubt, row))
    if row.basis in ("estimate", "bound"):
        return day._replace(unsure=_sum(day.unsure, row.amounts), has_estimates=True)
    return day._replace(
        sure=_sum(day.sure, row.amounts),
        prompt_tokens=day.prompt_tokens + row.prompt_tokens,
        completion_tokens=day.completion_tokens + row.completion_tokens,
    )


def _added(one: BookedDay, other: BookedDay) -> BookedDay:
    return BookedDay(
        one.day,
        one.model,
        one.upstream,
        _sum(one.sure, other.sure),
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        _sum(one.unsure, other.unsure),
        one.in_doubt + other.in_doubt,
        one.has_estimates or other.has_estimates,
    )


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return Amounts(*(left + right for left, right in zip(one, other, strict=True)))


def _names(theirs: Iterable[UsageDay]) -> dict[str, set[str]]:
    """Their models by each name they go by."""
    known: dict[str, set[str]] = {}
    for day in theirs:
        if day.model:
            for name in (day.model, *day.aliases):
                known.setdefault(name, set()).add(day.model)
    return known


def _their_name(model: str, known: Mapping[str, Collection[str]]) -> str:
    """The name under which they count a model of ours, where only one can be meant; else ours."""
    if model in known:
        return next(iter(known[model])) if len(known[model]) == 1 else model
    version = re.compile(re.escape(model.removesuffix("-latest")) + _VERSION)
    found = {name for name in known if version.fullmatch(name)}
    return found.pop() if len(found) == 1 else model
