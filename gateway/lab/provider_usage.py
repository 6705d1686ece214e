"""What a provider says was used, by day and model: read from its export, or asked of it. No comparison is made here.

Three shapes, told apart by what is in them; days are days in UTC.

1. Plain CSV: day, model, prompt_tokens, completion_tokens, and usd and requests if they are known.
2. OpenAI's export of completions usage, from its usage page. Established from published exports of 2025 and 2026: a
   line per time bucket, model and whatever it was grouped by; start_time_iso (in UTC), model, input_tokens (cached ones
   among them), output_tokens, num_model_requests, figures as 59200.0; a bucket without use has empty cells. Dollars are
   in another export, which names no model and so cannot be compared.
3. The JSON of Mistral's Admin API, GET /v1/admin/usage. It is public and documented (docs.mistral.ai, "Usage metrics
   with the Admin API"; OpenAPI file read 2026-08-21), but for Enterprise plans, and wants an Admin API key from the
   Backoffice: an ordinary API key is refused. Established: the path, month and year, `completion.models`, `prices`,
   `currency`. Not documented, and known only from what clients of others read: that a model is named
   alias::billed-name, that its groups are input, output and cached, that an entry has a timestamp of one day and a
   value in tokens, that cached tokens are not among the input, and that days are UTC. Mistral documents no CSV export.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from io import BytesIO
from typing import BinaryIO, NamedTuple

import aiohttp
import msgspec

from gateway.domain.money import MAX_NUSD, NUSD_PER_USD, nusd_from_usd
from gateway.domain.reading import Problem, shown
from gateway.domain.secret import Secret
from gateway.lab.ledger_csv import CsvProblems, Line, read_lines, read_time

MISTRAL_URL = "https://api.mistral.ai"
_PLAIN = ("day", "model", "prompt_tokens", "completion_tokens", "usd", "requests")
_OPENAI = ("start_time_iso", "model", "input_tokens", "output_tokens")
# Exports write whole numbers as 59200 and as 59200.0.
_WHOLE = re.compile(r"([0-9]{1,16})(?:\.0*)?")
_MAX_ANSWER_BYTES = 32 * 2**20
_TIMEOUT = aiohttp.ClientTimeout(total=60)


class UsageDay(NamedTuple):
    """What a provider counted for a model on a day. Without a model: the day is covered, and that is all.

    `nusd` and `requests` of None: not told. `aliases`: other names under which the same model is called.
    """

    day: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nusd: int | None = None
    requests: int | None = None
    aliases: tuple[str, ...] = ()


class UsageUnavailable(Exception):
    """The provider did not say what was used. The message says why, and what to do instead."""


def read_usage(file: BinaryIO, name: str) -> list[UsageDay]:
    """The days of an export, whichever of the three shapes it has, by day and model. Raises `CsvProblems`."""
    content = file.read()
    if content.lstrip()[:1] in (b"{", b"["):
        return read_mistral_usage(content, name)
    header = content.lstrip(b"\xef\xbb\xbf\r\n").partition(b"\n")[0].decode("utf-8", "replace").lower()
    if "amount_value" in header:
        fix = "this is the export of costs, which names no model; export the usage of completions"
        raise CsvProblems([Problem(key="header", found="amount_value", fix=fix, file=f"{name}:1")])
    is_openai = "input_tokens" in header
    problems: list[Problem] = []
    known, required = (None, _OPENAI) if is_openai else (_PLAIN, _PLAIN[:4])
    read_day = _openai_day if is_openai else _plain_day
    lines = read_lines(BytesIO(content), name, known, required, problems)
    days = [read_day(line, name, problems) for line in lines]
    if problems:
        raise CsvProblems(problems)
    return _by_day_and_model(days)


def read_mistral_usage(content: bytes, name: str) -> list[UsageDay]:
    """The days of an answer of Mistral's Admin API. Dollars only where it bills in them. Raises `CsvProblems`."""
    try:
        answer = msgspec.json.decode(content, type=_MistralUsage)
        prices = answer.price_list()
        days = [
            _mistral_day(key, group, entry, prices if answer.currency == "USD" else None)
            for key, groups in answer.completion.models.items()
            for group, entries in groups.items()
            for entry in entries
        ]
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, ArithmeticError) as error:
        fix = "wants the JSON of GET /v1/admin/usage of Mistral's Admin API, or CSV"
        raise CsvProblems([Problem(key="json", found=str(error), fix=fix, file=f"{name}:1")]) from None
    covered = [UsageDay(at[:10], "") for at in (answer.start_date, answer.end_date) if at]
    return _by_day_and_model([*covered, *days])


async def fetch_mistral_usage(
    session: aiohttp.ClientSession, key: Secret, *, year: int, month: int, url: str = MISTRAL_URL
) -> list[UsageDay]:
    """What Mistral's Admin API says of a calendar month. `key` is an Admin API key. Raises `UsageUnavailable`."""
    # The guide names the first header, the OpenAPI file the second.
    headers = {"x-api-key": key.reveal(), "Authorization": f"Bearer {key.reveal()}"}
    place = f"{url}/v1/admin/usage"
    instead = "export the usage to a CSV of day,model,prompt_tokens,completion_tokens and reconcile with that file"
    query = {"year": str(year), "month": str(month)}
    try:
        async with session.get(
            place, params=query, headers=headers, timeout=_TIMEOUT, allow_redirects=False
        ) as response:
            if response.status in (401, 403, 404):
                raise UsageUnavailable(
                    f"{place} refused the key ({response.status}): it wants an Admin API key, which Enterprise plans "
                    f"have; else {instead}"
                )
            if response.status != 200:
                raise UsageUnavailable(f"{place} answered {response.status}; try later, or {instead}")
            content = await response.content.read(_MAX_ANSWER_BYTES + 1)
            while not response.content.at_eof() and len(content) <= _MAX_ANSWER_BYTES:
                content += await response.content.readany()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UsageUnavailable(f"{place} cannot be reached: {str(error) or type(error).__name__}") from error
    if len(content) > _MAX_ANSWER_BYTES:
        raise UsageUnavailable(f"{place} answered with more than {_MAX_ANSWER_BYTES} bytes")
    try:
        return read_mistral_usage(content, place)
    except CsvProblems as problems:
        raise UsageUnavailable(f"{problems}; {instead}") from problems


class _MistralEntry(msgspec.Struct):
    timestamp: str
    value: int
    billing_metric: str = ""
    billing_group: str = ""
    event_type: str | None = None
    api_zone: str = ""
    service_tier: str = ""
    value_paid: int | None = None


class _MistralModels(msgspec.Struct):
    models: dict[str, dict[str, list[_MistralEntry]]] = {}


class _MistralPrice(msgspec.Struct):
    billing_metric: str
    billing_group: str
    price: Decimal
    event_type: str | None = None
    api_zone: str = ""
    service_tier: str = ""


class _MistralUsage(msgspec.Struct):
    completion: _MistralModels
    prices: list[_MistralPrice] = []
    currency: str | None = None
    start_date: str = ""
    end_date: str = ""

    def price_list(self) -> dict[tuple[str, str], list[_MistralPrice]]:
        """Prices by metric and group. There may be several: of other zones, tiers, kinds of use."""
        found: dict[tuple[str, str], list[_MistralPrice]] = {}
        for price in self.prices:
            found.setdefault((price.billing_metric, price.billing_group), []).append(price)
        return found


def _mistral_day(
    key: str, group: str, entry: _MistralEntry, prices: Mapping[tuple[str, str], list[_MistralPrice]] | None
) -> UsageDay:
    if not 0 <= entry.value < MAX_NUSD:
        raise ValueError(f"{key} has a value of {entry.value}")
    alias, _, billed = key.rpartition("::")
    is_output = group == "output"
    return UsageDay(
        day=date.fromisoformat(entry.timestamp[:10]).isoformat(),
        model=billed,
        prompt_tokens=0 if is_output else entry.value,
        completion_tokens=entry.value if is_output else 0,
        nusd=None if prices is None else _mistral_nusd(entry, prices),
        aliases=(alias,) if alias and alias != billed else (),
    )


def _mistral_nusd(entry: _MistralEntry, prices: Mapping[tuple[str, str], list[_MistralPrice]]) -> int | None:
    """The price of one token times what is to be paid, where just one price fits."""
    fitting = {
        price.price
        for price in prices.get((entry.billing_metric, entry.billing_group), ())
        if _fits(price.event_type, entry.event_type)
        and _fits(price.api_zone, entry.api_zone)
        and _fits(price.service_tier, entry.service_tier)
    }
    if len(fitting) != 1:
        return None
    paid = entry.value if entry.value_paid is None else entry.value_paid
    return round(fitting.pop() * paid * NUSD_PER_USD)


def _fits(wanted: str | None, said: str | None) -> bool:
    return not wanted or not said or wanted == said


def _plain_day(line: Line, name: str, problems: list[Problem]) -> UsageDay:
    cells = _Cells(line, name, problems)
    return UsageDay(
        day=cells.day("day"),
        model=cells.model(),
        prompt_tokens=cells.count("prompt_tokens") or 0,
        completion_tokens=cells.count("completion_tokens") or 0,
        nusd=cells.nusd("usd"),
        requests=cells.count("requests", is_optional=True),
    )


def _openai_day(line: Line, name: str, problems: list[Problem]) -> UsageDay:
    cells = _Cells(line, name, problems)
    day = cells.day("start_time_iso")
    if not line.cells["input_tokens"].strip():
        return UsageDay(day, "")
    return UsageDay(
        day=day,
        model=cells.model(),
        prompt_tokens=cells.count("input_tokens") or 0,
        completion_tokens=cells.count("output_tokens") or 0,
        requests=cells.count("num_model_requests", is_optional=True),
    )


class _Cells:
    """The cells of one line; each that is wrong becomes a problem."""

    def __init__(self, line: Line, name: str, problems: list[Problem]) -> None:
        self._cells = line.cells
        self._file = f"{name}:{line.number}"
        self._problems = problems

    def day(self, column: str) -> str:
        text = self._cells[column].strip()
        try:
            return datetime.fromtimestamp(read_time(text) // 1000, UTC).date().isoformat()
        except (ValueError, OverflowError):
            self._wrong(column, "wants a day such as 2026-11-21")
            return ""

    def model(self) -> str:
        text = self._cells["model"].strip()
        if not text:
            self._wrong("model", "must not be empty; group the export by model")
        return text

    def count(self, column: str, *, is_optional: bool = False) -> int | None:
        text = self._cells.get(column, "").strip()
        found = _WHOLE.fullmatch(text)
        if found is not None and int(found[1]) < MAX_NUSD:
            return int(found[1])
        if text or not is_optional:
            self._wrong(column, "wants a whole number of zero or more, digits only")
        return None

    def nusd(self, column: str) -> int | None:
        text = self._cells.get(column, "").strip()
        try:
            return nusd_from_usd(text) if text else None
        except ValueError:
            self._wrong(column, 'wants dollars of zero or more, such as "0.80", with nine decimals at most')
            return None

    def _wrong(self, column: str, fix: str) -> None:
        found = shown(self._cells.get(column, ""))
        self._problems.append(Problem(key=column, found=found, fix=fix, file=self._file))


def _by_day_and_model(days: Iterable[UsageDay]) -> list[UsageDay]:
    """One for each day and model, in order."""
    found: dict[tuple[str, str], UsageDay] = {}
    for day in days:
        key = day.day, day.model
        found[key] = merged(found[key], day) if key in found else day
    return [found[key] for key in sorted(found)]


def merged(one: UsageDay, other: UsageDay) -> UsageDay:
    """Both together, as the first's day and model. A sum of which a part is not told is not told."""

    def both(left: int | None, right: int | None) -> int | None:
        return None if left is None or right is None else left + right

    return UsageDay(
        one.day,
        one.model,
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        both(one.nusd, other.nusd),
        both(one.requests, other.requests),
        tuple(sorted({*one.aliases, *other.aliases})),
    )
