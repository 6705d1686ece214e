"""`${NAME}` and `${NAME:-default}` in the texts of a table. Told the environment; reads none.

What is not set is not a problem here: whether a variable is wanted depends on the policy, so the caller decides.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gateway.domain.reading import Problem, join

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Missing(NamedTuple):
    """A variable that is not set, and the upstream whose table names it (empty: none, so it is always wanted)."""

    name: str
    upstream: str


class Expansion:
    """One file's table on its way: what was missing, by dotted key, and what was malformed."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.missing: dict[str, Missing] = {}
        self.problems: list[Problem] = []

    def expand(self, table: dict[str, Any]) -> dict[str, Any]:
        """The table with its variables put in; a missing one is left as it stands."""
        return {name: self._expand(value, join("", name), _upstream_of(name, value)) for name, value in table.items()}

    def _expand(self, value: Any, key: str, upstream: str | None) -> Any:
        """`upstream` is whose table this is: None outside of `upstreams`, empty in that table itself, then the name."""
        if isinstance(value, dict):
            return {
                name: self._expand(item, join(key, name), name if upstream == "" else upstream)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._expand(item, join(key, index), upstream) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        if "${" in _REFERENCE.sub(lambda match: match[2] or "", value):
            fix = "holds a ${ that begins no variable; write ${NAME} or ${NAME:-default}, without one in the other"
            self.problems.append(Problem(key=key, found="", fix=fix))
            return value
        return _REFERENCE.sub(lambda match: self._put_in(match, key, upstream or ""), value)

    def _put_in(self, match: re.Match[str], key: str, upstream: str) -> str:
        name, default = match.groups()
        # As in a shell: `:-` also covers a variable that is set to nothing.
        if self._environ.get(name) or (default is None and name in self._environ):
            return self._environ[name]
        if default is None:
            self.missing[key] = Missing(name, upstream)
            return match[0]
        return str(default)


def use_key_variables(table: dict[str, Any]) -> list[Problem]:
    """In every upstream, `api_key_env = "NAME"` becomes `api_key = "${NAME}"`. It keeps keys out of the file."""
    problems = []
    upstreams = table.get("upstreams")
    for name, upstream in upstreams.items() if isinstance(upstreams, dict) else ():
        variable = upstream.get("api_key_env") if isinstance(upstream, dict) else None
        if not variable or not isinstance(variable, str):
            continue
        key = join(join("upstreams", name), "api_key_env")
        if not _NAME.fullmatch(variable):
            # Not shown: it may be the key itself.
            fix = "wants the name of an environment variable, such as MISTRAL_API_KEY, not the key itself"
            problems.append(Problem(key=key, found="***", fix=fix))
            continue
        if "api_key" in upstream:
            problems.append(Problem(key=key, found="", fix="give api_key or api_key_env, not both"))
        upstream["api_key"] = f"${{{variable}}}"
    return problems


def is_reference(text: str) -> bool:
    """Whether a text is nothing but a variable that was not put in."""
    return _REFERENCE.fullmatch(text) is not None


def _upstream_of(name: str, value: Any) -> str | None:
    return "" if name == "upstreams" and isinstance(value, dict) else None
