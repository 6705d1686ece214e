"""The files and the environment read into one `Loaded`, with every problem found at once.

The only file that reads the process environment. It names file, key, what was found and how to mend it, and raises
`ConfigError` with all of that together. Its one invariant: a `Loaded` has no problem left that a call could meet.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from gateway.decide.plan import Plan, compile_plan, upstreams_in_use
from gateway.domain.money import Price, format_usd
from gateway.domain.policy import Policy, check_policy
from gateway.domain.reading import Problem, nearest, read_struct
from gateway.domain.rules import Routing, check_routing
from gateway.domain.settings import Settings, check_settings

T = TypeVar("T")

DEFAULT_ENV = "dev"
ENV_VARIABLES = ("GATEWAY_ENV", "GENESIS_ENV")
ROUTING_FILE = "routing.toml"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


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
    """One environment, ready to serve."""

    env: str
    paths: Paths
    settings: Settings
    policy: Policy
    routing: Routing
    plan: Plan


class _Table(NamedTuple):
    """A file's table with its variables put in, and the keys whose variable is not set."""

    file: str
    table: dict[str, Any]
    missing: dict[str, str]


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
) -> Loaded:
    """Read, check and compile one environment. Raises `ConfigError`.

    `want_secrets` of False leaves out the complaint about variables that are not set here, for `gateway check`.
    """
    problems: list[Problem] = []
    known = environments(paths.policies)
    if env not in known:
        fix = f"unknown environment; known: {', '.join(known) or 'none'}{nearest(env, known)}"
        raise ConfigError([Problem(file=str(paths.policies), key="environment", found=f'"{env}"', fix=fix)])
    config = _read_file(paths.config, environ, problems)
    rules = _read_file(paths.policies / ROUTING_FILE, environ, problems)
    allowed = _read_file(paths.policies / f"{env}.toml", environ, problems)
    settings = _read_as(Settings, config, problems)
    policy = _read_as(Policy, allowed, problems)
    routing = _read_as(Routing, rules, problems)
    if settings is not None:
        _add(problems, config, check_settings(settings))
        if policy is not None:
            _add(problems, allowed, check_policy(policy, settings))
            _add(problems, config, _check_exposure(settings, policy))
        if routing is not None:
            _add(problems, rules, check_routing(routing, settings.agents))
    if want_secrets:
        used = upstreams_in_use(settings, policy) if settings is not None and policy is not None else frozenset()
        for source in filter(None, (config, allowed, rules)):
            problems += _missing_variables(source, used)
    if problems or settings is None or policy is None or routing is None:
        raise ConfigError(problems)
    return Loaded(env, paths, settings, policy, routing, compile_plan(env, settings, policy, routing, litellm_map))


def missing_variables(paths: Paths, env: str, loaded: Loaded, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The variables this environment needs and this machine does not have."""
    used = upstreams_in_use(loaded.settings, loaded.policy)
    tables = [_read_file(path, environ, []) for path in (paths.config, paths.policies / f"{env}.toml")]
    return sorted({name for table in tables if table for name in _needed(table, used).values()})


def effective(loaded: Loaded) -> dict[str, Any]:
    """The whole effective configuration as plain values, secrets masked, dollars as dollars."""
    plain = msgspec.to_builtins
    return {
        "environment": loaded.env,
        **_shown(plain(loaded.settings, enc_hook=str)),
        "policy": _shown(plain(loaded.policy, enc_hook=str)),
        "routing": _shown(plain(loaded.routing, enc_hook=str)),
    }


def look_up(loaded: Loaded, dotted: str) -> Any:
    """One effective value: the policy is asked first, then config.toml. Raises `KeyError` with the known names."""
    whole = effective(loaded)
    for root in (whole["policy"], whole):
        found: Any = root
        for part in dotted.split("."):
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                break
        else:
            return found
    first = dotted.partition(".")[0]
    known = sorted({*whole["policy"], *whole})
    raise KeyError(f"no setting {dotted!r}{nearest(first, known)}; tables: {', '.join(known)}")


def format_problems(problems: list[Problem]) -> str:
    """Problems by file, each on a line of its own."""
    lines = []
    for file in dict.fromkeys(problem.file for problem in problems):
        own = [problem for problem in problems if problem.file == file]
        lines.append(f"{file}: {len(own)} problem{'s' if len(own) != 1 else ''}")
        lines += [f"  {problem}" for problem in own]
    return "\n".join(lines)


def _read_file(path: Path, environ: Mapping[str, str], problems: list[Problem]) -> _Table | None:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(Problem(file=str(path), key="file", found="", fix=f"cannot be read: {error.strerror}"))
    except UnicodeDecodeError:
        problems.append(Problem(file=str(path), key="file", found="", fix="is not UTF-8 text"))
    except tomllib.TOMLDecodeError as error:
        problems.append(Problem(file=str(path), key="file", found="", fix=f"is not TOML: {error}"))
    else:
        missing: dict[str, str] = {}
        for name, upstream in table.get("upstreams", {}).items() if isinstance(table.get("upstreams"), dict) else ():
            _use_key_variable(f"upstreams.{name}", upstream, str(path), problems)
        return _Table(str(path), _expand(table, "", environ, missing), missing)
    return None


def _use_key_variable(key: str, upstream: Any, file: str, problems: list[Problem]) -> None:
    """`api_key_env = "NAME"` is the same as `api_key = "${NAME}"`, and keeps the file free of anything like a key."""
    if not isinstance(upstream, dict) or not isinstance(upstream.get("api_key_env"), str):
        return
    if "api_key" in upstream:
        fix = "give api_key or api_key_env, not both"
        problems.append(Problem(file=file, key=f"{key}.api_key_env", found="", fix=fix))
    upstream["api_key"] = f"${{{upstream['api_key_env']}}}"


def _expand(value: Any, key: str, environ: Mapping[str, str], missing: dict[str, str]) -> Any:
    """`${NAME}` and `${NAME:-default}` put in, in every text; what is not set is noted under its key."""
    if isinstance(value, dict):
        return {name: _expand(item, f"{key}.{name}" if key else name, environ, missing) for name, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, f"{key}[{index}]", environ, missing) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def put_in(match: re.Match[str]) -> str:
        name, default = match.groups()
        # As in a shell: `:-` also covers a variable that is set to nothing.
        if environ.get(name) or (default is None and name in environ):
            return environ[name]
        if default is None:
            missing[key] = name
            return match[0]
        return default

    return _VARIABLE.sub(put_in, value)


def _read_as(cls: type[T], source: _Table | None, problems: list[Problem]) -> T | None:
    if source is None:
        return None
    found: list[Problem] = []
    value = read_struct(cls, source.table, "", found)
    _add(problems, source, found)
    return value


def _add(problems: list[Problem], source: _Table | None, found: list[Problem]) -> None:
    """Take over what was found, but nothing about a value whose variable is not set: that is a problem of its own."""
    for problem in found:
        if source is not None and problem.key not in source.missing:
            problems.append(msgspec.structs.replace(problem, file=source.file))


def _missing_variables(source: _Table, used: frozenset[str]) -> list[Problem]:
    return [
        Problem(
            file=source.file,
            key=key,
            found="",
            fix=f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}",
        )
        for key, name in _needed(source, used).items()
    ]


def _needed(source: _Table, used: frozenset[str]) -> dict[str, str]:
    """The missing variables that matter: those of an upstream only where the policy sends calls to it."""

    def matters(key: str) -> bool:
        table, _, rest = key.partition(".")
        return table != "upstreams" or rest.partition(".")[0] in used

    return {key: name for key, name in source.missing.items() if matters(key)}


def _check_exposure(settings: Settings, policy: Policy) -> list[Problem]:
    """What must not stand open to a network."""
    server = settings.server
    if server.data.is_loopback or policy.keys or server.allow_unauthenticated:
        return []
    fix = "is not loopback and the policy has no [[keys]]; add keys, or set allow_unauthenticated = true"
    return [Problem(key="server.data", found=f'"{server.data}"', fix=fix)]


def _shown(value: Any, name: str = "") -> Any:
    """As the person wrote it: dollars again (amounts are named for their unit), and nothing where nothing was set."""
    if isinstance(value, dict):
        return {key: _shown(item, key) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return format_usd(value) if isinstance(value, int) and "usd" in name.split("_") else value
