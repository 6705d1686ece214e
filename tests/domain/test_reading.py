"""A person who mends a config sees everything that is wrong with it at once, and no secret."""

import tomllib
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from gateway.domain.reading import Address, Problem, Usd, nearest, read_struct, shown
from gateway.domain.secret import Secret


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    depth: int
    note: str = ""


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    count: Annotated[int, Meta(ge=1, le=10)] = 1
    share: Annotated[float, Meta(ge=0, le=1)] = 0.5
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    limit: Usd = Usd(0)
    other_limit: Usd | None = None
    key: Secret = Secret("")
    listen: Address = Address("127.0.0.1:1")
    inner: Inner | None = None
    inners: list[Inner] = []
    by_name: dict[str, Inner] = {}
    by_mode: dict[Literal["fast", "slow"], list[str]] = {}
    edges: tuple[float, ...] = ()


def read(text: str) -> tuple[Outer | None, dict[str, str]]:
    """The struct, and each problem's key with what was found and how to mend it."""
    problems: list[Problem] = []
    found = read_struct(Outer, tomllib.loads(text), "", problems)
    return found, {problem.key: f"{problem.found} | {problem.fix}" for problem in problems}


def only_problem(text: str) -> str:
    found, problems = read(text)
    assert found is None
    assert len(problems) == 1
    return next(f"{key} = {rest}" for key, rest in problems.items())


def test_a_good_table_is_read_whole() -> None:
    found, problems = read(
        """
        name = "n"
        count = 10
        share = 1
        limit = "0.80"
        other_limit = 3
        key = "sk-1"
        listen = "[::1]:80"
        inner.depth = 1
        inners = [{depth = 2, note = "x"}]
        by_name."a b" = {depth = 3}
        by_mode.fast = ["x"]
        edges = [1, 2.5]
        """
    )
    assert problems == {}
    assert found is not None
    assert (found.limit, found.other_limit, found.key.reveal()) == (800_000_000, 3_000_000_000, "sk-1")
    assert (found.listen.host, found.listen.port, found.share) == ("::1", 80, 1.0)
    assert (found.inner, found.inners[0].note, found.by_name["a b"].depth) == (Inner(depth=1), "x", 3)
    assert (found.by_mode, found.edges) == ({"fast": ["x"]}, (1.0, 2.5))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nam = 1", 'nam =  | unknown key; did you mean "name"?'),
        ("zzzzz = 1", "zzzzz =  | unknown key; one of by_mode, by_name, count, edges, inner"),
        ("count = 0", "count = 0 | expected int >= 1"),
        ("count = 11", "count = 11 | expected int <= 10"),
        ('count = "1"', 'count = "1" | int is wanted here, this is text'),
        ("count = 1.5", "count = 1.5 | int is wanted here, this is a number"),
        ("count = true", "count = true | int is wanted here, this is true or false"),
        ("count = 1_000_000_000_000_000_000_000", "count = 1000000000000000000000 | "),
        ("share = nan", "share = "),
        ("share = inf", "share = "),
        ("share = -0.1", "share = -0.1 | expected float >= 0.0"),
        ('on = "yes"', 'on = "yes" | true or false is wanted here, this is text'),
        ("on = 1", "on = 1 | true or false is wanted here, this is a whole number"),
        ('mode = "fats"', 'mode = "fats" | not one of fast, slow; did you mean "fast"?'),
        ("mode = 5", "mode = 5 | not one of fast, slow"),
        ("mode = 2026-11-21", 'mode = "2026-11-21" | not one of fast, slow'),
        ("limit = 0.8", "limit = 0.8 | dollars are written in quotes so that they stay exact"),
        ("limit = true", "limit = true | dollars are written in quotes"),
        ("limit = []", "limit = [] | dollars are written in quotes"),
        ("other_limit = 0.1", "other_limit = 0.1 | dollars are written in quotes"),
        ('limit = "-1"', 'limit = "-1" | '),
        ("limit = -1", "limit = -1 | "),
        ('limit = "0.0000000001"', 'limit = "0.0000000001" | '),
        ('limit = "twenty"', "limit = \"twenty\" | 'twenty' is not an amount in dollars"),
        ("key = 12345", "key = *** | text in quotes is wanted here"),
        ('key = ["sk-12345"]', "key = *** | text in quotes is wanted here"),
        ('key = {value = "sk-12345"}', "key = *** | text in quotes is wanted here"),
        ('listen = "8080"', 'listen = "8080" | not an address; write host:port'),
        ("listen = 8080", "listen = 8080 | text in quotes is wanted here"),
        ("inner = 5", "inner = 5 | a table of settings is wanted here"),
        ("inner = {}", "inner.depth =  | is missing and has no default"),
        ("inner.depth = '1'", 'inner.depth = "1" | a whole number is wanted here, this is text'),
        ("inners = [{depth = 1}, {dept = 2, depth = 1}]", 'inners[1].dept =  | unknown key; did you mean "depth"?'),
        ("inners = [5]", "inners[0] = 5 | a table of settings is wanted here"),
        ("inners = {}", "inners = {...} | "),
        ('by_name."a.b" = {depth = "x"}', 'by_name."a.b".depth = "x" | a whole number is wanted here'),
        ("by_name = []", "by_name = [] | "),
        ('by_mode.fats = ["x"]', 'by_mode.fats =  | unknown key; one of fast, slow; did you mean "fast"?'),
        ("by_mode.fast = [5]", "by_mode.fast[0] = 5 | text is wanted here, this is a whole number"),
        ('edges = [1, "x"]', 'edges = [1,"x"] | '),
    ],
)
def test_each_kind_of_problem_names_its_place_what_was_found_and_the_remedy(line: str, said: str) -> None:
    assert only_problem(f'name = "n"\n{line}').startswith(said)


def test_all_problems_come_at_once() -> None:
    found, problems = read(
        """
        nmae = "n"
        count = 99
        limit = 1.5
        mode = "sluw"
        key = 5
        listen = "x"
        [inner]
        notes = 1
        [[inners]]
        depth = "1"
        note = 5
        [[inners]]
        [by_name.x]
        [by_mode]
        fast = "x"
        slaw = []
        """
    )
    assert found is None
    assert list(problems) == [
        "nmae", "name", "count", "mode", "limit", "key", "listen", "inner.notes", "inner.depth", "inners[0].depth",
        "inners[0].note", "inners[1].depth", "by_name.x.depth", "by_mode.slaw", "by_mode.fast",
    ]  # fmt: skip


@pytest.mark.parametrize("table", [None, 5, "x", [], 1.5])
def test_what_is_no_table_is_said_to_be_none(table: Any) -> None:
    problems: list[Problem] = []
    assert read_struct(Outer, table, "a.b", problems) is None
    assert [(problem.key, problem.fix) for problem in problems] == [("a.b", "a table of settings is wanted here")]


SECRET_VALUE = "sk-live-0123456789"
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
KEYS = st.sampled_from([field.name for field in msgspec.structs.fields(Outer)])


@given(st.dictionaries(KEYS | st.text(max_size=6), TREES, max_size=6))
def test_no_table_raises_and_a_struct_comes_only_without_problems(table: dict[str, Any]) -> None:
    problems: list[Problem] = []
    found = read_struct(Outer, table, "", problems)
    assert (found is None) == bool(problems)
    assert all(problem.key and problem.fix for problem in problems)


@given(st.sampled_from([[SECRET_VALUE], {"a": SECRET_VALUE}, [[SECRET_VALUE]], {SECRET_VALUE: 1}]))
def test_a_secret_of_the_wrong_type_is_not_shown(value: Any) -> None:
    problems: list[Problem] = []
    read_struct(Outer, {"name": "n", "key": value}, "", problems)
    assert problems
    assert SECRET_VALUE not in "".join(map(str, problems))


def test_found_values_are_shown_as_written_and_cut_short() -> None:
    assert shown("x") == '"x"'
    assert shown({"a": 1}) == "{...}"
    assert shown([1, "a"]) == '[1,"a"]'
    assert shown("y" * 100) == '"' + "y" * 36 + "..."
    assert shown(True) == "true"


def test_a_problem_prints_on_one_line() -> None:
    assert str(Problem(key="a.b", found='"x"', fix="mend it")) == 'a.b = "x"'.ljust(34) + "  mend it"
    assert str(Problem(key="a.b", found="", fix="mend it")).startswith("a.b  ")


def test_the_nearest_name_is_offered_only_where_it_is_near() -> None:
    assert nearest("hours", ["hour", "day"]) == '; did you mean "hour"?'
    assert nearest("xyz", ["hour", "day"]) == ""
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.1.2.3:0", "127.1.2.3", 0, True),
        ("localhost:65535", "localhost", 65535, True),
        ("[::1]:80", "::1", 80, True),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("[::]:80", "::", 80, False),
        ("10.0.0.1:80", "10.0.0.1", 80, False),
        ("gateway.internal:80", "gateway.internal", 80, False),
    ],
)
def test_addresses(text: str, host: str, port: int, is_loopback: bool) -> None:
    address = Address(text)
    assert (address.host, address.port, address.is_loopback, str(address)) == (host, port, is_loopback, text)
    assert address == Address(text)
    assert hash(address) == hash(Address(text))
    assert address != text


@pytest.mark.parametrize("text", ["", "8080", ":8080", "localhost", "localhost:", "localhost:x", "localhost:65536",
                                  "localhost:-1", "localhost:\u0661", "localhost:8 0"])  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        Address(text)


@pytest.mark.parametrize("text", ["127.evil.example:80", "127.0.0.1.evil.example:80"])
def test_a_name_that_begins_like_loopback_is_not_loopback(text: str) -> None:
    assert not Address(text).is_loopback
