"""A TOML table read into a typed struct, with every problem found, not only the first.

msgspec stops at its first error; a person who mends a config wants the whole list. So structs, lists and tables are
walked here and only the leaves are converted by msgspec. Knows no files: `Problem.file` is filled in by the caller.
Its one invariant: a struct is returned only if `problems` did not grow.
"""

import difflib
import types
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from gateway.domain.money import nusd_from_usd
from gateway.domain.secret import Secret

T = TypeVar("T")

_KINDS = {dict: "a table", list: "a list", str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing wrong in one place: where, what was found, and how to mend it."""

    key: str
    found: str
    fix: str
    file: str = ""

    def __str__(self) -> str:
        left = f"{self.key} = {self.found}" if self.found else self.key
        return f"{left:<34}  {self.fix}"


class Usd(int):
    """Nano-dollars that a person wrote as decimal dollars in quotes: `usd = "20"`."""


class Address:
    """A place to listen: `host:port`, IPv6 hosts in brackets. Port 0 lets the system choose."""

    __slots__ = ("host", "port")

    def __init__(self, text: str) -> None:
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError("not an address; write host:port, such as 127.0.0.1:8080")
        self.host = host.removeprefix("[").removesuffix("]")
        self.port = int(port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))


def nearest(word: str, known: Collection[str]) -> str:
    """`; did you mean "x"?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def shown(value: object) -> str:
    """A found value as the person wrote it, cut short. Secrets never come this way: they are leaves of type Secret."""
    if isinstance(value, dict):
        return "{...}"
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= 40 else text[:37] + "..."


def read_struct(cls: type[T], table: Any, key: str, problems: list[Problem]) -> T | None:
    """Read `table` as the struct `cls`; problems are appended with dotted keys below `key`. None if there were any."""
    if not isinstance(table, Mapping):
        problems.append(Problem(key=key, found=shown(table), fix="a table of settings is wanted here"))
        return None
    before = len(problems)
    fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}  # type: ignore[arg-type]
    for name in table:
        if name not in fields:
            where = f"one of {', '.join(sorted(fields))}"
            fix = f"unknown key{nearest(name, fields)}" if nearest(name, fields) else f"unknown key; {where}"
            problems.append(Problem(key=join(key, name), found="", fix=fix))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[field.name] = _read(field.type, table[name], join(key, name), problems)
        elif field.required:
            problems.append(Problem(key=join(key, name), found="", fix="is missing and has no default"))
    return cls(**values) if len(problems) == before else None


def _read(kind: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        structs = [arg for arg in args if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
        if structs:
            return read_struct(structs[0], value, key, problems)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return read_struct(kind, value, key, problems)
    elif origin is list and isinstance(value, list):
        return [_read(args[0], item, join(key, index), problems) for index, item in enumerate(value)]
    elif origin is dict and isinstance(value, Mapping):
        for name in value:
            # The names are the person's own, unless the type lists them.
            if get_origin(args[0]) is Literal and name not in get_args(args[0]):
                listed, close = ", ".join(get_args(args[0])), nearest(name, get_args(args[0]))
                problems.append(Problem(key=join(key, name), found="", fix=f"unknown key; one of {listed}{close}"))
        return {name: _read(args[1], item, join(key, name), problems) for name, item in value.items()}
    try:
        return msgspec.convert(value, kind, dec_hook=_read_leaf)
    except (msgspec.ValidationError, ValueError) as error:
        found = "***" if kind is Secret or Secret in args else shown(value)
        problems.append(Problem(key=key, found=found, fix=_advice(kind, value, error)))
        return None


def _read_leaf(kind: type, value: Any) -> Any:
    """msgspec's hook for our own leaf types."""
    if kind is Usd:
        if isinstance(value, bool | float) or not isinstance(value, str | int):
            raise ValueError('dollars are written in quotes so that they stay exact, such as "0.80"')
        return Usd(nusd_from_usd(str(value)))
    if not isinstance(value, str):
        raise ValueError("text in quotes is wanted here")
    return kind(value)


def _advice(kind: Any, value: Any, error: Exception) -> str:
    args = get_args(kind)
    choices = [choice for choice in args if isinstance(choice, str)] if get_origin(kind) is Literal else []
    if choices:
        listed = ", ".join(choices)
        return f"not one of {listed}{nearest(str(value), choices)}"
    text = str(error).partition(" - at `")[0]
    if text.startswith("Expected `") and "got `" in text:
        wanted = _KINDS.get(kind, text.removeprefix("Expected ").partition(", got")[0].replace("`", ""))
        return f"{wanted} is wanted here, this is {_KINDS.get(type(value), type(value).__name__)}"
    return text[:1].lower() + text[1:].replace("`", "")


def join(key: str, part: str | int) -> str:
    """A place below `key`: a name, in quotes where TOML would want them, or an index."""
    if isinstance(part, int):
        return f"{key}[{part}]"
    plain = part.replace("_", "").replace("-", "").isalnum() and part.isascii()
    return (f"{key}." if key else "") + (part if plain else f'"{part}"')
