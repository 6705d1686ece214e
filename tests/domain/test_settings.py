"""config.toml: what its types cannot say is checked, all of it at once, and no address gives a password away."""

import tomllib
from typing import Any

import pytest

from gateway.domain.reading import Problem, read_struct
from gateway.domain.settings import Settings, agent_refs, check_settings, split_ref
from tests.planning import shipped

GOOD = """
[upstreams.sim]
kind = "simulator"
[upstreams.vllm]
kind = "compatible"
base_url = "http://127.0.0.1:8000/v1"
[agents.qa_agent]
finetuned = "vllm/org/model:tag"
baseline  = "sim/small"
"""


def settings(text: str) -> Settings:
    problems: list[Problem] = []
    found = read_struct(Settings, tomllib.loads(text), "", problems)
    assert found is not None, problems
    return found


def checked(text: str) -> dict[str, str]:
    return {problem.key: f"{problem.found} {problem.fix}" for problem in check_settings(settings(text))}


def test_a_good_config_has_no_problem() -> None:
    assert checked(GOOD) == {}


def test_the_shipped_config_has_no_problem() -> None:
    found = settings(shipped("config.toml"))
    assert check_settings(found) == []
    # Row 1 of the mission: five agents, their models, their defaults.
    prefix = "mistral/ft:open-mistral-7b:5010731d:20251031:"
    assert {name: agent.finetuned.removeprefix(prefix) for name, agent in found.agents.items()} == {
        "qa_agent": "ecc3829c",
        "content_agent": "547960f9",
        "legal_agent": "eb2da6b7",
        "support_agent": "f997bebc",
        "analyst_agent": "9ae05c7c",
    }
    assert {agent.baseline for agent in found.agents.values()} == {"mistral/open-mistral-7b"}
    assert {agent.defaults.max_tokens for agent in found.agents.values()} == {4096}
    assert found.agents["qa_agent"].defaults.temperature == 0.7
    assert found.agents["content_agent"].defaults.temperature == 0.8


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (('"sim/small"', '"simm/small"'), "agents.qa_agent.baseline", 'no upstream "simm"; known: sim, vllm; did'),
        (('"sim/small"', '"small"'), "agents.qa_agent.baseline", "write upstream/model-id"),
        (('"sim/small"', '"sim/"'), "agents.qa_agent.baseline", "the model id after the slash is missing"),
        (('"sim/small"', '""'), "agents.qa_agent.baseline", "write upstream/model-id"),
        (('"sim/small"', '"sim/small"\nfallbacks = ["sim/a", "x/b"]'), "agents.qa_agent.fallbacks[1]", 'upstream "x"'),
        (("qa_agent", '"qa agent"'), "agents.qa agent", "not a name; use letters"),
        (("qa_agent", '"../x"'), "agents.../x", "not a name"),
        (("qa_agent", "auto"), "agents.auto", "is reserved: it asks the router to choose"),
        (("qa_agent", "raw"), "agents.raw", "is reserved: it stands for models that are named outright"),
        (('"simulator"', '"simulator"\nbase_url = "http://x/v1"'), "upstreams.sim.base_url", "chooses its own address"),
        (("http://127.0.0.1:8000/v1", ""), "upstreams.vllm.base_url", "wants http://host"),
        (("http://127.0.0.1:8000/v1", "127.0.0.1:8000"), "upstreams.vllm.base_url", "wants http://host"),
        (("http://127.0.0.1:8000/v1", "http:///v1"), "upstreams.vllm.base_url", "wants http://host"),
        (("http://127.0.0.1:8000/v1", "file:///etc/passwd"), "upstreams.vllm.base_url", "wants http://host"),
        (("http://127.0.0.1:8000/v1", "http://h/v1#x"), "upstreams.vllm.base_url", "a query or a fragment"),
        (("http://127.0.0.1:8000/v1", "http://[::1"), "upstreams.vllm.base_url", "is not an address"),
        (("http://127.0.0.1:8000/v1", "http://h:99999/v1"), "upstreams.vllm.base_url", "is not an address"),
        (("http://127.0.0.1:8000/v1", "http://h:port/v1"), "upstreams.vllm.base_url", "is not an address"),
    ],
)  # fmt: skip
def test_each_problem_names_its_key_and_the_remedy(change: tuple[str, str], key: str, said: str) -> None:
    found = checked(GOOD.replace(*change))
    assert list(found) == [key]
    assert said in found[key]


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("[telemetry]\nlatency_buckets_ms = []", "telemetry.latency_buckets_ms"),
        ("[telemetry]\nlatency_buckets_ms = [5, 5]", "telemetry.latency_buckets_ms"),
        ("[telemetry]\nlatency_buckets_ms = [10, 5]", "telemetry.latency_buckets_ms"),
        ('[telemetry]\notlp_endpoint = "127.0.0.1:4318"', "telemetry.otlp_endpoint"),
        ('[telemetry]\notlp_endpoint = "http://h:99999"', "telemetry.otlp_endpoint"),
        ('[store]\nurl = "redis://x"', "store.url"),
        ('[store]\nurl = ""', "store.url"),
    ],
)
def test_the_other_tables(extra: str, key: str) -> None:
    assert list(checked(GOOD + extra)) == [key]


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@h/v1", "http://hunter2@h/v1", "ftp://user:hunter2@h/v1", "http://h/v1?key=hunter2",
     "ftp://h/v1?key=hunter2", "http://h/v1#hunter2", "http://user:hunter2@[::1", "http://u:hunter2@h:99999/v1",
     "http://u:p@hunter2@h/v1", "//u:hunter2@h"],
)  # fmt: skip
def test_no_address_gives_a_password_away(url: str) -> None:
    elsewhere = [
        GOOD + f'[{key}]\n{name} = "{url}"' for key, name in (("store", "url"), ("telemetry", "otlp_endpoint"))
    ]
    for text in (GOOD.replace("http://127.0.0.1:8000/v1", url), *elsewhere):
        found = checked(text)
        assert found
        assert "hunter2" not in str(found)


def test_all_problems_come_at_once() -> None:
    found = checked(
        """
        [upstreams."a b"]
        kind = "openai"
        base_url = "https://u:p@h/v1?x"
        [agents.auto]
        finetuned = "nowhere/x"
        baseline = "a b/"
        [agents.raw]
        finetuned = "y"
        baseline = "z"
        [store]
        url = "x"
        [telemetry]
        latency_buckets_ms = []
        """
    )
    assert list(found) == [
        "upstreams.a b", "agents.auto", "agents.raw", "upstreams.a b.base_url", "agents.auto.finetuned",
        "agents.auto.baseline", "agents.raw.finetuned", "agents.raw.baseline", "telemetry.latency_buckets_ms",
        "store.url",
    ]  # fmt: skip


def test_an_empty_registry_is_a_problem() -> None:
    assert set(checked("upstreams = {}\nagents = {}")) == {"upstreams", "agents"}


@pytest.mark.parametrize(
    ("ref", "parts"),
    [
        ("a/b", ("a", "b")),
        ("a/b/c", ("a", "b/c")),
        ("a", ("", "a")),
        ("/b", ("", "b")),
        ("a/", ("a", "")),
        ("", ("", "")),
    ],
)
def test_a_reference_is_split_at_its_first_slash(ref: str, parts: tuple[str, str]) -> None:
    assert split_ref(ref) == parts


def test_every_model_of_an_agent_is_listed_with_its_key() -> None:
    agent = settings(GOOD.replace('"sim/small"', '"sim/small"\nfallbacks = ["sim/a", "sim/b"]')).agents["qa_agent"]
    assert dict(agent_refs("qa_agent", agent)) == {
        "agents.qa_agent.finetuned": "vllm/org/model:tag",
        "agents.qa_agent.baseline": "sim/small",
        "agents.qa_agent.fallbacks[0]": "sim/a",
        "agents.qa_agent.fallbacks[1]": "sim/b",
    }


@pytest.mark.parametrize(
    "line",
    ["max_calls = 0", "max_body_bytes = -1", "drain_s = 0", "head_timeout_s = nan", "idle_timeout_s = inf",
     "body_timeout_s = 86401", 'data = "x"', "admin_token = 5"],
)  # fmt: skip
def test_there_is_a_limit_on_every_limit(line: str) -> None:
    problems: list[Problem] = []
    table: dict[str, Any] = tomllib.loads(GOOD + f"[server]\n{line}")
    assert read_struct(Settings, table, "", problems) is None
    assert [problem.key for problem in problems] == [f"server.{line.partition(' ')[0]}"]


# --- What failover is told -------------------------------------------------------------------------------------------


def refused(extra: str) -> list[str]:
    """The keys that the types refuse."""
    problems: list[Problem] = []
    assert read_struct(Settings, tomllib.loads(GOOD + extra), "", problems) is None
    return [problem.key for problem in problems]


def test_without_a_word_a_silent_model_is_left_after_ten_seconds_and_a_whole_call_after_ten_minutes() -> None:
    found = settings(GOOD)
    limits = found.upstreams["sim"].timeouts
    assert (limits.first_token_s, limits.stall_s, limits.min_events_per_s) == (10, 10, 0.2)
    assert limits.connect_s <= limits.first_token_s <= limits.first_byte_s <= limits.attempt_s <= limits.total_s
    assert found.upstreams["sim"].continues is None
    assert found.context_tokens == {}
    assert found.server.max_buffered_bytes >= found.server.max_body_bytes


def test_what_is_known_of_an_upstream_and_its_models_is_read() -> None:
    found = settings(
        GOOD
        + """
        [context_tokens]
        "vllm/*" = 32_768
        "sim/small" = 1
        [upstreams.other]
        kind = "openai"
        base_url = "https://h/v1"
        continues = true
        timeouts = { first_token_s = 2.5, min_events_per_s = 0, attempt_s = 30 }
        """
    )
    assert check_settings(found) == []
    assert found.context_tokens == {"vllm/*": 32_768, "sim/small": 1}
    other = found.upstreams["other"]
    assert other.continues is True
    assert (other.timeouts.first_token_s, other.timeouts.min_events_per_s, other.timeouts.attempt_s) == (2.5, 0, 30)


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("[upstreams.x]\nkind = 'simulator'\ncontinues = 'yes'", "upstreams.x.continues"),
        ("[upstreams.x]\nkind = 'simulator'\ntimeouts = { first_token_s = 0 }", "upstreams.x.timeouts.first_token_s"),
        ("[upstreams.x]\nkind = 'simulator'\ntimeouts = { attempt_s = -1 }", "upstreams.x.timeouts.attempt_s"),
        (
            "[upstreams.x]\nkind = 'simulator'\ntimeouts = { min_events_per_s = -0.1 }",
            "upstreams.x.timeouts.min_events_per_s",
        ),
        ("[upstreams.x]\nkind = 'simulator'\ntimeouts = { first_tokens_s = 1 }", "upstreams.x.timeouts.first_tokens_s"),
        ('[context_tokens]\n"sim/small" = 0', 'context_tokens."sim/small"'),
        ('[context_tokens]\n"sim/small" = "32k"', 'context_tokens."sim/small"'),
        ("[server]\nmax_buffered_bytes = 0", "server.max_buffered_bytes"),
    ],
)
def test_what_the_types_refuse_of_it(extra: str, key: str) -> None:
    assert refused(extra) == [key]


def test_a_body_that_is_allowed_must_find_room() -> None:
    assert checked(GOOD + "[server]\nmax_body_bytes = 100\nmax_buffered_bytes = 100") == {}
    found = checked(GOOD + "[server]\nmax_body_bytes = 100\nmax_buffered_bytes = 99")
    assert list(found) == ["server.max_buffered_bytes"]
    assert "server.max_body_bytes" in found["server.max_buffered_bytes"]


def test_a_context_of_a_model_at_no_upstream_is_a_problem() -> None:
    found = checked(GOOD + '[context_tokens]\n"simm/small" = 5\n"*" = 5\n"s*/small" = 5')
    assert list(found) == ['context_tokens."simm/small"']
    assert 'did you mean "sim"?' in found['context_tokens."simm/small"']


def test_the_tiers_of_a_price_rise() -> None:
    def tiers(*edges: int) -> str:
        rates = 'input_usd_per_mtok = "1", output_usd_per_mtok = "2"'
        listed = ", ".join(f"{{ above_tokens = {edge}, {rates} }}" for edge in edges)
        return f'[prices."sim/*"]\ninput_usd_per_mtok = "1"\noutput_usd_per_mtok = "2"\ntiers = [{listed}]'

    assert checked(GOOD + tiers(128_000, 200_000)) == {}
    for edges in ((200_000, 128_000), (5, 5)):
        found = checked(GOOD + tiers(*edges))
        assert list(found) == ['prices."sim/*".tiers']
        assert "above_tokens must rise" in found['prices."sim/*".tiers']
    assert refused(tiers(0)) == ['prices."sim/*".tiers[0].above_tokens']
