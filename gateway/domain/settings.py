"""The typed shape of config.toml: facts that are the same in every environment. Cross-checks are `check_settings`.

What is allowed and how traffic is shaped lives in `policy.py`; how `auto` finds its agent, in `rules.py`.
Every field is documented in docs/configuration.md, and a test holds the two together.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gateway.domain.names import NAME, is_name
from gateway.domain.reading import Address, Problem, Usd, join, nearest
from gateway.domain.secret import Secret

Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
UpstreamKind = Literal["openai", "compatible", "mistral", "simulator"]
# What an upstream is told of a trace: nothing, the trace, or the caller's baggage as well.
TraceContext = Literal["none", "trace", "all"]
RESERVED_AGENTS = {"auto": "asks the router to choose", "raw": "stands for models that are named outright"}


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The two listeners and their limits. There is a limit on everything a stranger can make grow."""

    data: Address = Address("127.0.0.1:8080")
    admin: Address = Address("127.0.0.1:9090")
    allow_unauthenticated: bool = False
    admin_token: Secret = Secret("")
    user_salt: Secret = Secret("")
    max_body_bytes: Count = 32 * 2**20
    max_connections: Count = 10_000
    max_calls: Count = 5_000
    max_buffered_bytes: Count = 256 * 2**20
    head_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    idle_timeout_s: Seconds = 75.0
    drain_s: Seconds = 25.0


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long one attempt at an upstream may take, by phase; `total_s` is for the call with all its attempts."""

    connect_s: Seconds = 5.0
    first_byte_s: Seconds = 120.0
    first_token_s: Seconds = 10.0
    stall_s: Seconds = 10.0
    min_events_per_s: Annotated[float, Meta(ge=0)] = 0.2
    attempt_s: Seconds = 300.0
    total_s: Seconds = 600.0


class SimulatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the simulator answers and how fast; two zeroes mean no waiting at all.

    `jitter` is how far both times stray, as a share of themselves, decided by the request. Models whose id begins with
    `ft:` are `finetuned_speedup` times as fast. The error rates are the parts of the requests that are answered by
    500, of such models and of all others; the request decides that, too.
    """

    seed: int = 0
    first_token_ms: Annotated[float, Meta(ge=0)] = 30.0
    per_token_ms: Annotated[float, Meta(ge=0)] = 2.0
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.3
    finetuned_speedup: Annotated[float, Meta(gt=0)] = 1.0
    baseline_error_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0
    finetuned_error_rate: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """One provider, or one server that speaks like one."""

    kind: UpstreamKind
    base_url: str = ""
    api_key: Secret = Secret("")
    api_key_env: str = ""
    stream_usage: bool = True
    continues: bool | None = None
    trace_context: TraceContext | None = None
    max_connections: Count = 1_000
    timeouts: Timeouts = Timeouts()
    simulator: SimulatorSettings = SimulatorSettings()


class Defaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Request fields an agent gets where the caller left them out. None: leave the field out."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Count | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None


class RatesEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What tokens cost as a person writes it: dollars in quotes, per million. Left out: as input, or as output."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cached_input_usd_per_mtok: Usd | None = None
    cache_write_usd_per_mtok: Usd | None = None
    reasoning_usd_per_mtok: Usd | None = None
    audio_input_usd_per_mtok: Usd | None = None
    audio_output_usd_per_mtok: Usd | None = None


class TierEntry(RatesEntry, frozen=True, kw_only=True):
    """What they cost, all of them, in a call whose prompt is longer than `above_tokens`."""

    above_tokens: Count


class PriceEntry(RatesEntry, frozen=True, kw_only=True):
    """A price as a person writes it. `image_tokens` is the most that one image counts as."""

    image_usd: Usd = Usd(0)
    image_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    request_usd: Usd = Usd(0)
    audio_usd_per_minute: Usd = Usd(0)
    tiers: list[TierEntry] = []
    source: str = ""


class AgentPrices(msgspec.Struct, frozen=True, kw_only=True):
    """Prices that hold for this agent's own two models only."""

    finetuned: PriceEntry | None = None
    baseline: PriceEntry | None = None


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the registry: which models serve this agent. Models are written `upstream/model-id`."""

    finetuned: str
    baseline: str
    fallbacks: list[str] = []
    description: str = ""
    salt: str = ""
    defaults: Defaults = Defaults()
    prices: AgentPrices = AgentPrices()


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where the processes of a machine share what was spent. `timeout_ms`: how long a call waits for its answer.

    `keep_calls_days`: how long what became of each call is kept for comparisons; 0 is for ever. Money is, always.
    """

    url: str = "sqlite:///state/gateway.db"
    timeout_ms: Annotated[int, Meta(ge=1, le=60_000)] = 250
    keep_calls_days: Annotated[int, Meta(ge=0, le=36_500)] = 400


class JournalSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Each process's append-only record: a directory per process, in segments; the newest `keep_segments` are kept."""

    dir: str = "state/journal"
    sync: Literal["write", "fsync"] = "write"
    segment_mb: Annotated[int, Meta(ge=1, le=4_096)] = 64
    keep_segments: Annotated[int, Meta(ge=0, le=100_000)] = 16
    max_behind_mb: Annotated[int, Meta(ge=1, le=4_096)] = 32


class Telemetry(msgspec.Struct, frozen=True, kw_only=True):
    """Histogram edges, in milliseconds, rising; and where a collector is, to which each signal's path is added.

    `trace_ratio` is the share of calls that are traced, of those whose callers have not decided it.
    """

    latency_buckets_ms: tuple[Annotated[float, Meta(gt=0)], ...] = (
        5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 120_000,
    )  # fmt: skip
    otlp_endpoint: str = ""
    trace_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`auto` writes plain text to a terminal and JSON to anything else."""

    format: Literal["auto", "json", "text"] = "auto"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All of config.toml."""

    server: Server = Server()
    upstreams: dict[str, Upstream]
    agents: dict[str, Agent]
    prices: dict[str, PriceEntry] = {}
    context_tokens: dict[str, Count] = {}
    store: Store = Store()
    journal: JournalSettings = JournalSettings()
    telemetry: Telemetry = Telemetry()
    log: LogSettings = LogSettings()


def split_ref(ref: str) -> tuple[str, str]:
    """`upstream/model-id` in two; the model id may hold slashes itself. No slash: an empty upstream."""
    upstream, slash, model = ref.partition("/")
    return (upstream, model) if slash else ("", ref)


def agent_refs(name: str, agent: Agent) -> Iterator[tuple[str, str]]:
    """Every model an agent names, with the key it stands under."""
    yield f"agents.{name}.finetuned", agent.finetuned
    yield f"agents.{name}.baseline", agent.baseline
    for index, ref in enumerate(agent.fallbacks):
        yield f"agents.{name}.fallbacks[{index}]", ref


def check_settings(settings: Settings) -> list[Problem]:
    """What the types cannot say: names, addresses, references between tables."""
    problems: list[Problem] = []

    def wrong(key: str, found: str, fix: str) -> None:
        problems.append(Problem(key=key, found=f'"{found}"', fix=fix))

    for table, names in (("upstreams", settings.upstreams), ("agents", settings.agents)):
        if not names:
            problems.append(Problem(key=table, found="", fix="at least one is wanted"))
        for name in names:
            if not is_name(name):
                wrong(f"{table}.{name}", name, f"not a name; use {NAME}")
    for name, why in RESERVED_AGENTS.items():
        if name in settings.agents:
            wrong(f"agents.{name}", name, f"is reserved: it {why}")
    for name, upstream in settings.upstreams.items():
        _check_upstream(f"upstreams.{name}", upstream, wrong)
    for name, agent in settings.agents.items():
        for key, ref in agent_refs(name, agent):
            target, model = split_ref(ref)
            if target not in settings.upstreams:
                known = ", ".join(sorted(settings.upstreams))
                hint = nearest(target, settings.upstreams) if target else "; write upstream/model-id"
                wrong(key, ref, f'no upstream "{target}"; known: {known}{hint}')
            elif not model:
                wrong(key, ref, "the model id after the slash is missing")
    problems += check_prices("prices", settings.prices)
    for name, agent in settings.agents.items():
        own = {"finetuned": agent.prices.finetuned, "baseline": agent.prices.baseline}
        problems += check_prices(
            f"agents.{name}.prices", {model: entry for model, entry in own.items() if entry is not None}
        )
    for pattern in settings.context_tokens:
        # A pattern may leave the upstream open; a name that is written out must be one.
        target, _ = split_ref(pattern)
        if target not in settings.upstreams and not re.search(r"[*?[]", pattern.partition("/")[0]):
            hint = nearest(target, settings.upstreams)
            wrong(join("context_tokens", pattern), pattern, f'no upstream "{target}"{hint}')
    if settings.server.max_buffered_bytes < settings.server.max_body_bytes:
        buffered = str(settings.server.max_buffered_bytes)
        wrong("server.max_buffered_bytes", buffered, "must not be below server.max_body_bytes")
    edges = settings.telemetry.latency_buckets_ms
    if not edges or list(edges) != sorted(set(edges)):
        fix = "edges must rise, and there must be one"
        problems.append(Problem(key="telemetry.latency_buckets_ms", found="", fix=fix))
    if settings.telemetry.otlp_endpoint:
        instead = "a password belongs into OTEL_EXPORTER_OTLP_HEADERS"
        _check_url("telemetry.otlp_endpoint", settings.telemetry.otlp_endpoint, "no path of a signal", instead, wrong)
    if not settings.store.url.startswith(("sqlite:///", "postgresql://")):
        wrong("store.url", _without_secrets(settings.store.url), "use sqlite:///path or postgresql://...")
    return problems


def check_prices(key: str, prices: Mapping[str, PriceEntry]) -> list[Problem]:
    """What is wrong with written prices: tiers that do not rise."""
    problems = []
    for name, entry in prices.items():
        edges = [tier.above_tokens for tier in entry.tiers]
        if edges != sorted(set(edges)):
            found = ", ".join(map(str, edges))
            fix = "above_tokens must rise from tier to tier"
            problems.append(Problem(key=f"{join(key, name)}.tiers", found=found, fix=fix))
    return problems


def _check_upstream(key: str, upstream: Upstream, wrong: Callable[[str, str, str], None]) -> None:
    if upstream.kind == "simulator":
        if upstream.base_url:
            wrong(f"{key}.base_url", upstream.base_url, "the simulator chooses its own address; leave it out")
        return
    _check_url(f"{key}.base_url", upstream.base_url, "its /v1", "a password belongs into api_key", wrong)


def _check_url(key: str, text: str, path: str, instead: str, wrong: Callable[[str, str, str], None]) -> None:
    shown_url = _without_secrets(text)
    try:
        url = urlsplit(text)
        is_http = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # A bracket without its twin, or a port above 65535.
        wrong(key, shown_url, "is not an address")
        return
    if not is_http:
        wrong(key, shown_url, f"wants http://host... or https://host..., with {path}")
    if "@" in url.netloc:
        wrong(key, shown_url, f"{instead}, not into the address")
    if url.query or url.fragment:
        wrong(key, shown_url, "must not hold a query or a fragment")


def _without_secrets(url: str) -> str:
    """What stands before an @ or after a ? may be a secret, so it is not shown."""
    return re.sub(r"//.*@|[?#].*", "***", url, flags=re.DOTALL)
