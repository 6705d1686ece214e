"""Configuration: what is wrong is all told at once, in the place where it is; what is right is served as written."""

from pathlib import Path
from typing import Any

import pytest
import toml

from gateway.config import (
    ConfigError,
    Loaded,
    Paths,
    chosen_environment,
    effective,
    environments,
    format_problems,
    load,
    look_up,
    missing_variables,
)
from gateway.domain.reading import Problem

ROOT = Path(__file__).parents[1]
SHIPPED = Paths(ROOT / "config.toml", ROOT / "policies")

CONFIG = """
[upstreams.sim]
kind = "simulator"

[upstreams.mistral]
kind        = "mistral"
base_url    = "https://api.mistral.example/v1"
api_key_env = "MISTRAL_API_KEY"

[agents.qa_agent]
finetuned = "mistral/ft:qa"
baseline  = "sim/small"
"""
ROUTING = 'default_agent = "qa_agent"\n'


class Files:
    """A configuration in a folder of the test's own; the environment is told, never the process's."""

    def __init__(self, folder: Path) -> None:
        self.paths = Paths(folder / "config.toml", folder / "policies")
        self.paths.policies.mkdir()
        self.write(config=CONFIG, routing=ROUTING, dev="[models]\nuse_finetuned = false")

    def write(self, *, config: str | None = None, **policies: str) -> None:
        if config is not None:
            self.paths.config.write_text(config, encoding="utf-8")
        for name, text in policies.items():
            (self.paths.policies / f"{name}.toml").write_text(text, encoding="utf-8")

    def load(self, env: str = "dev", *, want_secrets: bool = True, **environ: str) -> Loaded:
        return load(self.paths, env, litellm_map={}, environ=environ, want_secrets=want_secrets)

    def problems(self, env: str = "dev", *, want_secrets: bool = True, **environ: str) -> dict[str, str]:
        """What is wrong, by the file's name and the key, and how it is said."""
        with pytest.raises(ConfigError) as caught:
            self.load(env, want_secrets=want_secrets, **environ)
        found = {
            f"{Path(one.file).name}: {one.key}": f"{one.found} | {one.fix}".removeprefix(" | ")
            for one in caught.value.problems
        }
        assert len(found) == len(caught.value.problems), "something was told twice"
        assert found, "refused without a reason"
        return found


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Files that are in order."""
    return Files(tmp_path)


def test_where_metrics_are_exported_is_told_by_the_file_or_by_standard_variables(files: Files) -> None:
    assert files.load().otel.metrics.url == ""
    files.write(config=CONFIG + '[telemetry]\notlp_endpoint = "http://${COLLECTOR:-127.0.0.1}:4318"')
    assert files.load().otel.metrics.url == "http://127.0.0.1:4318/v1/metrics"
    found = files.load(OTEL_EXPORTER_OTLP_ENDPOINT="http://there:1", OTEL_METRIC_EXPORT_INTERVAL="1000").otel
    assert (found.metrics.url, found.interval_s) == ("http://there:1/v1/metrics", 1.0)
    assert files.load(OTEL_SDK_DISABLED="true").otel.metrics.url == ""


# --- Problems --------------------------------------------------------------------------------------------------------


def test_every_problem_of_every_file_is_told_at_once(files: Files) -> None:
    files.write(
        config=CONFIG.replace('"sim/small"', '"simm/small"') + '\n[server]\ndata = "nowhere"\nmax_bodybytes = 3\n',
        dev='[models]\nuse_finetuned = "no"\nunknown_agent = "refuze"\n\n[[caps]]\nper = "hours"\nusd = 0.5\n',
        routing='default_agent = "qa_agent"\nlook_bakc = 2\n',
    )
    found = files.problems()
    assert set(found) == {
        "config.toml: server.data",
        "config.toml: server.max_bodybytes",
        "dev.toml: models.use_finetuned",
        "dev.toml: models.unknown_agent",
        "dev.toml: caps[0].per",
        "dev.toml: caps[0].usd",
        "routing.toml: look_bakc",
    }
    assert 'did you mean "max_body_bytes"?' in found["config.toml: server.max_bodybytes"]
    assert found["dev.toml: models.use_finetuned"] == '"no" | true or false is wanted here, this is text'
    assert 'did you mean "refuse"?' in found["dev.toml: models.unknown_agent"]
    assert "hour, day, month, total" in found["dev.toml: caps[0].per"]
    assert "in quotes" in found["dev.toml: caps[0].usd"]


def test_references_between_files_are_checked_with_the_nearest_known_name(files: Files) -> None:
    files.write(
        config=CONFIG.replace('"sim/small"', '"simm/small"'),
        dev='[models]\nupstream = "mistrl"\n\n[[caps]]\nper = "day"\nusd = "1"\nonly = { agent = ["qa_agnet"] }\n',
        routing='default_agent = "qa_agents"\n',
    )
    found = files.problems()
    assert 'did you mean "sim"?' in found["config.toml: agents.qa_agent.baseline"]
    assert 'did you mean "mistral"?' in found["dev.toml: models.upstream"]
    assert 'did you mean "qa_agent"?' in found["dev.toml: caps[0].only.agent"]
    assert 'did you mean "qa_agent"?' in found["routing.toml: default_agent"]


def test_an_unknown_environment_names_the_known_ones_and_hides_no_other_problem(files: Files) -> None:
    files.write(production="", staging="", config=CONFIG + '[server]\nadmin = "nowhere"\n')
    found = files.problems("prodution")
    assert found["policies: environment"] == (
        '"prodution" | unknown environment; known: dev, production, staging; did you mean "production"?'
    )
    assert "config.toml: server.admin" in found


def test_the_routing_file_is_no_environment(files: Files) -> None:
    assert environments(files.paths.policies) == ["dev"]
    assert "policies: environment" in files.problems("routing")


def test_a_folder_without_a_configuration_says_where_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Paths(tmp_path / "config.toml", tmp_path / "policies"), "dev", litellm_map={}, environ={})
    said = str(caught.value)
    assert "start where config.toml and policies/ are" in said
    assert "config.toml: 1 problem" in said
    assert "routing.toml" not in said


@pytest.mark.parametrize(
    "content, said",
    [
        (b'[server\ndata = "x"', "is not TOML: "),
        (b'a = 1\n\xff = "\xfe"', "is not UTF-8 text"),
        (None, "cannot be read: No such file"),
    ],
)
@pytest.mark.parametrize("name", ["config.toml", "policies/dev.toml", "policies/routing.toml"])
def test_a_file_that_cannot_be_read_is_one_problem_of_that_file(
    files: Files, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    if (content, name) == (None, "policies/dev.toml"):
        assert list(files.problems()) == ["policies: environment"]
        return
    ((place, fix),) = files.problems().items()
    assert place == f"{Path(name).name}: file"
    assert fix.startswith(said)


def test_what_is_read_of_the_other_files_is_told_beside_a_broken_one(files: Files) -> None:
    files.write(config="[", dev="[modles]", routing="[")
    assert set(files.problems()) == {"config.toml: file", "dev.toml: modles", "routing.toml: file"}


def test_a_byte_order_mark_is_no_problem(files: Files) -> None:
    files.paths.config.write_bytes(b"\xef\xbb\xbf" + CONFIG.encode())
    assert files.load().plan.agents.keys() == {"qa_agent"}


def test_problems_are_printed_by_file() -> None:
    found = [
        Problem(file="a.toml", key="x", found="1", fix="too small"),
        Problem(file="b.toml", key="z", found="", fix="missing"),
        Problem(file="a.toml", key="y", found="2", fix="too large"),
    ]
    lines = [" ".join(line.split()) for line in format_problems(found).splitlines()]
    assert lines == ["a.toml: 2 problems", "x = 1 too small", "y = 2 too large", "b.toml: 1 problem", "z missing"]


# --- Variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ, address",
    [({}, "127.0.0.1:1"), ({"DATA": ""}, "127.0.0.1:1"), ({"DATA": "127.0.0.1:2"}, "127.0.0.1:2")],
)
def test_a_default_stands_in_for_a_variable_that_is_not_set_or_empty(
    files: Files, environ: dict[str, str], address: str
) -> None:
    files.write(config=CONFIG + '[server]\ndata = "${DATA:-127.0.0.1:1}"\n')
    assert str(files.load(**environ).settings.server.data) == address


def test_variables_are_put_into_every_text_also_amid_others_and_in_lists(files: Files) -> None:
    files.write(
        config=CONFIG.replace('"sim/small"', '"${UP}/${MODEL:-small}-v${N}"\nfallbacks = ["sim/${N}"]'),
    )
    agent = files.load(UP="sim", N="7").settings.agents["qa_agent"]
    assert (agent.baseline, agent.fallbacks) == ("sim/small-v7", ["sim/7"])


def test_a_variable_set_to_nothing_is_set(files: Files) -> None:
    files.write(config=CONFIG + '[journal]\ndir = "state${SUFFIX}"\n')
    assert files.load(SUFFIX="").settings.journal.dir == "state"
    fix = files.problems()["config.toml: journal.dir"]
    assert fix == "set the environment variable SUFFIX, or write ${SUFFIX:-default} here"


def test_what_a_variable_holds_is_not_expanded_again(files: Files) -> None:
    files.write(config=CONFIG + '[journal]\ndir = "${DIR}"\n')
    assert files.load(DIR="${HOME}/x").settings.journal.dir == "${HOME}/x"


@pytest.mark.parametrize("text", ["${DIR", "${DIR:state}", "${}", "${MY-DIR}", "${A:-${B}}", "a${1}"])
def test_what_only_looks_like_a_variable_is_refused(files: Files, text: str) -> None:
    files.write(config=CONFIG + f'[journal]\ndir = "{text}"\n')
    assert "write ${NAME} or ${NAME:-default}" in files.problems(DIR="x", A="x")["config.toml: journal.dir"]


def test_a_value_whose_variable_is_not_set_is_told_once_and_as_that(files: Files) -> None:
    # Neither as a bad address nor as a bad amount; also where the key has to be quoted.
    prices = '[prices."sim/*"]\ninput_usd_per_mtok = "${PRICE}"\noutput_usd_per_mtok = "1"\n'
    files.write(config=CONFIG + '[server]\ndata = "${DATA}"\n' + prices)
    for want_secrets in (True, False):
        found = files.problems(want_secrets=want_secrets)
        assert list(found) == ["config.toml: server.data", 'config.toml: prices."sim/*".input_usd_per_mtok']
        assert all(fix.startswith("set the environment variable ") for fix in found.values())


# --- What a running gateway keeps -------------------------------------------------------------------------------------


def test_sections_of_the_start_are_kept_and_named(files: Files) -> None:
    started = files.load().settings
    files.write(config=CONFIG + '[store]\nurl = "sqlite:///other.db"\n[context_tokens]\n"sim/*" = 7\n')
    found = load(files.paths, "dev", litellm_map={}, environ={}, started=started)
    assert found.at_next_start == ("store",)
    assert found.settings.store == started.store
    assert found.settings.context_tokens == {"sim/*": 7}
    assert load(files.paths, "dev", litellm_map={}, environ={}, started=found.settings).at_next_start == ("store",)


DEV = "[models]\nuse_finetuned = false"


def test_keys_that_the_listeners_of_now_need_cannot_go(files: Files) -> None:
    files.write(config=CONFIG + '[server]\ndata = "0.0.0.0:1"\n', dev=KEYS + DEV)
    started = files.load().settings
    files.write(config=CONFIG, dev=DEV)
    with pytest.raises(ConfigError, match=r"server\.data"):
        load(files.paths, "dev", litellm_map={}, environ={}, started=started)
    assert files.load().at_next_start == ()


# --- Costs that are compared ------------------------------------------------------------------------------------------


def test_costs_are_compared_only_where_they_are_known(files: Files) -> None:
    guarded = "[ab_testing]\nenabled = true\n[rollout.guardrails]\ncost_per_request = 1.0\n"
    files.write(dev=f'[models]\nupstream = "sim"\n{guarded}')
    found = files.problems()
    assert set(found) == {"config.toml: agents.qa_agent.finetuned", "config.toml: agents.qa_agent.baseline"}
    assert all("has no price" in said for said in found.values())
    price = 'input_usd_per_mtok = "1"\noutput_usd_per_mtok = "1"\n'
    files.write(config=f'{CONFIG}[prices."mistral/*"]\n{price}[prices."sim/*"]\n{price}')
    assert files.load().plan.rollouts["qa_agent"].terms.guardrails


# --- Secrets ---------------------------------------------------------------------------------------------------------


def test_a_secret_is_wanted_only_where_the_policy_sends_calls(files: Files) -> None:
    assert not files.load().plan.use_finetuned
    files.write(production="[models]\nuse_finetuned = true")
    assert files.problems("production") == {
        "config.toml: upstreams.mistral.api_key": (
            "set the environment variable MISTRAL_API_KEY; this environment sends calls to mistral"
        )
    }
    loaded = files.load("production", MISTRAL_API_KEY="k-1")
    assert loaded.settings.upstreams["mistral"].api_key.reveal() == "k-1"


def test_the_shipped_files_need_a_key_in_production_and_none_in_dev() -> None:
    assert load(SHIPPED, "dev", litellm_map={}, environ={}).env == "dev"
    for env in ("staging", "production"):
        with pytest.raises(ConfigError, match="MISTRAL_API_KEY") as caught:
            load(SHIPPED, env, litellm_map={}, environ={})
        assert len(caught.value.problems) == 1
        assert load(SHIPPED, env, litellm_map={}, environ={"MISTRAL_API_KEY": "k"}).env == env


def test_an_upstream_with_a_dot_in_its_name_needs_its_secret_too(files: Files) -> None:
    config = CONFIG.replace("[upstreams.mistral]", '[upstreams."m.eu"]').replace('"mistral/ft', '"m.eu/ft')
    files.write(config=config, production="")
    assert list(files.problems("production")) == ['config.toml: upstreams."m.eu".api_key']


def test_without_secrets_asked_for_the_lack_is_no_problem_but_can_be_listed(files: Files) -> None:
    files.write(production='[alerting]\nslack_webhook = "${SLACK}"')
    loaded = files.load("production", want_secrets=False)
    assert missing_variables(files.paths, "production", loaded, {}) == ["MISTRAL_API_KEY", "SLACK"]
    assert missing_variables(files.paths, "production", loaded, {"SLACK": "x"}) == ["MISTRAL_API_KEY"]
    assert missing_variables(files.paths, "dev", files.load(), {}) == []


def test_api_key_env_is_the_same_as_a_variable_in_api_key(files: Files) -> None:
    by_name = files.load(MISTRAL_API_KEY="k-1").settings.upstreams["mistral"].api_key
    files.write(config=CONFIG.replace('api_key_env = "MISTRAL_API_KEY"', 'api_key = "${MISTRAL_API_KEY}"'))
    assert files.load(MISTRAL_API_KEY="k-1").settings.upstreams["mistral"].api_key == by_name
    files.write(config=CONFIG.replace("api_key_env", 'api_key = "x"\napi_key_env'))
    assert "not both" in files.problems(MISTRAL_API_KEY="k")["config.toml: upstreams.mistral.api_key_env"]


def test_a_key_written_where_its_variable_belongs_is_refused_and_not_shown(files: Files) -> None:
    files.write(config=CONFIG.replace('"MISTRAL_API_KEY"', '"sk-proj-very-secret"'))
    with pytest.raises(ConfigError, match="not the key itself") as caught:
        files.load()
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "secret",
    [
        "[server]\nadmin_token = 12345678",
        'upstreams.mistral.api_key = ["hidden-12345678"]',
        "[upstreams.mistral]\nkind = 'mistral'\nbase_url = 'https://user:hidden-12345678@host/v1'",
    ],
)
def test_no_problem_quotes_a_secret(files: Files, secret: str) -> None:
    config = CONFIG if "[upstreams" not in secret else CONFIG.replace("[upstreams.mistral]", "[upstreams.other]")
    files.write(config=f"{secret}\n{config}" if secret.startswith("upstreams.") else f"{config}\n{secret}")
    with pytest.raises(ConfigError) as caught:
        files.load()
    assert "12345678" not in str(caught.value)


# --- Exposure --------------------------------------------------------------------------------------------------------

KEYS = f'[[keys]]\nname = "one"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize("address", ["0.0.0.0:8080", "[::]:8080", "10.0.0.5:8080", "gateway.example:8080"])
def test_off_loopback_without_keys_is_refused(files: Files, address: str) -> None:
    files.write(config=CONFIG + f'[server]\ndata = "{address}"\n')
    assert "[[keys]]" in files.problems()["config.toml: server.data"]
    files.write(config=CONFIG + f'[server]\ndata = "{address}"\nallow_unauthenticated = true\n')
    assert files.load().settings.server.allow_unauthenticated
    files.write(config=CONFIG + f'[server]\ndata = "{address}"\n', dev=KEYS + "[models]\nuse_finetuned = false")
    assert files.load().policy.keys[0].name == "one"


@pytest.mark.parametrize("address", ["127.0.0.1:8080", "127.1.2.3:1", "localhost:8080", "[::1]:8080"])
def test_on_loopback_no_keys_are_needed(files: Files, address: str) -> None:
    files.write(config=CONFIG + f'[server]\ndata = "{address}"\n')
    assert str(files.load().settings.server.data) == address


# --- Environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, environ, chosen",
    [
        (None, {}, "dev"),
        (None, {"GENESIS_ENV": "staging"}, "staging"),
        (None, {"GATEWAY_ENV": "production", "GENESIS_ENV": "staging"}, "production"),
        (None, {"GATEWAY_ENV": "", "GENESIS_ENV": "staging"}, "staging"),
        ("dev", {"GATEWAY_ENV": "production", "GENESIS_ENV": "staging"}, "dev"),
    ],
)
def test_the_flag_comes_before_the_variables_and_they_before_dev(
    flag: str | None, environ: dict[str, str], chosen: str
) -> None:
    assert chosen_environment(flag, environ) == chosen


# --- Looking at it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def production() -> Loaded:
    """The shipped production, with a key."""
    return load(SHIPPED, "production", litellm_map={}, environ={"MISTRAL_API_KEY": "very-secret"})


@pytest.mark.parametrize(
    "key, value",
    [
        ("models.use_finetuned", True),
        ("policy.models.use_finetuned", True),
        ("ab_testing.rollout_percentage", 10.0),
        ("server.data", "127.0.0.1:8080"),
        ("log.level", "info"),  # The policy's table,
        ("log.format", "auto"),  # and config.toml's of the same name.
        ("caps.0.usd", "20.00"),
        ("caps[1].usd", "200.00"),
        ("caps[0].warn_at[2]", 0.83),
        ("agents.qa_agent.defaults", {"temperature": 0.7, "max_tokens": 4096}),
        ("prices.mistral/ft:*.input_usd_per_mtok", "0.80"),
        ('prices."mistral/ft:*".input_usd_per_mtok', "0.80"),
        ("upstreams.mistral.api_key", "***"),
        ("upstreams.openai.api_key", "${OPENAI_API_KEY} (not set)"),
        ("environment", "production"),
        ("routing.default_agent", "support_agent"),
    ],
)
def test_a_dotted_key_finds_one_value(production: Loaded, key: str, value: Any) -> None:
    assert look_up(production, key) == value


@pytest.mark.parametrize(
    "key, said",
    [
        ("models.use_finetund", 'did you mean "models.use_finetuned"?'),
        ("modles", 'did you mean "models"?'),
        ("server.dat", 'did you mean "server.data"?'),
        ("agents.qa_agnet.baseline", 'did you mean "agents.qa_agent"?'),
        ("caps.3", "known here: caps[0], caps[1], caps[2]"),
        ("caps.-1", "known here: caps[0], caps[1], caps[2]"),
        ("models.use_finetuned.deeper", "known here: nothing"),
        ("xyzzy", "agents, alerting, breakers, budget, caps"),
        ("", "agents, alerting, breakers, budget, caps"),
    ],
)
def test_a_key_that_is_not_there_is_answered_with_what_is(production: Loaded, key: str, said: str) -> None:
    with pytest.raises(KeyError) as caught:
        look_up(production, key)
    assert said in caught.value.args[0]


def test_the_effective_configuration_holds_no_secret_and_every_amount_in_dollars(files: Files) -> None:
    files.write(
        config=CONFIG
        + '[server]\nadmin_token = "hide-1"\nuser_salt = "hide-2"\n'
        + '[prices."sim/small"]\ninput_usd_per_mtok = "0.000000001"\noutput_usd_per_mtok = "1234.5"\n',
        dev=f'{KEYS}[models]\nuse_finetuned = false\n[alerting]\nslack_webhook = "hide-3"\n'
        '[[caps]]\nper = "day"\nusd = "7"\n[[caps]]\nper = "day"\nrequests = 7\n',
    )
    found = effective(files.load(MISTRAL_API_KEY="hide-4"))
    assert "hide-" not in repr(found)
    assert found["prices"]["sim/small"]["input_usd_per_mtok"] == "0.000000001"
    assert found["prices"]["sim/small"]["output_usd_per_mtok"] == "1234.50"
    assert found["policy"]["caps"][0]["usd"] == "7.00"
    assert found["policy"]["caps"][1]["requests"] == 7
    assert "usd" not in found["policy"]["caps"][1]


def test_what_was_shown_can_be_served(files: Files) -> None:
    """Written back into files, the effective configuration means the same."""
    before = files.load()
    whole = effective(before)
    policy, routing = whole.pop("policy"), whole.pop("routing")
    del whole["environment"]
    whole["upstreams"]["mistral"].pop("api_key")
    files.write(config=toml.dumps(whole), dev=toml.dumps(policy), routing=toml.dumps(routing))
    after = files.load()
    assert (after.policy, after.routing) == (before.policy, before.routing)
    assert after.settings.agents == before.settings.agents
    assert after.plan.agents == before.plan.agents


def test_another_policy_stands_in_for_an_environment_s_own(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("[ab_testing]\nenabled = true\nrollout_percentage = 33\n")
    loaded = load(files.paths, "nowhere", litellm_map={}, environ={}, want_secrets=False, policy_file=other)
    assert (loaded.env, loaded.plan.agents["qa_agent"].share_bps) == ("nowhere", 3_300)
    other.write_text("[ab_testing]\nenabled = 7\n")
    with pytest.raises(ConfigError, match=r"other\.toml: 1 problem\n  ab_testing\.enabled"):
        load(files.paths, "dev", litellm_map={}, environ={}, policy_file=other)


def test_without_a_folder_of_policies_another_policy_is_missing_its_rules(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("")
    paths = files.paths._replace(policies=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"routing\.toml: 1 problem\n  file .*cannot be read"):
        load(paths, "dev", litellm_map={}, environ={}, want_secrets=False, policy_file=other)
