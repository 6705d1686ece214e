"""Who is calling, in the documented order; nothing is believed of a stranger, and nothing malformed is guessed at."""

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.decide.assign import hash_user
from gateway.decide.identify import MAX_USER_CHARS, Caller, Identity, find_caller, identify
from gateway.decide.plan import Plan
from gateway.domain.errors import Refused
from tests.planning import NOW_S, body_of, plan_of

PLAN = plan_of("[overrides]\nvariant = true\nfallback = true\ntimeout = true")
STRICT = plan_of("[overrides]\nvariant = false\nfallback = false\ntimeout = false")
RAW = plan_of("models.allow_raw_models = true")
LENIENT = plan_of('models.unknown_agent = "baseline"\n[ab_testing]\nenabled = true\nrollout_percentage = 100')
TRUSTED = Caller("", (), True)
STRANGER = Caller("", (), False)


def who(
    headers: dict[str, str] | None = None, caller: Caller = TRUSTED, plan: Plan = PLAN, text: str = "hello", **body: Any
) -> Identity:
    return identify(plan, headers or {}, body_of(text, **body), caller, now_s=NOW_S)


def refusal(headers: dict[str, str] | None = None, caller: Caller = TRUSTED, plan: Plan = PLAN, **body: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        who(headers, caller, plan, **body)
    return caught.value


# --- Agents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "caller", "model", "agent", "source"),
    [
        # 1. The header wins over everything.
        ({"x-gateway-agent": "legal_agent"}, TRUSTED, "qa_agent", "legal_agent", "header"),
        ({"x-gateway-agent": "legal_agent"}, TRUSTED, "auto", "legal_agent", "header"),
        ({"x-gateway-agent": "legal_agent"}, TRUSTED, "gpt-4o", "legal_agent", "header"),
        (
            {"x-gateway-agent": "legal_agent"},
            Caller("k", ("qa_agent", "legal_agent"), True),
            "x",
            "legal_agent",
            "header",
        ),
        # ... unless a stranger sent it.
        ({"x-gateway-agent": "legal_agent"}, STRANGER, "qa_agent", "qa_agent", "model"),
        # 2. The model's name.
        ({}, TRUSTED, "legal_agent", "legal_agent", "model"),
        ({}, TRUSTED, "agent/legal_agent", "legal_agent", "model"),
        ({}, STRANGER, "legal_agent", "legal_agent", "model"),
        ({}, Caller("k", ("legal_agent",), True), "legal_agent", "legal_agent", "model"),
        # 3. The key's own agent, where it has just one.
        ({}, Caller("k", ("legal_agent",), False), "gpt-4o", "legal_agent", "key"),
        ({}, Caller("k", ("legal_agent",), False), "auto", "legal_agent", "key"),
        ({"x-gateway-agent": "auto"}, Caller("k", ("legal_agent",), True), "qa_agent", "legal_agent", "key"),
        # 4. The rules.
        ({}, TRUSTED, "auto", "qa_agent", "rule"),
        ({}, TRUSTED, "gateway/auto", "qa_agent", "rule"),
        ({}, TRUSTED, "agent/auto", "qa_agent", "rule"),
        ({"x-gateway-agent": "auto"}, TRUSTED, "gpt-4o", "qa_agent", "rule"),
        ({"x-gateway-agent": "auto"}, TRUSTED, "legal_agent", "qa_agent", "rule"),
        ({"x-gateway-agent": "gateway/auto"}, TRUSTED, "legal_agent", "qa_agent", "rule"),
        ({}, Caller("k", ("legal_agent", "qa_agent"), True), "auto", "qa_agent", "rule"),
    ],
)
def test_the_agent_is_found_in_the_documented_order(
    headers: dict[str, str], caller: Caller, model: str, agent: str, source: str
) -> None:
    found = who(headers, caller, model=model)
    assert (found.agent.name, found.agent_from) == (agent, source)
    assert found.why


def test_the_rules_see_the_prompt_and_give_their_reason() -> None:
    found = who(model="auto", text="read this contract")
    assert (found.agent.name, found.rule) == ("legal_agent", "law")
    assert "speaks of law" in found.why
    assert "read this" not in found.why


@pytest.mark.parametrize("model", ["nobody", "agent/nobody", "Qa_agent", "qa_agent ", "qa_agent\n", "gpt-4o", "AUTO"])
def test_an_unknown_agent_is_refused_with_the_known_ones(model: str) -> None:
    refused = refusal(model=model)
    assert (refused.code, refused.status, refused.param) == ("model_not_found", 404, "model")
    assert "qa_agent, legal_agent" in refused.message


@pytest.mark.parametrize("model", ["<script>", "a b", "x\r\ny", "x" * 300, "é"])
def test_a_name_that_is_none_is_not_quoted_back(model: str) -> None:
    assert model not in refusal(model=model).message


def test_an_unknown_agent_gets_the_baseline_where_the_policy_says_so() -> None:
    for headers, model in (({"x-gateway-agent": "nobody"}, "qa_agent"), ({}, "gpt-9")):
        found = who(headers, plan=LENIENT, model=model, user="u1")
        assert (found.agent.name, found.agent_from) == ("qa_agent", "unknown")
        assert (found.variant, found.variant_from) == ("baseline", "unknown agent")


@pytest.mark.parametrize("named", ["a b", "a/b", "x" * 65, "a\r\nb", "é", "\x00", "ft:x"])
def test_a_header_that_names_no_agent_is_malformed(named: str) -> None:
    refused = refusal({"x-gateway-agent": named})
    assert (refused.code, refused.status, refused.param) == ("invalid_header", 400, "x-gateway-agent")
    assert who({"x-gateway-agent": named}, STRANGER).agent.name == "qa_agent"


def test_a_model_named_outright_passes_where_the_policy_lets_it() -> None:
    found = who(plan=RAW, model="openai/gpt-4o")
    assert (found.agent.name, found.agent_from) == ("raw", "raw model")
    assert found.agent.baseline[0].ref == "openai/gpt-4o"
    assert who(plan=RAW, model="qa_agent").agent_from == "model"
    assert refusal(plan=RAW, model="nowhere/gpt-4o").code == "model_not_found"
    assert refusal(model="openai/gpt-4o").code == "model_not_found"


@pytest.mark.parametrize(
    ("headers", "model", "text"),
    [({}, "legal_agent", ""), ({"x-gateway-agent": "legal_agent"}, "qa_agent", ""), ({}, "auto", "a contract"),
     ({}, "openai/gpt-4o", "")],
)  # fmt: skip
def test_a_key_opens_its_own_agents_only_however_they_are_named(headers: dict[str, str], model: str, text: str) -> None:
    caller = Caller("k", ("qa_agent", "another"), True)
    with pytest.raises(Refused) as caught:
        who(headers, caller, RAW, text, model=model)
    assert (caught.value.code, caught.value.status) == ("agent_not_allowed", 403)


# --- Users -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "caller", "body", "user"),
    [
        ({"x-gateway-user": "h"}, TRUSTED, {"safety_identifier": "s", "user": "u", "metadata": {"user_id": "m"}}, "h"),
        ({"x-gateway-user": "h"}, STRANGER, {"safety_identifier": "s", "user": "u"}, "s"),
        ({}, TRUSTED, {"safety_identifier": "s", "user": "u", "metadata": {"user_id": "m"}}, "s"),
        ({}, TRUSTED, {"safety_identifier": None, "user": "u", "metadata": {"user_id": "m"}}, "u"),
        ({}, TRUSTED, {"safety_identifier": "", "user": "", "metadata": {"user_id": "m"}}, "m"),
        ({}, TRUSTED, {"metadata": {"user_id": 5}}, ""),
        ({}, TRUSTED, {"metadata": {"user_id": ""}}, ""),
        ({}, TRUSTED, {"metadata": None}, ""),
        ({}, TRUSTED, {"prompt_cache_key": "p"}, ""),
        ({}, TRUSTED, {}, ""),
        ({}, TRUSTED, {"user": "auth0|5f7c"}, "auth0|5f7c"),
        ({}, TRUSTED, {"user": "Zoë"}, "Zoë"),
        ({}, TRUSTED, {"user": "x" * MAX_USER_CHARS}, "x" * MAX_USER_CHARS),
    ],
)
def test_the_user_is_found_in_the_documented_order(
    headers: dict[str, str], caller: Caller, body: dict[str, Any], user: str
) -> None:
    assert who(headers, caller, **body).user == user


@pytest.mark.parametrize("name", ["x-gateway-user", "x-gateway-operation"])
@pytest.mark.parametrize("value", ["a b", "a\r\nb: c", "\x00", "\x7f", "é", "x" * 129, "a,b", "\udcff", " "])
def test_ids_in_headers_are_plain_or_refused(name: str, value: str) -> None:
    refused = refusal({name: value})
    assert (refused.code, refused.status, refused.param) == ("invalid_header", 400, name)
    assert value not in refused.message or value == " "
    assert who({name: value}, STRANGER).user == ""


@pytest.mark.parametrize("value", ["a\nb", "\x00", "\x7f", "x" * (MAX_USER_CHARS + 1), "\u202eevil", "a\u2028b"])
@pytest.mark.parametrize("where", ["safety_identifier", "user", "metadata.user_id"])
def test_ids_in_the_body_are_printable_or_refused(where: str, value: str) -> None:
    field, _, inner = where.partition(".")
    refused = refusal(**{field: {inner: value} if inner else value})
    assert (refused.code, refused.status, refused.param) == ("invalid_value", 400, where)


@pytest.mark.parametrize(("body", "param"), [({"user": 5}, "user"), ({"safety_identifier": []}, "safety_identifier"),
                                             ({"metadata": "m"}, "metadata")])  # fmt: skip
def test_ids_of_the_wrong_type_are_refused(body: dict[str, Any], param: str) -> None:
    refused = refusal(**body)
    assert (refused.code, refused.param) == ("invalid_type", param)


@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_a_user_is_called_they_are_assigned_or_refused(header: str, user: str) -> None:
    plan = plan_of("[ab_testing]\nenabled = true\nrollout_percentage = 50")
    try:
        found = identify(plan, {"x-gateway-user": header}, body_of(user=user), TRUSTED, now_s=NOW_S)
    except Refused as refused:
        assert refused.status == 400  # noqa: PT017
        return
    assert plan.assign(found.agent, found.user).variant in ("finetuned", "baseline")
    assert len(hash_user(found.user, "salt")) in (0, 32)


def test_a_user_is_kept_as_a_hash_that_depends_on_the_salt() -> None:
    assert hash_user("u1", "s") == sha256(b"s.u1").hexdigest()[:32]
    assert hash_user("u1", "s") != hash_user("u1", "t")
    assert hash_user("", "s") == ""


# --- Operation and overrides -----------------------------------------------------------------------------------------


def test_the_operation_is_inference_unless_said_otherwise() -> None:
    assert who().operation == "inference"
    assert who({"x-gateway-operation": "benchmark"}).operation == "benchmark"
    assert who({"x-gateway-operation": "benchmark"}, STRANGER).operation == "inference"


def test_the_operation_of_shadow_calls_is_no_callers_since_no_cap_of_callers_counts_it() -> None:
    refused = refusal({"x-gateway-operation": "shadow"})
    assert (refused.code, refused.status, refused.param) == ("invalid_header", 400, "x-gateway-operation")
    assert who({"x-gateway-operation": "shadow"}, STRANGER).operation == "inference"
    # Any other spelling is another operation, and under every cap.
    assert who({"x-gateway-operation": "Shadow"}).operation == "Shadow"


def test_overrides_that_the_policy_allows() -> None:
    found = who({"x-gateway-variant": "finetuned", "x-gateway-fallback": "off", "x-gateway-timeout-ms": "1500"})
    assert (found.variant, found.allow_fallback, found.timeout_s) == ("finetuned", False, 1.5)
    found = who({"x-gateway-variant": "baseline", "x-gateway-fallback": "on"})
    assert (found.variant, found.allow_fallback, found.timeout_s) == ("baseline", True, None)
    found = who()
    assert (found.variant, found.allow_fallback, found.timeout_s) == (None, True, None)


@pytest.mark.parametrize(("name", "value"), [("x-gateway-variant", "finetuned"), ("x-gateway-variant", "baseline"),
                                             ("x-gateway-fallback", "off"), ("x-gateway-timeout-ms", "1")])  # fmt: skip
def test_overrides_that_the_policy_forbids_are_refused_and_a_stranger_s_are_not_even_read(
    name: str, value: str
) -> None:
    refused = refusal({name: value}, plan=STRICT)
    assert (refused.code, refused.status, refused.param) == ("override_not_allowed", 403, name)
    found = who({name: value}, STRANGER, STRICT)
    assert (found.variant, found.allow_fallback, found.timeout_s) == (None, True, None)


def test_asking_for_what_holds_anyway_is_no_override() -> None:
    assert who({"x-gateway-fallback": "on"}, plan=STRICT).allow_fallback


@pytest.mark.parametrize(
    ("name", "value"),
    [("x-gateway-variant", "Finetuned"), ("x-gateway-variant", "treatment"), ("x-gateway-variant", "baseline "),
     ("x-gateway-fallback", "false"), ("x-gateway-fallback", "OFF"), ("x-gateway-timeout-ms", "0"),
     ("x-gateway-timeout-ms", "-1"), ("x-gateway-timeout-ms", "1.5"), ("x-gateway-timeout-ms", "1e3"),
     ("x-gateway-timeout-ms", "3600001"), ("x-gateway-timeout-ms", "\u0661"), ("x-gateway-timeout-ms", "1s"),
     ("x-gateway-timeout-ms", "9" * 5_000), ("x-gateway-timeout-ms", "000000000001" + "9" * 10),
     ("x-gateway-timeout-ms", "\u00b2")],
)  # fmt: skip
def test_overrides_that_cannot_be_read_are_refused_whether_allowed_or_not(name: str, value: str) -> None:
    for plan in (PLAN, STRICT):
        refused = refusal({name: value}, plan=plan)
        assert (refused.code, refused.status, refused.param) == ("invalid_header", 400, name)


@pytest.mark.parametrize(
    ("waits", "patience_s"),
    [("600", 600.0), ("0.5", 0.5), ("600.0", 600.0), ("3600", 3_600.0), ("3601", 3_600.0), ("inf", 3_600.0),
     ("1e300", 3_600.0), ("nan", None), ("-1", None), ("0", None), ("None", None), ("", None), ("10s", None)],
)  # fmt: skip
def test_what_the_sdk_says_it_will_wait_is_a_hint(waits: str, patience_s: float | None) -> None:
    for caller in (TRUSTED, STRANGER):
        found = who({"x-stainless-read-timeout": waits}, caller, STRICT)
        assert (found.patience_s, found.timeout_s) == (patience_s, None)


def test_our_own_header_is_for_the_whole_call_and_the_sdk_s_for_each_wait() -> None:
    headers = {"x-gateway-timeout-ms": "3600000", "x-stainless-read-timeout": "5"}
    assert (who(headers).timeout_s, who(headers).patience_s) == (3_600.0, 5.0)
    assert (who(headers, STRANGER).timeout_s, who(headers, STRANGER).patience_s) == (None, 5.0)


# --- Keys ------------------------------------------------------------------------------------------------------------


def key(name: str, secret: str, more: str = "") -> str:
    return f'[[keys]]\nname = "{name}"\nsha256 = "{sha256(secret.encode()).hexdigest()}"\n{more}\n'


KEYED = plan_of(key("a", "sk-a") + key("b", "sk-b", 'agents = ["qa_agent"]\ntrusted = false') + key("c", "clé"))


@pytest.mark.parametrize(
    ("authorization", "caller"),
    [
        ("Bearer sk-a", Caller("a", (), True)),
        ("bearer sk-a", Caller("a", (), True)),
        ("BEARER  sk-a ", Caller("a", (), True)),
        ("Bearer sk-b", Caller("b", ("qa_agent",), False)),
        ("Bearer clé", Caller("c", (), True)),
    ],
)
def test_a_key_opens(authorization: str, caller: Caller) -> None:
    for is_loopback in (True, False):
        assert find_caller(KEYED, {"Authorization": authorization}, is_loopback=is_loopback) == caller


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer ", "Bearer sk-A", "Bearer sk-", "Bearer sk-ab", "Basic sk-a", "sk-a", "Bearer: sk-a",
     "Bearer sk-a sk-a", "Bearer\tsk-a", "Bearer " + sha256(b"sk-a").hexdigest(), "Bearer \udcff",
     "Bearer " + "x" * 9_000],
)  # fmt: skip
def test_anything_else_does_not_and_is_not_quoted(authorization: str) -> None:
    with pytest.raises(Refused) as caught:
        find_caller(KEYED, {"Authorization": authorization}, is_loopback=True)
    refused = caught.value
    assert (refused.code, refused.status) == ("invalid_api_key", 401)
    assert refused.headers == {"WWW-Authenticate": "Bearer"}
    assert "sk-" not in refused.message


def test_without_keys_only_the_own_machine_is_trusted() -> None:
    for authorization in ("", "Bearer whatever-the-sdk-sends"):
        assert find_caller(PLAN, {"Authorization": authorization}, is_loopback=True) == Caller("", (), True)
        assert find_caller(PLAN, {"Authorization": authorization}, is_loopback=False) == Caller("", (), False)


def test_every_key_is_compared_so_that_no_position_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(left: str, right: str) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("gateway.decide.identify.compare_digest", compare)
    find_caller(KEYED, {"Authorization": "Bearer sk-a"}, is_loopback=True)
    assert compared == [each.sha256 for each in KEYED.keys]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", ""])
def test_a_web_page_is_refused_while_there_are_no_keys(origin: str) -> None:
    with pytest.raises(Refused) as caught:
        find_caller(PLAN, {"Origin": origin}, is_loopback=True)
    assert (caught.value.code, caught.value.status) == ("origin_not_allowed", 403)
    assert find_caller(KEYED, {"Origin": origin, "Authorization": "Bearer sk-a"}, is_loopback=True).key == "a"
