"""Which agent gets a request that names none: each condition, the order, the text read, how often it is right."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.route import MAX_TEXT_CHARS, Prompt, Route, Routes, compile_routes
from gateway.domain.rules import Routing, check_routing

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
AGENTS = ["qa_agent", "content_agent", "legal_agent", "support_agent", "analyst_agent"]


def routes(*rules: dict[str, Any], **stated: Any) -> Routes:
    """Rules with what does not matter filled in: the n-th is named r<n> and, like its agent, told apart by that."""
    full = [{"name": f"r{n}", "agent": f"agent{n}", "why": f"reason {n}", **rule} for n, rule in enumerate(rules)]
    routing = msgspec.convert({"default_agent": "fallback", "rules": full, **stated}, Routing)
    assert check_routing(routing, ["fallback", *(rule["agent"] for rule in full)]) == []
    return compile_routes(routing)


def asks(*user: str, **told: Any) -> Prompt:
    return Prompt(user=user, chars=sum(map(len, user)), **told)


def holds(rule: dict[str, Any], prompt: Prompt) -> bool:
    return routes(rule).decide(prompt).rule == "r0"


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, text, expected",
    [
        ("nda", "Is the NDA signed?", True),
        ("nda", "nda", True),
        ("nda", "Kendra has an agenda", False),
        ("NDA", "our nda.", True),
        ("log in", "I cannot log in", True),
        ("log in", "I cannot log-in", True),
        ("log in", "I cannot log\nin", True),
        ("log in", "I saw the log. In the end", False),
        ("log in", "log me in", False),
        ("log in", "in the log", False),
        ("log in", "catalog inside", False),
        ("can't pay", "I can’t pay", True),
        ("can’t pay", "I CAN'T PAY", True),
        ("node.js", "use Node.js here", True),
        ("node.js", "node js", False),
        ("straße", "HAUPTSTRASSE, STRASSE", True),
        ("kündigung", "KÜNDIGUNG!", True),
        ("kündigung", "Ku\u0308ndigung", True),
        ("Ku\u0308ndigung", "kündigung", True),
        ("kundigung", "kündigung", False),
        ("iade", "İade istiyorum", True),
        ("σας", "ΣΑΣ", True),
        ("अनुबंध", "यह अनुबंध है", True),
        ("contract", "«contract»—now", True),
        ("user id", "user_id", True),
        ("gdpr", "GDPR’s scope", True),
        ("5g", "5G", True),
        ("nda", "", False),
        ("nda", "\ud800nda\udfff", True),
    ],
)
def test_words_are_whole_and_compared_after_folding(word: str, text: str, expected: bool) -> None:
    assert holds({"any_word": [word]}, asks(text)) is expected


def test_one_of_any_word_is_enough_and_the_first_listed_is_named() -> None:
    table = routes({"any_word": ["clause", "nda", "liability"]})
    assert table.decide(asks("liability under the NDA")) == Route("agent0", "r0", 'reason 0 (word "nda")')


def test_all_words_must_all_be_there() -> None:
    rule = {"all_words": ["refund", "last week"]}
    assert holds(rule, asks("last week I asked for a refund"))
    assert not holds(rule, asks("I asked for a refund last Monday of the week"))


def test_a_word_of_not_word_forbids() -> None:
    rule = {"any_word": ["clause"], "not_word": ["where clause", "sql"]}
    assert holds(rule, asks("where is the clause"))
    assert not holds(rule, asks("the WHERE clause"))
    assert not holds(rule, asks("clause of an SQL query"))


def test_phrases_that_share_words_do_not_stand_in_for_each_other() -> None:
    table = routes({"any_word": ["my account"]}, {"any_word": ["my bank account"]}, {"any_word": ["account"]})
    assert [table.decide(asks(text)).rule for text in ("my bank account", "my account", "bank account, my")] == [
        "r1",
        "r0",
        "r2",
    ]


# --- patterns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, text, expected",
    [
        (r"\bc\+\+", "learn C++ now", True),
        (r"\bc\+\+", "learn c now", False),
        (r"^write\b", "Write a poem", True),
        (r"^write\b", "I write", False),
        (r"(?-i)IT", "it", False),
        (r"契約", "この契約を確認して", True),
        (r"über", "ÜBER", True),
        (r"begin.*end", "begin\n\nend", True),
        (r"x\?y", "x\ud800y", True),  # what has no UTF-8 is read as a question mark
    ],
)
def test_patterns_search_the_text_without_regard_to_case(pattern: str, text: str, expected: bool) -> None:
    assert holds({"pattern": pattern}, asks(text)) is expected


def test_a_pattern_and_words_must_both_hold() -> None:
    rule = {"any_word": ["poem"], "pattern": r"\bwrite\b"}
    assert holds(rule, asks("write a poem"))
    assert not holds(rule, asks("read a poem"))
    assert not holds(rule, asks("write a letter"))


def test_a_pattern_that_ruins_backtracking_engines_costs_nothing_here() -> None:
    """Would never end in Python's re; the suite's time limit is the assertion."""
    evil = "a" * (MAX_TEXT_CHARS - 1) + "!"
    table = routes({"pattern": r"^(a+)+$"}, {"pattern": r"(x+x+)+y"}, {"pattern": r"(a|aa)+b"})
    assert table.decide(asks(evil)).rule == "default"
    assert table.decide(asks("x" * MAX_TEXT_CHARS)).rule == "default"


def test_rules_of_words_alone_do_not_load_the_pattern_engine() -> None:
    program = (
        "import sys; from gateway.decide.route import compile_routes; from gateway.domain.rules import Routing, Rule;"
        "compile_routes(Routing(default_agent='a', rules=[Rule(name='r', agent='a', why='w', any_word=['x'])]));"
        "sys.exit('re2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# --- the request --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, told, expected",
    [
        ({"metadata": {"team": "legal"}}, {"metadata": {"team": "legal", "x": "y"}}, True),
        ({"metadata": {"team": "legal"}}, {"metadata": {"team": "Legal"}}, False),
        ({"metadata": {"team": "legal"}}, {"metadata": {}}, False),
        ({"metadata": {"team": ""}}, {"metadata": {}}, False),
        ({"metadata": {"a": "1", "b": "2"}}, {"metadata": {"a": "1"}}, False),
        ({"headers": {"x-team": "law"}}, {"headers": {"x-team": "law"}}, True),
        ({"headers": {"x-team": "law"}}, {"headers": {"x-team": "*"}}, False),
        ({"headers": {"x-team": "*"}}, {"headers": {"x-team": ""}}, True),
        ({"headers": {"x-team": "*"}}, {"headers": {}}, False),
        ({"tools": True}, {"tool_names": ("",)}, True),
        ({"tools": True}, {}, False),
        ({"tools": False}, {}, True),
        ({"tools": False}, {"tool_names": ("f",)}, False),
        ({"any_tool": ["run_sql", "plot"]}, {"tool_names": ("search", "plot")}, True),
        ({"any_tool": ["run_sql"]}, {"tool_names": ("run_sql2",)}, False),
        ({"min_chars": 10}, {"chars": 9}, False),
        ({"min_chars": 10}, {"chars": 10}, True),
        ({"max_chars": 10}, {"chars": 10}, True),
        ({"max_chars": 10}, {"chars": 11}, False),
        ({"min_chars": 10, "max_chars": 10}, {"chars": 10}, True),
    ],
)
def test_conditions_on_the_request(rule: dict[str, Any], told: dict[str, Any], expected: bool) -> None:
    assert holds(rule, Prompt(user=("hello",), **told)) is expected


def at(day: int, hour: int, minute: int, second: float = 0.0) -> float:
    """Day 0 is Thursday, 1 January 1970."""
    return ((day * 24 + hour) * 60 + minute) * 60 + second


@pytest.mark.parametrize(
    "rule, now_s, expected",
    [
        ({"hours_utc": "08:00-18:00"}, at(0, 7, 59, 59.9), False),
        ({"hours_utc": "08:00-18:00"}, at(0, 8, 0), True),
        ({"hours_utc": "08:00-18:00"}, at(0, 17, 59, 59.9), True),
        ({"hours_utc": "08:00-18:00"}, at(0, 18, 0), False),
        ({"hours_utc": "22:00-06:00"}, at(0, 21, 59), False),
        ({"hours_utc": "22:00-06:00"}, at(0, 22, 0), True),
        ({"hours_utc": "22:00-06:00"}, at(1, 0, 0), True),
        ({"hours_utc": "22:00-06:00"}, at(1, 5, 59), True),
        ({"hours_utc": "22:00-06:00"}, at(1, 6, 0), False),
        ({"hours_utc": "18:00-24:00"}, at(0, 23, 59, 59.9), True),
        ({"hours_utc": "00:00-24:00"}, at(0, 0, 0), True),
        ({"weekdays": ["thu"]}, at(0, 0, 0), True),
        ({"weekdays": ["thu"]}, at(0, 23, 59, 59.9), True),
        ({"weekdays": ["thu"]}, at(1, 0, 0), False),
        ({"weekdays": ["sat", "sun"]}, 1_763_856_000.0, True),  # 23 November 2025, a Sunday
        ({"weekdays": ["mon"]}, 1_763_856_000.0, False),
        ({"hours_utc": "08:00-18:00", "weekdays": ["mon"]}, at(0, 9, 0), False),
    ],
)
def test_hours_and_weekdays_are_those_of_the_time_told(rule: dict[str, Any], now_s: float, expected: bool) -> None:
    assert holds(rule, asks("hello", now_s=now_s)) is expected


def test_conditions_of_one_rule_must_all_hold() -> None:
    rule = {"any_word": ["nda"], "tools": False, "metadata": {"team": "legal"}, "max_chars": 20}
    told = {"metadata": {"team": "legal"}}
    assert holds(rule, asks("the nda", **told))
    assert not holds(rule, asks("the nda"))
    assert not holds(rule, asks("the deed", **told))
    assert not holds(rule, asks("the nda", tool_names=("f",), **told))
    assert not holds(rule, asks("the nda, please, in full", **told))


# --- order --------------------------------------------------------------------------------------------------------


def test_the_higher_priority_goes_first_and_ties_keep_the_order_of_the_file() -> None:
    low, high, high_too = {"any_word": ["a"]}, {"any_word": ["a"], "priority": 5}, {"any_word": ["a"], "priority": 5}
    assert routes(low, high, high_too).decide(asks("a")).rule == "r1"
    assert routes(high_too, low, high).decide(asks("a")).rule == "r0"
    assert [route.rule for route in routes(low, high, high_too).explain(asks("a"))] == ["r1", "r2", "r0", "default"]


def test_a_rule_about_the_request_takes_its_turn_among_rules_about_text() -> None:
    rules = ({"any_word": ["a"], "priority": 9}, {"tools": True, "priority": 8}, {"any_word": ["b"], "priority": 7})
    assert [route.rule for route in routes(*rules).explain(asks("a b", tool_names=("f",)))] == [
        "r0",
        "r1",
        "r2",
        "default",
    ]


def test_no_rule_holding_gives_the_default_and_says_so() -> None:
    assert routes({"any_word": ["nda"]}).decide(asks("hello")) == Route("fallback", "default", "no rule held")
    assert routes().decide(Prompt()) == Route("fallback", "default", "no rule held")


# --- which text ---------------------------------------------------------------------------------------------------

TOPICS = ({"any_word": ["nda"], "priority": 9}, {"any_word": ["refund"]})


def test_the_last_user_message_decides_before_earlier_ones_of_higher_priority() -> None:
    route = routes(*TOPICS).decide(asks("the nda", "a refund"))
    assert (route.rule, route.why) == ("r1", 'reason 1 (word "refund")')


def test_a_last_message_that_says_nothing_goes_where_the_conversation_went() -> None:
    route = routes(*TOPICS).decide(asks("the nda", "a refund", "and shorter?", system="nda"))
    assert (route.rule, route.why) == ("r1", 'reason 1 (word "refund", in an earlier message)')


def test_the_system_prompt_is_asked_last_of_all() -> None:
    route = routes(*TOPICS).decide(asks("hello", "thanks", system="You explain the NDA."))
    assert (route.rule, route.why) == ("r0", 'reason 0 (word "nda", in the system prompt)')
    assert routes(*TOPICS, look_at_system=False).decide(asks("hello", system="nda")).rule == "default"
    assert routes(*TOPICS).decide(Prompt(system="nda")).rule == "r0"


@pytest.mark.parametrize("look_back, rule", [(0, "default"), (1, "default"), (2, "r0"), (3, "r0")])
def test_look_back_counts_the_messages_before_the_last(look_back: int, rule: str) -> None:
    assert routes(*TOPICS, look_back=look_back).decide(asks("nda", "ok", "thanks")).rule == rule


def test_a_last_resort_waits_until_every_message_has_been_asked() -> None:
    rules = (*TOPICS, {"any_word": ["what"], "priority": -1})
    assert routes(*rules).decide(asks("the nda", "what about it?")).rule == "r0"
    assert routes(*rules).decide(asks("what about it?", system="nda")).rule == "r0"
    assert routes(*rules).decide(asks("what about it?")).rule == "r2"
    assert routes({"tools": True, "priority": -1}).decide(asks("hello", tool_names=("f",))).rule == "r0"
    assert routes({"tools": True, "priority": -1}).decide(asks("hello")).rule == "default"


def padded(before: int, word: str, after: int) -> str:
    return "x " * (before // 2) + word + " x" * (after // 2)


@pytest.mark.parametrize(
    "text, expected",
    [
        (padded(0, "nda", MAX_TEXT_CHARS * 2), True),
        (padded(MAX_TEXT_CHARS * 2, "nda", 0), True),
        (padded(MAX_TEXT_CHARS // 2 - 10, "nda", MAX_TEXT_CHARS * 2), True),
        (padded(MAX_TEXT_CHARS // 2 + 10, "nda", MAX_TEXT_CHARS * 2), False),
        (padded(MAX_TEXT_CHARS * 2, "nda", MAX_TEXT_CHARS // 2 - 10), True),
        (padded(MAX_TEXT_CHARS * 2, "nda", MAX_TEXT_CHARS // 2 + 10), False),
        (padded(MAX_TEXT_CHARS // 2, "nda", MAX_TEXT_CHARS // 2 - 3), True),
    ],
)
def test_of_a_long_text_both_ends_are_looked_at(text: str, expected: bool) -> None:
    assert holds({"any_word": ["nda"]}, asks(text)) is expected
    assert holds({"pattern": r"\bnda\b"}, asks(text)) is expected


def test_the_bound_is_for_all_messages_together() -> None:
    table = routes({"any_word": ["nda"]})
    assert table.decide(asks("nda", "x" * (MAX_TEXT_CHARS - 100))).rule == "r0"
    assert table.decide(asks("nda", "x" * MAX_TEXT_CHARS)).rule == "default"
    assert table.decide(asks("nda", "x" * MAX_TEXT_CHARS * 3, system="nda")).rule == "default"


def test_a_phrase_is_not_put_together_across_the_cut() -> None:
    text = "x" * (MAX_TEXT_CHARS // 2 - 4) + " log" + "y" * MAX_TEXT_CHARS + "in " + "z" * (MAX_TEXT_CHARS // 2 - 6)
    assert not holds({"any_word": ["log in"]}, asks(text))


# --- reasons ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, told, why",
    [
        ({"any_word": ["NDA"]}, {}, '(word "NDA")'),
        ({"all_words": ["a", "nda"]}, {}, '(word "a"; word "nda")'),
        ({"pattern": "n.a"}, {}, '(pattern of rule "r0")'),
        ({"any_word": ["nda"], "pattern": "n.a"}, {}, '(word "nda"; pattern of rule "r0")'),
        ({"metadata": {"team": "law"}}, {"metadata": {"team": "law"}}, '(metadata team = "law")'),
        ({"headers": {"x-a": "*", "x-b": "1"}}, {"headers": {"x-a": "s3cret", "x-b": "1"}},
         '(header x-a present; header x-b = "1")'),
        ({"tools": True}, {"tool_names": ("f",)}, "(tools offered)"),
        ({"tools": False}, {}, "(no tools)"),
        ({"tools": True, "any_tool": ["g", "f"]}, {"tool_names": ("f", "g")}, '(tool "g")'),
        ({"min_chars": 1, "max_chars": 99}, {}, "(at least 1 characters; at most 99 characters)"),
        ({"hours_utc": "00:00-06:00", "weekdays": ["thu", "fri"]}, {}, "(00:00-06:00 UTC; thu fri)"),
        ({"not_word": ["sql"]}, {}, ""),
    ],
)  # fmt: skip
def test_the_reason_names_the_condition_in_the_configuration_s_words(
    rule: dict[str, Any], told: dict[str, Any], why: str
) -> None:
    assert routes(rule).decide(asks("Is this a fine nDa?", **told)).why == f"reason 0 {why}".strip()


def test_explain_names_each_rule_once_where_it_held_first() -> None:
    explained = routes(*TOPICS).explain(asks("nda refund", "refund"))
    assert [(route.rule, "earlier" in route.why) for route in explained] == [
        ("r1", False),
        ("r0", True),
        ("default", False),
    ]


# --- any prompt at all --------------------------------------------------------------------------------------------


def shipped() -> Routing:
    return msgspec.convert(tomllib.loads((ROOT / "policies" / "routing.toml").read_text()), Routing)


SHIPPED = compile_routes(shipped())
TOKENS = ["Write", "the", "a", "blog", "NDA", "refund", "what", "is", "my", "İ", "ß", "ﬃ", "?", ".", "1", "+", "\n"]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),  # lone surrogates too
    st.lists(st.sampled_from(TOKENS), max_size=40).map(" ".join),
)
PROMPTS = st.builds(
    Prompt,
    user=st.lists(TEXTS, max_size=7).map(tuple),
    system=TEXTS,
    metadata=st.dictionaries(st.sampled_from(["team", "x"]), st.sampled_from(["legal", "qa", ""])),
    headers=st.dictionaries(st.sampled_from(["x-team"]), st.text(max_size=5)),
    tool_names=st.lists(st.sampled_from(["run_sql", "", "issue_refund"]), max_size=3).map(tuple),
    chars=st.integers(0, 10**7),
    now_s=st.floats(-1e11, 1e11),
)


@given(prompt=PROMPTS)
def test_deciding_is_total_repeatable_and_gives_an_agent_of_the_routing(prompt: Prompt) -> None:
    route = SHIPPED.decide(prompt)
    assert route.agent in AGENTS
    assert route == SHIPPED.decide(prompt) == compile_routes(shipped()).decide(prompt) == SHIPPED.explain(prompt)[0]


@given(secret=st.text(st.characters(categories=["Lu", "Ll", "Lo", "Nd"]), min_size=12, max_size=40))
def test_the_reason_never_quotes_the_prompt(secret: str) -> None:
    for opening in ("Write a blog post about", "Is the NDA void for", "What is"):
        prompt = asks(f"{opening} {secret}", secret, system=secret, headers={"x-team": secret})
        assert all(secret not in route.why for route in SHIPPED.explain(prompt))


@given(text=st.text(max_size=100), word=st.sampled_from(["nda", "log in", "straße", "café"]))
def test_a_word_set_among_any_text_is_found(text: str, word: str) -> None:
    assert holds({"any_word": [word]}, asks(f"{text} . {word.upper()} . {text}"))


# --- how often the shipped rules are right --------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def sentences(kind: str) -> list[tuple[str, str]]:
    return [(row["text"], row["agent"]) for row in rows("routing_sentences.jsonl") if row["set"] == kind]


def public() -> list[tuple[str, str]]:
    return [(row["text"], row["agent"]) for row in rows("routing_public.jsonl")]


def mt_bench() -> list[tuple[str, str]]:
    first_turn = {row["question_id"]: row["turns"][0] for row in rows("mt_bench_questions.jsonl")}
    return [(first_turn[row["question_id"]], row["agent"]) for row in rows("mt_bench_routes.jsonl")]


@pytest.mark.parametrize(
    "name, labelled, floor",
    [
        ("our sentences, dev", lambda: sentences("dev"), 0.96),
        ("our sentences, held out", lambda: sentences("held_out"), 0.94),
        ("strangers' questions", public, 0.83),
        ("MT-bench, first turns", mt_bench, 0.92),
    ],
)
def test_the_shipped_rules_send_most_requests_to_the_right_agent(
    name: str, labelled: Callable[[], list[tuple[str, str]]], floor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints only the figure: a wrong row shown would be a row tuned on. Floors are just under what was measured."""
    pairs = labelled()
    right = sum(SHIPPED.decide(asks(text)).agent == agent for text, agent in pairs)
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {right} of {len(pairs)} to the right agent ({right / len(pairs):.0%})\n")
    assert right / len(pairs) >= floor


def test_the_labelled_sets_are_as_large_as_they_claim() -> None:
    assert len(sentences("dev")) == 90
    assert len(sentences("held_out")) == 65
    assert len(mt_bench()) == 80
    assert len(public()) == 120
    assert {agent for _, agent in [*sentences("dev"), *sentences("held_out"), *mt_bench(), *public()]} == set(AGENTS)
