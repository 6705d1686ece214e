"""The files and the environment read into one `Loaded`, with all problems of a kind found at once.

The only file that reads the process environment. It names file, key, what was found and how to mend it, and raises
`ConfigError` with all of that together. Its one invariant: a `Loaded` has no problem left that a call could meet.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from gateway.decide.plan import Plan, compile_plan, upstreams_in_use
from gateway.domain.money import Price, format_usd
from gateway.domain.otel import Otel, read_otel
from gateway.domain.policy import Policy, check_policy
from gateway.domain.reading import Problem, Usd, join, nearest, read_struct
from gateway.domain.rules import Routing, check_routing
from gateway.domain.secret import Secret
from gateway.domain.settings import Settings, check_settings
from gateway.domain.variables import Expansion, Missing, is_reference, use_key_variables

T = TypeVar("T")

DEFAULT_ENV = "dev"
ENV_VARIABLES = ("GATEWAY_ENV", "GENESIS_ENV")
ROUTING_FILE = "routing.toml"
# Read at start only, and kept by reloads: files, listeners and exporters are not exchanged while they are used.
AT_START = ("journal", "log", "server", "store", "telemetry")
_KEY_PART = re.compile(r'"([^"]*)"|([^.\[\]"]+)')


class Paths(NamedTuple):
    """Where the configuration stands."""

    config: Path
    policies: Path


class ConfigError(Exception):
    """Everything that is wrong, to be shown to the person who can mend it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(format_problems(problems))
        self.problems = problems


class Loaded(NamedTuple):
    """One environment, ready to serve. `at_next_start`: the sections whose change in the files waits until then."""

    env: str
    paths: Paths
    settings: Settings
    policy: Policy
    routing: Routing
    plan: Plan
    otel: Otel
    at_next_start: tuple[str, ...] = ()


class _Table(NamedTuple):
    """A file's table with its variables put in, and the keys whose variable is not set."""

    file: str
    table: dict[str, Any]
    missing: dict[str, Missing]


def environments(policies: Path) -> list[str]:
    """The environments that have a policy."""
    return sorted(path.stem for path in policies.glob("*.toml") if path.name != ROUTING_FILE)


def chosen_environment(flag: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The environment asked for: `--env`, then GATEWAY_ENV, then GENESIS_ENV, then dev."""
    return flag or next((environ[name] for name in ENV_VARIABLES if environ.get(name)), DEFAULT_ENV)


def load(
    paths: Paths,
    env: str,
    *,
    litellm_map: Mapping[str, Price],
    environ: Mapping[str, str] = os.environ,
    want_secrets: bool = True,
    policy_file: Path | None = None,
    started: Settings | None = None,
) -> Loaded:
    """Read, check and compile one environment. Raises `ConfigError`. `policy_file` stands in for its own policy.

    `want_secrets` of False leaves out the complaint about variables that are not set here, for `gateway check`.
    `started`: what is in force already, whose sections of `AT_START` are kept.
    """
    problems = _check_environment(paths.policies, env) if policy_file is None else []
    policy_file = policy_file or paths.policies / f"{env}.toml"
    allowed = _read_file(policy_file, environ, problems) if not problems else None
    config = _read_file(paths.config, environ, problems)
    is_there = paths.policies.is_dir() or not problems
    rules = _read_file(paths.policies / ROUTING_FILE, environ, problems) if is_there else None
    settings = _read_as(Settings, config, problems)
    policy = _read_as(Policy, allowed, problems)
    routing = _read_as(Routing, rules, problems)
    if settings is not None:
        _add(problems, config, check_settings(settings))
        if policy is not None:
            _add(problems, allowed, check_policy(policy, settings))
            # Keys that the listeners of now need cannot go because those of the next start need none.
            _add(problems, config, _check_exposure(settings, policy) or _check_exposure(started or settings, policy))
        if routing is not None:
            _add(problems, rules, check_routing(routing, settings.agents))
    if want_secrets:
        used = upstreams_in_use(settings, policy) if settings is not None and policy is not None else frozenset()
        for source in filter(None, (config, allowed, rules)):
            problems += [lack for lack in _missing_variables(source, used) if lack not in problems]
    if problems or settings is None or policy is None or routing is None:
        raise ConfigError(problems)
    settings, at_next_start = (settings, ()) if started is None else _kept(settings, started)
    plan = compile_plan(env, settings, policy, routing, litellm_map)
    _add(problems, config, _check_cost_guardrails(plan))
    if problems:
        raise ConfigError(problems)
    telemetry = settings.telemetry
    otel = read_otel(environ, telemetry.otlp_endpoint, trace_ratio=telemetry.trace_ratio)
    return Loaded(env, paths, settings, policy, routing, plan, otel, at_next_start)


def _kept(settings: Settings, started: Settings) -> tuple[Settings, tuple[str, ...]]:
    """These, with what a running gateway keeps of those it started with, and the sections in which they differ."""
    differing = tuple(name for name in AT_START if getattr(settings, name) != getattr(started, name))
    return msgspec.structs.replace(settings, **{name: getattr(started, name) for name in differing}), differing


def missing_variables(paths: Paths, env: str, loaded: Loaded, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The variables this environment needs and this machine does not have."""
    used = upstreams_in_use(loaded.settings, loaded.policy)
    tables = [_read_file(path, environ, []) for path in (paths.config, paths.policies / f"{env}.toml")]
    return sorted({lack.name for table in tables if table for lack in _needed(table, used).values()})


def effective(loaded: Loaded) -> dict[str, Any]:
    """The whole effective configuration as plain values, secrets masked, dollars as dollars."""
    parts = {"policy": loaded.policy, "routing": loaded.routing}
    return {
        "environment": loaded.env,
        **_set_only(msgspec.to_builtins(loaded.settings, enc_hook=_as_written)),
        **{name: _set_only(msgspec.to_builtins(part, enc_hook=_as_written)) for name, part in parts.items()},
    }


def look_up(loaded: Loaded, dotted: str) -> Any:
    """One effective value: the policy is asked first, then config.toml. Raises `KeyError` with the known names.

    Places in a list as `caps.0` or `caps[0]`, names that hold a dot in double quotes.
    """
    whole = effective(loaded)
    parts = [quoted or plain for quoted, plain in _KEY_PART.findall(dotted)] or [dotted]
    # How far each root goes along with the key; the one that goes furthest knows best what was meant.
    walks = [_walk(root, parts) for root in (whole["policy"], whole)]
    for found, depth in walks:
        if depth == len(parts):
            return found
    found, depth = max(walks, key=lambda walk: walk[1])
    if depth == 0:
        found = {**whole["policy"], **whole}
    names = range(len(found)) if isinstance(found, list) else sorted(found)
    place = reduce(join, parts[:depth], "")
    known = [join(place, name) for name in names]
    hint = nearest(join(place, parts[depth]), known) if isinstance(found, dict) else ""
    raise KeyError(f"no setting {dotted!r}{hint or '; known here: ' + (', '.join(known) or 'nothing')}")


def _walk(found: Any, parts: list[str]) -> tuple[Any, int]:
    """Follow the parts of a key as far as they lead: what is there, and how many of them were followed."""
    for depth, part in enumerate(parts):
        if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            return (found if isinstance(found, dict | list) else {}), depth
    return found, len(parts)


def format_problems(problems: list[Problem]) -> str:
    """Problems by file, each on a line of its own."""
    lines = []
    for file in dict.fromkeys(problem.file for problem in problems):
        own = [problem for problem in problems if problem.file == file]
        lines.append(f"{file}: {len(own)} problem{'s' if len(own) != 1 else ''}")
        lines += [f"  {problem}" for problem in own]
    return "\n".join(lines)


def _check_environment(policies: Path, env: str) -> list[Problem]:
    """Whether there is a policy of that name, or even a place to look for it."""
    known = environments(policies)
    if env in known:
        return []
    if not policies.is_dir():
        fix = "there is none of that name; start where config.toml and policies/ are, or give --config and --policies"
        return [Problem(file=str(policies), key="folder", found="", fix=fix)]
    fix = f"unknown environment; known: {', '.join(known) or 'none'}{nearest(env, known)}"
    return [Problem(file=str(policies), key="environment", found=f'"{env}"', fix=fix)]


def _read_file(path: Path, environ: Mapping[str, str], problems: list[Problem]) -> _Table | None:
    try:
        # TOML knows no byte order mark, but some editors write one.
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        problems.append(Problem(file=str(path), key="file", found="", fix=f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        problems.append(Problem(file=str(path), key="file", found="", fix="is not UTF-8 text"))
    except ValueError as error:  # tomllib's own error is one, and so is an integer of 5,000 digits.
        problems.append(Problem(file=str(path), key="file", found="", fix=f"is not TOML: {error}"))
    else:
        found = use_key_variables(table)
        expansion = Expansion(environ)
        source = _Table(str(path), expansion.expand(table), expansion.missing)
        problems += [msgspec.structs.replace(problem, file=source.file) for problem in (*found, *expansion.problems)]
        return source
    return None


def _read_as(cls: type[T], source: _Table | None, problems: list[Problem]) -> T | None:
    if source is None:
        return None
    found: list[Problem] = []
    value = read_struct(cls, source.table, "", found)
    _add(problems, source, found)
    # What cannot be read without its variable cannot be left out either, wanted or not.
    problems += [_not_set(source, problem.key) for problem in found if problem.key in source.missing]
    return value


def _add(problems: list[Problem], source: _Table | None, found: list[Problem]) -> None:
    """Take over what was found, but nothing about a value whose variable is not set: that is a problem of its own."""
    if source is not None:
        problems += [
            msgspec.structs.replace(problem, file=source.file) for problem in found if problem.key not in source.missing
        ]


def _missing_variables(source: _Table, used: frozenset[str]) -> list[Problem]:
    return [_not_set(source, key) for key in _needed(source, used)]


def _not_set(source: _Table, key: str) -> Problem:
    name, upstream = source.missing[key]
    fix = f"set the environment variable {name}"
    fix += f"; this environment sends calls to {upstream}" if upstream else f", or write ${{{name}:-default}} here"
    return Problem(file=source.file, key=key, found="", fix=fix)


def _needed(source: _Table, used: frozenset[str]) -> dict[str, Missing]:
    """The missing variables that matter: those of an upstream only where the policy sends calls to it."""
    return {key: lack for key, lack in source.missing.items() if not lack.upstream or lack.upstream in used}


def _check_exposure(settings: Settings, policy: Policy) -> list[Problem]:
    """What must not stand open to a network."""
    server = settings.server
    if server.data.is_loopback or policy.keys or server.allow_unauthenticated:
        return []
    fix = "is not loopback and the policy has no [[keys]]; add keys, or set allow_unauthenticated = true"
    return [Problem(key="server.data", found=f'"{server.data}"', fix=fix)]


def _check_cost_guardrails(plan: Plan) -> list[Problem]:
    """What a call to a model without a price cost is not known, and nothing would pass for cheap."""
    return [
        Problem(
            key=f"agents.{name}.{variant}",
            found=f'"{model.ref}"',
            fix="has no price, and the guardrail on cost_per_request compares costs; add [prices] or drop it",
        )
        for name, rollout in plan.rollouts.items()
        if any(guardrail.metric == "cost_per_request" for guardrail in rollout.terms.guardrails)
        for variant, (model, *_) in (
            ("finetuned", plan.agents[name].finetuned),
            ("baseline", plan.agents[name].baseline),
        )
        if model.price is None
    ]


def _as_written(value: Any) -> str:
    """Our own leaf types as the person wrote them: dollars again, and secrets masked."""
    if isinstance(value, Usd):
        return format_usd(value)
    if isinstance(value, Secret) and not value:
        return ""
    if isinstance(value, Secret) and is_reference(value.reveal()):
        return f"{value.reveal()} (not set)"  # The name of a variable that gave us no secret to hide.
    return str(value)


def _set_only(value: Any) -> Any:
    """Without what was left out, for which TOML has no word."""
    if isinstance(value, dict):
        return {key: _set_only(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_set_only(item) for item in value]
    return value
