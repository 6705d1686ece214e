"""Whether all who tell of the same calls tell the same: the callers, the journal, the metrics. Pure comparisons.

The callers' account comes from outside the gateway, so an agreement is evidence. The invariant: a check that compared
nothing does not pass.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from gateway.decide.assign import bucket_of, is_treated
from gateway.domain.call import CallRecord
from gateway.domain.money import NUSD_PER_USD, format_usd
from gateway.lab.callers import Answer

CALL = ("agent", "model", "variant")
# The samples compared, with the labels that tell them apart; samples alike in these are added up.
COMPARED: Mapping[str, tuple[str, ...]] = {
    "model_requests_total": CALL,
    "model_errors_total": CALL,
    "model_fallbacks_total": CALL,
    "model_cost_usd_total": CALL,
    "model_tokens_total": (*CALL, "direction"),
    "model_latency_ms_count": CALL,
    "gateway_upstream_faults_total": ("kind",),
}
Figures = Counter[tuple[str, ...]]


class Check(NamedTuple):
    """One thing that must hold, and the figures it was seen in."""

    holds: bool
    what: str


def check_all(
    answers: Sequence[Answer], records: Sequence[CallRecord], metrics: str, journal: bytes, salts: Mapping[str, str]
) -> list[Check]:
    """Every check of one run. `metrics` is Prometheus' text, `journal` the file's bytes."""
    return [
        check_answers(answers),
        check_ids(answers, records),
        check_told(answers, records),
        check_tokens(answers, records),
        check_costs(answers, records),
        check_arms(answers, records, salts),
        check_metrics(records, metrics),
        check_silence(answers, journal),
    ]


def check_answers(answers: Sequence[Answer]) -> Check:
    """Every question was answered, to its end."""
    whole = sum(not answer.error and bool(answer.text and answer.finish_reason) for answer in answers)
    errors = Counter(answer.error for answer in answers if answer.error)
    said = f"; errors: {', '.join(f'{count} {code}' for code, count in errors.items())}" if errors else ""
    streams = sum(answer.conversation.stream for answer in answers)
    what = f"{whole} of {len(answers)} questions got a whole answer, {streams} of them were streamed{said}"
    return Check(0 < whole == len(answers), what)


def check_ids(answers: Sequence[Answer], records: Sequence[CallRecord]) -> Check:
    """The journal holds the calls whose ids the callers were given: each once, and no other."""
    seen = Counter(answer.request_id for answer in answers)
    kept = Counter(record.id for record in records)
    what = f"{len(kept & seen)} request ids are with the callers and in the journal"
    if seen != kept:
        what += f"; {(seen - kept).total()} only with the callers, {(kept - seen).total()} only in the journal"
    return Check(0 < len(seen) == seen.total() and seen == kept, what)


def check_told(answers: Sequence[Answer], records: Sequence[CallRecord]) -> Check:
    """Agent, variant, model and end of each call are the same on both sides."""
    by_id = {record.id: record for record in records}
    alike = 0
    for answer in answers:
        record = by_id.get(answer.request_id)
        alike += record is not None and (
            (answer.agent, answer.variant, answer.model, answer.finish_reason, answer.conversation.stream)
            == (record.agent, record.variant or "", record.model_sent, record.finish_reason, record.stream)
        )
    what = f"{alike} of {len(answers)} were told the agent, variant, model and finish_reason that were recorded"
    return Check(0 < alike == len(answers), what)


def check_tokens(answers: Sequence[Answer], records: Sequence[CallRecord]) -> Check:
    """Where a caller was told a usage, the journal has that one; and it has one for every call."""
    told = [answer for answer in answers if answer.is_usage_known]
    ids = {answer.request_id for answer in told}
    kept = [record.usage for record in records if record.id in ids and record.usage is not None]
    seen_sum = sum(answer.prompt_tokens for answer in told), sum(answer.completion_tokens for answer in told)
    kept_sum = sum(usage.prompt_tokens for usage in kept), sum(usage.completion_tokens for usage in kept)
    without = sum(record.usage is None for record in records)
    what = f"{seen_sum[0]} tokens in and {seen_sum[1]} out in the {len(told)} usages that callers saw"
    what += ", the same in the journal" if seen_sum == kept_sum else f"; {kept_sum[0]} and {kept_sum[1]} in the journal"
    return Check(bool(told) and seen_sum == kept_sum and not without, what + (f"; {without} without" * bool(without)))


def check_costs(answers: Sequence[Answer], records: Sequence[CallRecord]) -> Check:
    """What plain callers were told it cost is what was booked, to the nano-dollar; all costs are exact."""
    costs = {record.id: format_usd(record.cost_nusd) for record in records}
    told = [answer for answer in answers if answer.cost_usd is not None]
    alike = sum(costs.get(answer.request_id) == answer.cost_usd for answer in told)
    exact = sum(record.cost_basis == "exact" for record in records)
    what = f"{alike} of {len(told)} costs told are those booked, {exact} of {len(records)} are exact"
    return Check(0 < alike == len(told) and exact == len(records), what)


def check_arms(answers: Sequence[Answer], records: Sequence[CallRecord], salts: Mapping[str, str]) -> Check:
    """Whoever came to an agent is in one arm there, the one that SHA-256 gives, whichever call one looks at."""
    by_id = {record.id: record for record in records}
    arms: dict[tuple[str, str], set[str]] = {}
    wrong = 0
    for answer in answers:
        record = by_id.get(answer.request_id)
        if record is None or record.agent not in salts:
            continue
        user = answer.conversation.user
        arms.setdefault((user, record.agent), set()).add(record.variant or "")
        bucket = bucket_of(salts[record.agent], user)
        wrong += record.bucket != bucket
        if record.share_bps is not None:
            wrong += (record.variant == "finetuned") != is_treated(bucket, record.share_bps)
    split = sum(len(variants) > 1 for variants in arms.values())
    what = f"{len(arms) - split} of {len(arms)} pairs of user and agent stayed in one arm"
    return Check(bool(arms) and not split and not wrong, what + (f"; {wrong} records contradict SHA-256" * bool(wrong)))


def check_metrics(records: Sequence[CallRecord], metrics: str) -> Check:
    """/metrics says what the journal adds up to."""
    kept, shown = figures_of(records), figures_in(metrics)
    differing = sorted(key for key in kept | shown if kept[key] != shown[key])
    what = f"{len(kept)} figures of /metrics are the sums of the journal"
    if differing:
        first = differing[0]
        what = f"{len(differing)} figures differ; {' '.join(first)}: {shown[first]} shown, {kept[first]} in the journal"
    return Check(bool(kept) and not differing, what)


def check_silence(answers: Iterable[Answer], journal: bytes) -> Check:
    """The journal holds neither what was asked, nor what was answered, nor by whom."""
    texts: set[str] = set()
    for answer in answers:
        # An answer's beginning may be the same for all.
        texts.update((answer.conversation.question.turns[answer.turn - 1][:40], answer.text[-40:]))
    secrets = {answer.conversation.user for answer in answers} | {text for text in texts if text}
    # As they would look inside a JSON string.
    found = sum(msgspec.json.encode(secret)[1:-1] in journal for secret in secrets)
    what = f"{found} of {len(secrets)} users, questions and answers can be read in the journal"
    return Check(bool(secrets) and bool(journal) and not found, what)


def figures_of(records: Iterable[CallRecord]) -> Figures:
    """What the metrics should show after these calls; dollars as nano-dollars, zeros left out."""
    found: Figures = Counter()
    for record in records:
        labels = (record.agent, record.model_sent, record.variant or "")
        found["model_requests_total", *labels] += 1
        found["model_latency_ms_count", *labels] += 1
        found["model_errors_total", *labels] += bool(record.error)
        found["model_fallbacks_total", *labels] += record.is_fallback
        found["model_cost_usd_total", *labels] += record.cost_nusd
        if record.usage is not None:
            found["model_tokens_total", *labels, "input"] += record.usage.prompt_tokens
            found["model_tokens_total", *labels, "output"] += record.usage.completion_tokens
        for attempt in record.attempts:
            if attempt.fault is not None:
                found["gateway_upstream_faults_total", attempt.fault.value] += 1
    return +found


def figures_in(metrics: str) -> Figures:
    """The same figures out of Prometheus' text."""
    found: Figures = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in COMPARED:
                scale = NUSD_PER_USD if sample.name == "model_cost_usd_total" else 1
                key = (sample.name, *(sample.labels[label] for label in COMPARED[sample.name]))
                found[key] += round(sample.value * scale)
    return +found
