"""The typed shape of policies/<environment>.toml: what is allowed, and how traffic is shaped. Pure values and checks.

State (the current rollout share, what has been spent) is not policy and never stands in these files.
"""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Meta

from gateway.domain.names import NAME, is_name
from gateway.domain.reading import Problem, Usd, nearest
from gateway.domain.rollout_policy import Rollout, check_rollout
from gateway.domain.secret import Secret
from gateway.domain.settings import Count, PriceEntry, Seconds, Settings, check_prices, split_ref
from gateway.domain.shadow_policy import SHADOW, Shadow, check_shadow

Percent = Annotated[float, Meta(ge=0, le=100)]
Dimension = Literal["agent", "key", "user", "model", "operation"]
_DIMENSIONS = frozenset(get_args(Dimension))
OnCut = Literal["continue", "hold", "error"]
# JSON readers lose whole numbers above this, and a month of a large fleet has more tokens than a Count.
Ceiling = Annotated[int, Meta(ge=1, le=2**53 - 1)]
BPS_PER_PERCENT = 100
# By what `gateway report` calls them.
REPORT_FILES = {"ab": "ab_testing_results.md", "costs": "cost_dashboard.md"}
_TIME_OF_DAY = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")


class Models(msgspec.Struct, frozen=True, kw_only=True):
    """Which models may serve. `upstream` sends every model to one upstream, which is how dev runs without a key."""

    use_finetuned: bool = True
    fallback_enabled: bool = True
    unknown_agent: Literal["refuse", "baseline"] = "refuse"
    allow_raw_models: bool = False
    upstream: str = ""


class AbTesting(msgspec.Struct, frozen=True, kw_only=True):
    """The share of users who get the fine-tuned model. Off: all of them, where `use_finetuned` is true."""

    enabled: bool = False
    rollout_percentage: Percent = 10.0


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """Which `x-gateway-*` headers a trusted caller may use to overrule the policy, per request."""

    variant: bool = False
    fallback: bool = False
    timeout: bool = True


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Ceilings on what a request may ask for. Above `max_tokens` and `temperature`: lowered; above `n`: refused."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 8


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a stream that breaks off: joined with another model's, held back until it is whole, or an error.

    `agents` says it for single agents.
    """

    on_cut: OnCut = "continue"
    agents: dict[str, OnCut] = {}


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How retries at the same model are paced, and how many an upstream gets: a share of its calls, at least a few."""

    base_s: Seconds = 0.25
    max_wait_s: Seconds = 5.0
    budget_percent: Percent = 20.0
    budget_floor: Annotated[int, Meta(ge=0, le=1_000)] = 3
    budget_window_s: Seconds = 10.0


class Breakers(msgspec.Struct, frozen=True, kw_only=True):
    """When a model that fails is left alone, and for how long: twice as long after each failed probe, to a maximum."""

    consecutive: Count = 5
    share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    min_calls: Count = 20
    window_s: Seconds = 30.0
    open_s: Seconds = 5.0
    max_open_s: Seconds = 30.0


class TimeoutOverrides(msgspec.Struct, frozen=True, kw_only=True):
    """Timeouts of an upstream as this environment wants them; what is left out stays as in config.toml."""

    first_byte_s: Seconds | None = None
    first_token_s: Seconds | None = None
    stall_s: Seconds | None = None
    min_events_per_s: Annotated[float, Meta(ge=0)] | None = None
    attempt_s: Seconds | None = None
    total_s: Seconds | None = None


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How calls fare where a cap is short, and what becomes of the money of a call whose caller has left.

    `when_short`: lower the call's max_tokens to what can be paid, though not below `min_tokens`, or refuse it. What is
    only held by calls in flight is waited for, `wait_ms` at most. `when_left`: read on for the usage, for `left_s` at
    most, or close the connection and book the bound. `exceeded_status`: of the refusal where a cap is used up.
    """

    when_short: Literal["clamp", "refuse"] = "clamp"
    min_tokens: Count = 256
    wait_ms: Annotated[int, Meta(ge=0, le=60_000)] = 500
    exceeded_status: Literal[429, 402] = 429
    when_left: Literal["drain", "abort"] = "drain"
    left_s: Seconds = 30.0


class Cap(msgspec.Struct, frozen=True, kw_only=True):
    """A hard ceiling: one of usd, requests or tokens, per window, for each value of `scope`; `only` narrows it.

    `scope` is global, one of agent, key, user, model, operation, or a pair such as "agent+user". From `over_pct`
    percent on, calls go to the model `use` instead. `on_store_failure`: closed, spend what is leased and then refuse;
    open, go on and count.
    """

    scope: str = "global"
    per: Literal["hour", "day", "month", "total"]
    timezone: str = "UTC"
    usd: Usd | None = None
    requests: Ceiling | None = None
    tokens: Ceiling | None = None
    only: dict[Dimension, list[str]] = {}
    warn_at: tuple[Annotated[float, Meta(gt=0, le=1)], ...] = (0.25, 0.50, 0.83)
    over_pct: Annotated[float, Meta(gt=0, lt=100)] | None = None
    use: str = ""
    on_store_failure: Literal["closed", "open"] = "closed"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the models' health is judged, without spending tokens.

    `every_s`: how often the gateway looks by itself; 0: only when asked. `cache_s`: for so long a provider's word is
    kept. `recent_s`: calls of so long a time say more than the provider. SLOW is a provider that takes `slow_ms` to
    tell of a model, or a model half of whose recent streams begin after `slow_first_chunk_ms`. `warn_days`: from so
    many days before a model is withdrawn, the log says so once a day.
    """

    every_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    cache_s: Seconds = 15.0
    recent_s: Seconds = 60.0
    timeout_s: Seconds = 5.0
    slow_ms: Annotated[float, Meta(gt=0)] = 2_000.0
    slow_first_chunk_ms: Annotated[float, Meta(gt=0)] = 5_000.0
    warn_days: Annotated[int, Meta(ge=0, le=3_650)] = 90


class Alerting(msgspec.Struct, frozen=True, kw_only=True):
    """Where budget and rollout events are told, beside the log: in Slack, by an incoming webhook."""

    enabled: bool = False
    slack_webhook: Secret = Secret("")


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """What spans hold beside figures: with `prompts`, the texts of a call, scrubbed, of `max_chars` each at most.

    `agents` narrows it to some; none named: all.
    """

    prompts: bool = False
    agents: list[str] = []
    max_chars: Annotated[int, Meta(ge=1, le=100_000)] = 4_000


class Reports(msgspec.Struct, frozen=True, kw_only=True):
    """Reports that are written by themselves: each day at `daily_at` (UTC; "": never), into the folder `dir`."""

    daily_at: str = ""
    dir: Annotated[str, Meta(min_length=1)] = "reports"

    def path(self, report: str) -> str:
        """Where one of `REPORT_FILES` is written unless somebody says otherwise."""
        return f"{self.dir}/{REPORT_FILES[report]}"


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A caller's key, as the SHA-256 of it in hex. No `agents`: all of them. `trusted`: identity headers count."""

    name: str
    sha256: str
    agents: list[str] = []
    trusted: bool = True


class PolicyLog(msgspec.Struct, frozen=True, kw_only=True):
    """How much is logged. `debug` writes a line for every call, `info` only for those that failed."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """All of policies/<environment>.toml."""

    models: Models = Models()
    ab_testing: AbTesting = AbTesting()
    rollout: Rollout = Rollout()
    shadow: Shadow = Shadow()
    overrides: Overrides = Overrides()
    limits: Limits = Limits()
    stream: Stream = Stream()
    retries: Retries = Retries()
    breakers: Breakers = Breakers()
    timeouts: dict[str, TimeoutOverrides] = {}
    budget: Budget = Budget()
    caps: list[Cap] = []
    health: Health = Health()
    alerting: Alerting = Alerting()
    traces: Traces = Traces()
    reports: Reports = Reports()
    keys: list[Key] = []
    prices: dict[str, PriceEntry] = {}
    log: PolicyLog = PolicyLog()


def check_policy(policy: Policy, settings: Settings) -> list[Problem]:
    """What the types cannot say, and what must agree with config.toml."""
    problems: list[Problem] = []

    def wrong(key: str, found: str, fix: str) -> None:
        problems.append(Problem(key=key, found=found, fix=fix))

    upstream = policy.models.upstream
    if upstream and upstream not in settings.upstreams:
        known = ", ".join(sorted(settings.upstreams))
        wrong(
            "models.upstream",
            f'"{upstream}"',
            f"no such upstream; known: {known}{nearest(upstream, settings.upstreams)}",
        )
    if policy.reports.daily_at and not _TIME_OF_DAY.fullmatch(policy.reports.daily_at):
        wrong("reports.daily_at", f'"{policy.reports.daily_at}"', 'wants a time of day in UTC such as "06:00", or ""')
    problems += check_rollout(policy.rollout, settings.agents, is_experiment=policy.ab_testing.enabled)
    pools = {name: upstream.max_connections for name, upstream in settings.upstreams.items()}
    problems += check_shadow(policy.shadow, settings.agents, pools)
    _check_caps(policy, settings, problems)
    problems += check_prices("prices", policy.prices)
    if policy.alerting.enabled and not _may_be_webhook(policy.alerting.slack_webhook):
        wrong("alerting.slack_webhook", "***", "wants the https://... address of a Slack incoming webhook, or nothing")
    for name in policy.timeouts:
        if name not in settings.upstreams:
            known = ", ".join(sorted(settings.upstreams))
            wrong(f"timeouts.{name}", "", f"no such upstream; known: {known}{nearest(name, settings.upstreams)}")
    for agent in policy.stream.agents:
        _check_agent(f"stream.agents.{agent}", agent, settings.agents, problems)
    for agent in policy.traces.agents:
        _check_agent("traces.agents", agent, settings.agents, problems)
    if policy.retries.max_wait_s < policy.retries.base_s:
        wrong("retries.max_wait_s", str(policy.retries.max_wait_s), "must not be below retries.base_s")
    if policy.breakers.max_open_s < policy.breakers.open_s:
        wrong("breakers.max_open_s", str(policy.breakers.max_open_s), "must not be below breakers.open_s")
    seen: set[str] = set()
    for index, key in enumerate(policy.keys):
        if not is_name(key.name) or key.name in seen:
            wrong(f"keys[{index}].name", f'"{key.name}"', f"wants a name of its own: {NAME}")
        seen.add(key.name)
        if not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
            wrong(f"keys[{index}].sha256", '"..."', "wants 64 hex digits; `gateway keys new` writes the whole entry")
        for agent in key.agents:
            _check_agent(f"keys[{index}].agents", agent, settings.agents, problems)
    return problems


def scope_names(scope: str) -> tuple[str, ...]:
    """The dimensions a scope is made of: none for `global`."""
    return () if scope == "global" else tuple(scope.split("+"))


def shadow_caps(shadow: Shadow) -> list[Cap]:
    """The cap that shadow calls are held to; none where there are none."""
    only: dict[Dimension, list[str]] = {"operation": [SHADOW]}
    return [Cap(per=shadow.per, usd=shadow.usd, only=only)] if shadow.is_on and shadow.usd is not None else []


def _check_caps(policy: Policy, settings: Settings, problems: list[Problem]) -> None:
    def wrong(key: str, found: str, fix: str) -> None:
        problems.append(Problem(key=key, found=found, fix=fix))

    first_with = {_counted_by(cap): "shadow.usd" for cap in shadow_caps(policy.shadow)}
    for index, cap in enumerate(policy.caps):
        key = f"caps[{index}]"
        units = _units(cap)
        if len(units) != 1:
            wrong(key, " and ".join(units), "wants exactly one of usd, requests, tokens")
        names = scope_names(cap.scope)
        if len(names) > 2 or len(set(names)) != len(names) or not set(names) <= _DIMENSIONS:
            known = ", ".join(("global", *sorted(_DIMENSIONS)))
            wrong(f"{key}.scope", f'"{cap.scope}"', f"wants one of {known}, or two of them as agent+user")
        if not _is_zone(cap.timezone):
            wrong(f"{key}.timezone", f'"{cap.timezone}"', "wants a time zone by its IANA name, such as Europe/Paris")
        if cap.usd == 0:
            wrong(f"{key}.usd", '"0"', "would refuse every call; `gateway costs stop` does that, and can be undone")
        # Two caps on the same thing would share one account, and each call would be counted twice in it.
        first = first_with.setdefault(_counted_by(cap), key)
        if first != key:
            wrong(key, "", f"limits the same as {first}; keep the lower one")
        if list(cap.warn_at) != sorted(cap.warn_at):
            wrong(f"{key}.warn_at", "", "shares must rise")
        for name, values in cap.only.items():
            if not values:
                wrong(f"{key}.only.{name}", "[]", "nothing would count here; name at least one, or leave it out")
        for agent in cap.only.get("agent", []):
            _check_agent(f"{key}.only.agent", agent, settings.agents, problems)
        if (cap.over_pct is None) != (not cap.use):
            wrong(f"{key}.use", f'"{cap.use}"', "over_pct and use are given together: from which share on, which model")
        upstream, model = split_ref(cap.use)
        if cap.use and (upstream not in settings.upstreams or not model):
            known = ", ".join(sorted(settings.upstreams))
            wrong(f"{key}.use", f'"{cap.use}"', f"write upstream/model-id; known upstreams: {known}")


def _units(cap: Cap) -> list[str]:
    return [unit for unit in ("usd", "requests", "tokens") if getattr(cap, unit) is not None]


def _counted_by(cap: Cap) -> tuple[object, ...]:
    """What makes two caps count the same."""
    zone = "" if cap.per == "total" else cap.timezone
    return frozenset(scope_names(cap.scope)), cap.per, zone, tuple(_units(cap)), _sorted(cap.only)


def _may_be_webhook(webhook: Secret) -> bool:
    """Whether it is empty or an address one can post to; http is for a relay nearby."""
    try:
        url = urlsplit(webhook.reveal())
        return not webhook or (url.scheme in ("https", "http") and bool(url.hostname) and url.port != 0)
    except ValueError:  # A bracket without its twin, or a port above 65535.
        return False


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _sorted(only: Mapping[Dimension, list[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(sorted((name, tuple(sorted(set(values)))) for name, values in only.items()))


def _check_agent(key: str, agent: str, agents: Collection[str], problems: list[Problem]) -> None:
    if agent not in agents:
        known = ", ".join(sorted(agents))
        problems.append(
            Problem(key=key, found=f'"{agent}"', fix=f"no such agent; known: {known}{nearest(agent, agents)}")
        )
