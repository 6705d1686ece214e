"""policies/*.toml: a cap that could not hold, or a key that could not open, is found before it is relied on."""

import tomllib
from pathlib import Path

import pytest

from gateway.decide.caps import rules_of
from gateway.domain.policy import Policy, check_policy
from gateway.domain.reading import Problem, read_struct
from gateway.domain.settings import Agent, Settings, Upstream

POLICIES = Path(__file__).parents[2] / "policies"
SETTINGS = Settings(
    upstreams={"simulator": Upstream(kind="simulator")},
    agents={name: Agent(finetuned="simulator/a", baseline="simulator/b") for name in ("qa_agent", "legal_agent")},
)
HASH = "ab" * 32


def read(text: str) -> tuple[Policy | None, list[Problem]]:
    problems: list[Problem] = []
    return read_struct(Policy, tomllib.loads(text), "", problems), problems


def checked(text: str) -> dict[str, str]:
    policy, problems = read(text)
    assert policy is not None, problems
    return {problem.key: f"{problem.found} {problem.fix}" for problem in check_policy(policy, SETTINGS)}


@pytest.mark.parametrize("env", ["dev", "staging", "production"])
def test_the_shipped_policies_have_no_problem(env: str) -> None:
    assert checked((POLICIES / f"{env}.toml").read_text().replace("${SLACK_WEBHOOK_URL:-}", "")) == {}


def test_production_is_what_the_mission_says() -> None:
    policy, _ = read((POLICIES / "production.toml").read_text())
    assert policy is not None
    assert (policy.models.use_finetuned, policy.models.fallback_enabled) == (True, True)
    assert (policy.ab_testing.enabled, policy.ab_testing.rollout_percentage) == (True, 10.0)
    assert [(cap.scope, cap.per, cap.usd, cap.warn_at) for cap in policy.caps] == [
        ("global", "hour", 20 * 10**9, (0.25, 0.5, 0.83)),
        ("global", "day", 200 * 10**9, (0.25, 0.5, 0.83)),
        ("global", "total", 30 * 10**9, (0.25, 0.5, 0.83)),
    ]
    assert policy.caps[2].only == {"operation": ["benchmark", "finetune"]}
    assert policy.alerting.enabled


def test_an_empty_policy_is_a_good_one() -> None:
    assert checked("") == {}


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ('[models]\nupstream = "simulatr"', "models.upstream", 'known: simulator; did you mean "simulator"?'),
        ('[reports]\ndaily_at = "6:00"', "reports.daily_at", 'wants a time of day in UTC such as "06:00"'),
        ('[reports]\ndaily_at = "24:00"', "reports.daily_at", 'wants a time of day in UTC such as "06:00"'),
        ('[[caps]]\nper = "hour"', "caps[0]", "exactly one of usd, requests, tokens"),
        ('[[caps]]\nper = "hour"\nusd = "1"\ntokens = 5', "caps[0]", "usd and tokens wants exactly one"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nwarn_at = [0.5, 0.25]', "caps[0].warn_at", "shares must rise"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nonly.agent = ["qa_agnet"]', "caps[0].only.agent", 'mean "qa_agent"?'),
        ('[[caps]]\nper = "hour"\nusd = "0.0"', "caps[0].usd", "gateway costs stop"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "team"', "caps[0].scope", "one of global, agent, key, model"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = ""', "caps[0].scope", "wants one of"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "variant"', "caps[0].scope", "wants one of"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "global+user"', "caps[0].scope", "two of them as agent+user"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "user+user"', "caps[0].scope", "two of them"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "agent+user+key"', "caps[0].scope", "two of them"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = "agent + user"', "caps[0].scope", "two of them"),
        ('[[caps]]\nper = "hour"\nusd = "1"\ntimezone = "Europe/Pariss"', "caps[0].timezone", "by its IANA name"),
        ('[[caps]]\nper = "hour"\nusd = "1"\ntimezone = ""', "caps[0].timezone", "by its IANA name"),
        ('[[caps]]\nper = "hour"\nusd = "1"\ntimezone = "../etc/passwd"', "caps[0].timezone", "by its IANA name"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nonly.user = []', "caps[0].only.user", "nothing would count here"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nover_pct = 80', "caps[0].use", "given together"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nuse = "simulator/b"', "caps[0].use", "given together"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nover_pct = 80\nuse = "b"', "caps[0].use", "write upstream/model-id"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nover_pct = 8\nuse = "sim/b"', "caps[0].use", "upstreams: simulator"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nover_pct = 8\nuse = "simulator/"', "caps[0].use", "upstream/model-id"),
        ('[[keys]]\nname = "a b"\nsha256 = "' + HASH + '"', "keys[0].name", "wants a name of its own"),
        ('[[keys]]\nname = "a"\nsha256 = "' + HASH[:-1] + '"', "keys[0].sha256", "64 hex digits"),
        ('[[keys]]\nname = "a"\nsha256 = "' + HASH.upper() + '"', "keys[0].sha256", "64 hex digits"),
        ('[[keys]]\nname = "a"\nsha256 = "' + HASH + '"\nagents = ["nobody"]', "keys[0].agents", "no such agent"),
        ("[timeouts.simulatr]\nstall_s = 1", "timeouts.simulatr", 'known: simulator; did you mean "simulator"?'),
        ('[stream]\nagents = { qa_agnet = "hold" }', "stream.agents.qa_agnet", 'did you mean "qa_agent"?'),
        ("[breakers]\nopen_s = 60", "breakers.max_open_s", "30.0 must not be below breakers.open_s"),
        ("[breakers]\nmax_open_s = 4.9", "breakers.max_open_s", "4.9 must not be below"),
        ("[retries]\nbase_s = 5.1", "retries.max_wait_s", "5.0 must not be below retries.base_s"),
    ],
)
def test_each_problem_names_its_key_and_the_remedy(text: str, key: str, said: str) -> None:
    found = checked(text)
    assert list(found) == [key]
    assert said in found[key]


def test_a_key_in_the_place_of_its_hash_is_not_shown() -> None:
    assert "sk-secret" not in str(checked('[[keys]]\nname = "a"\nsha256 = "sk-secret"'))


def test_two_keys_may_not_share_a_name() -> None:
    keys = "".join(f'[[keys]]\nname = "a"\nsha256 = "{hash_ * 32}"\n' for hash_ in ("ab", "cd"))
    assert list(checked(keys)) == ["keys[1].name"]


def test_two_caps_on_the_same_thing_are_refused_and_on_different_things_are_not() -> None:
    def caps(*lines: str) -> dict[str, str]:
        return checked("".join(f"[[caps]]\n{line}\n" for line in lines))

    base = 'per = "hour"\nusd = "1"'
    assert list(caps(base, base.replace('"1"', '"2"'))) == ["caps[1]"]
    agents = '\nonly.agent = ["qa_agent", "legal_agent"]'
    assert list(caps(base + agents, base + '\nonly.agent = ["legal_agent", "qa_agent"]')) == ["caps[1]"]
    others = [base + agents, base + '\nscope = "user"', 'per = "day"\nusd = "1"', 'per = "hour"\nrequests = 1']
    others += [base + '\ntimezone = "Asia/Kolkata"', base + '\nscope = "agent+user"']
    assert caps(base, *others) == {}
    # Whichever way round a pair is written it is the same, and so is all time in every zone.
    assert list(caps(base + '\nscope = "agent+user"', base + '\nscope = "user+agent"')) == ["caps[1]"]
    total = 'per = "total"\nusd = "1"'
    assert list(caps(total, total + '\ntimezone = "Asia/Kolkata"')) == ["caps[1]"]


def test_no_two_caps_that_pass_share_an_account() -> None:
    scopes, zones = ("global", "user", "agent+user"), ("UTC", "Asia/Kolkata")
    lines = [
        f'[[caps]]\nscope = "{scope}"\nper = "{per}"\ntimezone = "{zone}"\n{unit}{only}\n'
        for scope in scopes
        for per in ("hour", "day", "month", "total")
        for zone in (zones if per != "total" else ("UTC",))
        for unit in ('usd = "1"', "requests = 1", "tokens = 1")
        for only in ("", '\nonly.agent = ["qa_agent"]', '\nonly.user = ["qa_agent"]')
    ]
    assert checked("".join(lines)) == {}
    policy, _ = read("".join(lines))
    assert policy is not None
    assert len({rule.id for rule in rules_of(policy.caps, "test")}) == len(lines)


def test_the_limits_of_budgets_at_their_edges_are_good() -> None:
    edges = """
    [budget]
    when_short = "refuse"
    min_tokens = 1
    wait_ms = 0
    when_left = "abort"
    left_s = 0.001
    [[caps]]
    scope = "key+model"
    per = "month"
    timezone = "Australia/Lord_Howe"
    usd = "9007199.254740991"
    warn_at = [1.0]
    over_pct = 99.9
    use = "simulator/b"
    on_store_failure = "open"
    [[caps]]
    per = "total"
    usd = "0.000000001"
    warn_at = []
    [[caps]]
    per = "hour"
    requests = 1
    [[caps]]
    per = "month"
    tokens = 9007199254740991
    """
    assert checked(edges) == {}
    policy, _ = read(edges)
    assert policy is not None
    assert [cap.usd for cap in policy.caps] == [2**53 - 1, 1, None, None]


def test_without_a_word_short_calls_are_clamped_and_answers_nobody_waits_for_are_read_to_their_usage() -> None:
    policy, _ = read("")
    assert policy is not None
    budget = policy.budget
    assert (budget.when_short, budget.min_tokens, budget.wait_ms, budget.when_left) == ("clamp", 256, 500, "drain")
    assert policy.caps == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[[caps]]\nper = "hours"\nusd = "1"', "caps[0].per"),
        ('[[caps]]\nusd = "1"', "caps[0].per"),
        ('[[caps]]\nper = "hour"\nusd = 0.5', "caps[0].usd"),
        ('[[caps]]\nper = "hour"\nusd = "-1"', "caps[0].usd"),
        ('[[caps]]\nper = "hour"\nrequests = 0', "caps[0].requests"),
        ('[[caps]]\nper = "hour"\nusd = "9007199.254740992"', "caps[0].usd"),
        ('[[caps]]\nper = "hour"\nusd = "1e3"', "caps[0].usd"),
        ('[[caps]]\nper = "hour"\nusd = "nan"', "caps[0].usd"),
        ('[[caps]]\nper = "hour"\nrequests = -1', "caps[0].requests"),
        ('[[caps]]\nper = "hour"\nrequests = 1.5', "caps[0].requests"),
        ('[[caps]]\nper = "hour"\nrequests = 9007199254740992', "caps[0].requests"),
        ('[[caps]]\nper = "hour"\ntokens = 0', "caps[0].tokens"),
        ('[[caps]]\nper = "hour"\ntokens = 9223372036854775808', "caps[0].tokens"),
        ('[[caps]]\nper = "hour"\neur = "1"\nusd = "1"', "caps[0].eur"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nscope = 5', "caps[0].scope"),
        ('[[caps]]\nper = "hour"\nusd = "1"\non_store_failure = "shut"', "caps[0].on_store_failure"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nuse = "simulator/b"\nover_pct = 0', "caps[0].over_pct"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nuse = "simulator/b"\nover_pct = 100', "caps[0].over_pct"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nuse = "simulator/b"\nover_pct = nan', "caps[0].over_pct"),
        ('[budget]\nwhen_short = "wait"', "budget.when_short"),
        ("[budget]\nmin_tokens = 0", "budget.min_tokens"),
        ("[budget]\nwait_ms = -1", "budget.wait_ms"),
        ("[budget]\nwait_ms = 60001", "budget.wait_ms"),
        ("[budget]\nleft_s = 0", "budget.left_s"),
        ('[budget]\nwhen_left = "stay"', "budget.when_left"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nonly.agnet = ["qa_agent"]', "caps[0].only.agnet"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nonly.agent = "qa_agent"', "caps[0].only.agent"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nwarn_at = [0]', "caps[0].warn_at"),
        ('[[caps]]\nper = "hour"\nusd = "1"\nwarn_at = [1.1]', "caps[0].warn_at"),
        ("[ab_testing]\nrollout_percentage = 101", "ab_testing.rollout_percentage"),
        ("[ab_testing]\nrollout_percentage = -1", "ab_testing.rollout_percentage"),
        ("[ab_testing]\nrollout_percentage = nan", "ab_testing.rollout_percentage"),
        ("[limits]\nn = 0", "limits.n"),
        ("[limits]\ntemperature = 2.1", "limits.temperature"),
        ('[models]\nunknown_agent = "ignore"', "models.unknown_agent"),
        ("[overrides]\nvarient = true", "overrides.varient"),
        ('[log]\nlevel = "trace"', "log.level"),
        ('[stream]\non_cut = "retry"', "stream.on_cut"),
        ('[stream]\nagents = { qa_agent = "resume" }', "stream.agents.qa_agent"),
        ("[retries]\nbase_s = 0", "retries.base_s"),
        ("[retries]\nmax_wait_s = 0", "retries.max_wait_s"),
        ("[retries]\nbudget_percent = 101", "retries.budget_percent"),
        ("[retries]\nbudget_floor = -1", "retries.budget_floor"),
        ("[retries]\nbudget_floor = 1.5", "retries.budget_floor"),
        ("[breakers]\nconsecutive = 0", "breakers.consecutive"),
        ("[breakers]\nshare = 0", "breakers.share"),
        ("[breakers]\nshare = 1.01", "breakers.share"),
        ("[breakers]\nmin_calls = 0", "breakers.min_calls"),
        ("[breakers]\nwindow_s = nan", "breakers.window_s"),
        ("[timeouts.simulator]\nconnect_s = 1", "timeouts.simulator.connect_s"),
        ("[timeouts.simulator]\nstall_s = 0", "timeouts.simulator.stall_s"),
        ("[timeouts.simulator]\nmin_events_per_s = -1", "timeouts.simulator.min_events_per_s"),
    ],
)
def test_what_the_types_refuse(text: str, key: str) -> None:
    policy, problems = read(text)
    assert policy is None
    assert [problem.key for problem in problems] == [key]


def test_all_problems_come_at_once() -> None:
    found = checked(
        """
        [models]
        use_finetuned = false
        upstream = "nowhere"
        [ab_testing]
        enabled = true
        [[caps]]
        per = "hour"
        [[caps]]
        per = "day"
        usd = "1"
        warn_at = [0.9, 0.1]
        only.agent = ["nobody", "qa_agent", "no one"]
        [[keys]]
        name = ""
        sha256 = ""
        agents = ["nobody"]
        [timeouts.nowhere]
        stall_s = 1
        [stream.agents]
        nobody = "hold"
        [retries]
        base_s = 9
        [breakers]
        open_s = 9
        max_open_s = 8
        """
    )
    assert list(found) == [
        "models.upstream", "caps[0]", "caps[1].warn_at", "caps[1].only.agent", "timeouts.nowhere",
        "stream.agents.nobody", "retries.max_wait_s", "breakers.max_open_s", "keys[0].name", "keys[0].sha256",
        "keys[0].agents",
    ]  # fmt: skip


def test_a_slack_address_is_a_secret() -> None:
    policy, _ = read('[alerting]\nslack_webhook = "https://hooks.example/T0/B0/secret"')
    assert policy is not None
    assert "secret" not in repr(policy)


def test_without_a_word_streams_are_continued_and_a_fifth_of_the_calls_may_be_retried() -> None:
    policy, _ = read("")
    assert policy is not None
    assert (policy.stream.on_cut, policy.stream.agents) == ("continue", {})
    assert (policy.retries.budget_percent, policy.retries.budget_floor) == (20.0, 3)
    assert policy.breakers.open_s <= policy.breakers.max_open_s
    assert policy.timeouts == {}


def test_the_limits_at_their_edges_are_good() -> None:
    edges = """
    [stream]
    on_cut = "error"
    agents = { qa_agent = "hold", legal_agent = "continue" }
    [retries]
    base_s = 2
    max_wait_s = 2
    budget_percent = 0
    budget_floor = 0
    [breakers]
    consecutive = 1
    share = 1
    min_calls = 1
    open_s = 3
    max_open_s = 3
    [timeouts.simulator]
    min_events_per_s = 0
    """
    assert checked(edges) == {}
