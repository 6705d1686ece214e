"""What a stranger may send to the data listener as JSON, path, method or key, and the answer each gets."""

from hashlib import sha256
from pathlib import Path

import pytest

from gateway.domain.errors import CODES
from tests.raw_http import CANARY, check_ordinary, check_refusal, check_silence, connected, ordinary, request
from tests.running import running_gateway

canary = CANARY.decode()


def field(name: str, value: str) -> bytes:
    """A good request with one more field, its JSON written by hand."""
    return b'{"model":"qa_agent","messages":[{"role":"user","content":"hi"}],"%b":%b}' % (name.encode(), value.encode())


def messages(value: str, model: str = "qa_agent") -> bytes:
    return b'{"model":"%b","messages":%b}' % (model.encode(), value.encode())


def content(value: str, model: str = "qa_agent") -> bytes:
    return messages('[{"role":"user","content":' + value + "}]", model)


NOT_JSON = {
    "nothing": b"",
    "words": CANARY,
    "null": b"null",
    "an array": b"[]",
    "a bare string": b'"%b"' % CANARY,
    "a number": b"1",
    "cut short": ordinary(canary)[:-1],
    "followed by more": ordinary(canary) + CANARY,
    "two objects": ordinary() + ordinary(),
    "a byte order mark": b"\xef\xbb\xbf" + ordinary(),
    "UTF-16": ordinary().decode().encode("utf-16"),
    "not UTF-8": content('"\xff"').decode().encode("latin-1"),
    "an overlong UTF-8 slash": content('"~"').replace(b"~", b"\xc0\xaf"),
    "a surrogate in UTF-8": content('"~"').replace(b"~", b"\xed\xa0\x80"),
    "NaN as a known field": field("temperature", "NaN"),
    "NaN as a field we do not read": field("vendor_extra", "NaN"),
    "Infinity, deep inside": field("vendor_extra", '{"a":[-Infinity]}'),
    "100,000 arrays": field("vendor_extra", "[" * 100_000 + "]" * 100_000),
    "100,000 objects": field("vendor_extra", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "100,000 arrays, never closed": b'{"a":' + b"[" * 100_000,
    "100,000 arrays as the messages": messages("[" * 100_000 + "]" * 100_000),
    "100,000 arrays as a content": content("[" * 100_000 + "]" * 100_000, "auto"),
    "a lone surrogate as the content": content(r'"\ud800"'),
    "a lone surrogate where it is read": content(r'"\ud800"', "auto"),
    "a lone low surrogate": content(r'"\udc00 "', "auto"),
    "a lone surrogate as the model": ordinary(model="~").replace(b"~", rb"\ud800"),
    "a lone surrogate as the user": field("user", r'"\ud800 "'),
    "a lone surrogate as a key": field(r"\ud800 ", "1"),
    "an unknown escape": content(r'"\q"'),
    "a bare control character": content('"a\x01b"'),
    "a bare newline": content('"a\nb"', "auto"),
    "a comment": b"/* */" + ordinary(),
    "a trailing comma": field("seed", "1,"),
    "single quotes": b"{'model':'qa_agent'}",
}

WRONG_FIELDS = {
    "no model": (b'{"messages":[{"role":"user","content":"hi"}]}', "missing_field", "model"),
    "an empty model": (ordinary(model=""), "missing_field", "model"),
    "a null model": (messages("[]", "~").replace(b'"~"', b"null"), "invalid_type", "model"),
    "a numeric model": (messages("[]", "~").replace(b'"~"', b"7"), "invalid_type", "model"),
    "no messages": (b'{"model":"qa_agent"}', "missing_field", "messages"),
    "empty messages": (messages("[]"), "invalid_value", "messages"),
    "messages as a string": (messages(f'"{canary}"'), "invalid_type", "messages"),
    "a message as a string": (messages(f'["{canary}"]'), "invalid_type", "messages"),
    "a message without a role": (messages(f'[{{"content":"{canary}"}}]'), "invalid_type", "messages"),
    "a content of the wrong type": (content("3", "auto"), "invalid_type", "messages[0].content"),
    "a part that is a string": (content(f'["{canary}"]', "auto"), "invalid_type", "messages[0].content"),
    "stream as a string": (field("stream", '"true"'), "invalid_type", "stream"),
    "stream_options as a list": (field("stream_options", "[]"), "invalid_type", "stream_options"),
    "max_tokens as a float": (field("max_tokens", "1.5"), "invalid_type", "max_tokens"),
    "max_tokens as a boolean": (field("max_tokens", "true"), "invalid_type", "max_tokens"),
    "no tokens": (field("max_tokens", "0"), "invalid_value", "max_tokens"),
    "fewer than no tokens": (field("max_completion_tokens", "-5"), "invalid_value", "max_completion_tokens"),
    "tokens beyond 64 bits": (field("max_tokens", "9" * 5_000), "invalid_type", "max_tokens"),
    "n of nought": (field("n", "0"), "invalid_value", "n"),
    "n above the policy's": (field("n", "9"), "invalid_value", "n"),
    "a temperature beyond floats": (field("temperature", "1e999"), "invalid_type", "temperature"),
    "a user that is a number": (field("user", "3"), "invalid_type", "user"),
    "a user with a line feed": (field("user", rf'"{canary}\n"'), "invalid_value", "user"),
    "a user of 513 characters": (field("user", f'"{"u" * 513}"'), "invalid_value", "user"),
    "metadata as a list": (field("metadata", "[1]"), "invalid_type", "metadata"),
}


async def test_what_is_not_one_json_object_is_told_so_and_the_connection_lives_on(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for name, body in NOT_JSON.items():
            connection.send(request(body=body))
            reply = await connection.reply()
            check_refusal(reply, 400, "invalid_json", param=reply.json()["error"]["param"])
            assert reply.headers["x-request-id"].startswith("req-"), name
        assert not gateway.simulator.calls
        await check_ordinary(connection)


async def test_a_wrong_field_is_named_in_param(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for name, (body, code, param) in WRONG_FIELDS.items():
            connection.send(request(body=body))
            reply = await connection.reply()
            assert reply.status == CODES[code].status, (name, reply)
            check_refusal(reply, CODES[code].status, code, param=param)
        assert not gateway.simulator.calls
        await check_ordinary(connection)


async def test_of_a_key_given_twice_the_one_that_was_decided_on_is_sent_and_sent_once(tmp_path: Path) -> None:
    twice = rb'{"model":"legal","mod\u0065l":"qa_agent","messages":[],"messages":[{"role":"user","content":"hi"}]}'
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(body=twice))
        assert (await connection.reply()).status == 200
        seen = gateway.simulator.last_request
        assert seen is not None
        assert seen.body["model"] == "simulator-small"
        assert len(seen.body["messages"]) == 1
        assert gateway.simulator.calls == {"simulator-small": 1}


async def test_unknown_models_are_refused_with_the_names_that_exist(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        # A name of plain characters is told back, as it helps; anything else is not.
        for model, is_told in (("gpt-4o", True), (f"<script>{canary}", False), (f"{canary}\r\nx: y", False)):
            connection.send(request(body=ordinary(model=model)))
            message = check_refusal(await connection.reply(), 404, "model_not_found", param="model")
            assert "known: auto, qa_agent, support_agent" in message
            assert (model in message) is is_told
        await check_ordinary(connection)


METHODS_AND_PATHS = [
    ("GET", "/v1/chat/completions", 405, "POST"),
    ("PUT", "/v1/chat/completions", 405, "POST"),
    ("DELETE", "/v1/chat/completions", 405, "POST"),
    ("PATCH", "/v1/chat/completions", 405, "POST"),
    ("OPTIONS", "/v1/chat/completions", 405, "POST"),
    ("TRACE", "/v1/chat/completions", 405, "POST"),
    ("PROPFIND", "/v1/chat/completions", 405, "POST"),
    ("GET", f"/v1/chat/completions?{canary}", 405, "POST"),
    ("POST", "/v1/models", 405, "GET, HEAD"),
    ("DELETE", "/v1/models/qa_agent", 405, "GET, HEAD"),
    ("POST", f"/v1/models/{canary}/a:b", 405, "GET, HEAD"),
    ("GET", "/", 404, None),
    ("GET", "/v1", 404, None),
    ("GET", "/v1/", 404, None),
    ("GET", f"/{canary}", 404, None),
    ("GET", f"/%00{canary}%0d%0aX-Evil:%201", 404, None),
    ("GET", f"/v1/models/%0a{canary}", 404, None),
    ("POST", "/v1/chat/completions/", 404, None),
    ("POST", "//v1/chat/completions", 404, None),
    ("POST", "/v1/../v1/chat%2fcompletions", 404, None),
    ("GET", "/v1/../livez", 404, None),
    ("GET", "/metrics", 404, None),
    ("GET", "/admin/config", 404, None),
    ("GET", f"http://{canary}.example/", 404, None),
    ("POST", f"http://{canary}.example/metrics", 404, None),
    ("OPTIONS", "*", 404, None),
    ("CONNECT", f"{canary}.example:443", 404, None),
    ("CONNECT", "/v1/models", 404, None),
]


@pytest.mark.parametrize(("method", "target", "status", "allow"), METHODS_AND_PATHS)
async def test_methods_and_paths_that_are_not_served(
    tmp_path: Path, method: str, target: str, status: int, allow: str | None
) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(method, target, headers=b"X-Trace: " + CANARY + b"\r\n"))
        reply = await connection.reply()
        check_refusal(reply, status, "not_found" if status == 404 else "method_not_allowed")
        assert reply.headers.get("allow") == allow
        assert not gateway.simulator.calls
        await check_ordinary(connection)


async def test_head_is_answered_without_a_body(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for target, status in (("/v1/models", 200), ("/v1/chat/completions", 405), (f"/{canary}", 404)):
            connection.send(request("HEAD", target))
            reply = await connection.reply(to_head=True)
            assert reply.status == status
            check_silence(reply.head)
        # Had a body come, it would stand here in the place of a status line.
        await check_ordinary(connection)


async def test_an_absolute_target_is_the_same_as_its_path(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request("POST", f"http://{canary}.example/v1/chat/completions", body=ordinary()))
        reply = await connection.reply()
        assert reply.status == 200
        seen = gateway.simulator.last_request
        assert seen is not None
        assert canary not in str(seen.headers)


async def test_a_body_sent_to_a_path_that_does_not_exist_is_not_taken_for_a_request(tmp_path: Path) -> None:
    inner = request("GET", "/v1/models")
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request("POST", "/nowhere", body=inner))
        check_refusal(await connection.reply(), 404, "not_found")
        await check_ordinary(connection)


async def test_a_method_that_does_not_exist_is_bad_http(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request("cAnArY", "/"))
            check_refusal(await connection.reply(), 400, "bad_request")
            assert await connection.rest() == b""
        async with connected(gateway.data_url) as connection:
            await check_ordinary(connection)


# --- Identity headers ------------------------------------------------------------------------------------------------

BAD_IDS = {
    "a space": b"a b",
    "a comma": b"a,b",
    "an angle bracket": b"<" + CANARY + b">",
    "129 characters": b"u" * 129,
    "bytes that are no UTF-8": CANARY + b"\xff\xfe",
    "letters beyond ASCII": "ü".encode(),
    "a tab inside": b"a\tb",
    "a full-width digit": "１".encode(),
    "an escaped line break": b"a%0d%0ab\\r\\n",
}
ID_HEADERS = ("x-gateway-user", "x-gateway-operation", "x-gateway-agent")


@pytest.mark.parametrize("header", ID_HEADERS)
async def test_ids_outside_their_alphabet_are_refused(tmp_path: Path, header: str) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        for value in BAD_IDS.values():
            connection.send(request(headers=header.encode() + b": " + value + b"\r\n", body=ordinary()))
            check_refusal(await connection.reply(), 400, "invalid_header", param=header)
        assert not gateway.simulator.calls
        await check_ordinary(connection)


@pytest.mark.parametrize(
    "breaking", [b"a\rX-Gateway-Variant: finetuned", b"a\nX-Evil: 1", b"a\0b", b"a\x7fb", b"a\x0bb"]
)
async def test_line_breaks_and_controls_in_ids_never_pass(tmp_path: Path, breaking: bytes) -> None:
    async with running_gateway(tmp_path) as gateway:
        async with connected(gateway.data_url) as connection:
            connection.send(request(headers=b"x-gateway-user: " + CANARY + breaking + b"\r\n", body=ordinary()))
            reply = await connection.reply()
            assert reply.status == 400
            check_silence(reply.head + reply.body)
        assert not gateway.simulator.calls
        async with connected(gateway.data_url) as connection:
            await check_ordinary(connection)


async def test_an_id_of_128_characters_of_the_whole_alphabet_passes(tmp_path: Path) -> None:
    user = b"AZaz09._:@/-" + b"u" * 116
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"x-gateway-user: " + user + b"\r\n", body=ordinary()))
        assert (await connection.reply()).status == 200
        (record,) = gateway.journal()
        assert len(record.user) == 32
        assert user.decode() not in str(record)


async def test_bytes_beyond_utf8_in_other_headers_harm_nothing(tmp_path: Path) -> None:
    odd = b"X-Odd: \xff\xfe\x80\r\nUser-Agent: \xc3\r\nCookie: \xa0=1\r\nAuthorization: Bearer \xff\r\n"
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=odd, body=ordinary(model="auto")))
        assert (await connection.reply()).status == 200
        seen = gateway.simulator.last_request
        assert seen is not None
        assert not {"x-odd", "cookie", "authorization"} & set(seen.headers)


@pytest.mark.parametrize("header", [b"traceparent", b"tracestate", b"baggage"])
async def test_bytes_beyond_utf8_in_a_header_that_goes_on_break_nothing(tmp_path: Path, header: bytes) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=header + b": \xff\xfe\r\n", body=ordinary()))
        assert (await connection.reply()).status == 200


@pytest.mark.parametrize("seconds", [b"nan", b"inf", b"-inf", b"-1", b"0", b"1e400", b"x", b"0x10", b"1_0"])
async def test_an_absurd_read_timeout_of_the_sdk_breaks_nothing(tmp_path: Path, seconds: bytes) -> None:
    async with running_gateway(tmp_path) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=b"x-stainless-read-timeout: " + seconds + b"\r\n", body=ordinary()))
        assert (await connection.reply()).status in (200, 504)
        await check_ordinary(connection)


# --- Keys ------------------------------------------------------------------------------------------------------------

KEY, NARROW_KEY = "gw-right-key-7d1f", "gw-narrow-key-93ab"
KEYS = f"""
[models]
use_finetuned = false

[[keys]]
name   = "app"
sha256 = "{sha256(KEY.encode()).hexdigest()}"

[[keys]]
name   = "narrow"
sha256 = "{sha256(NARROW_KEY.encode()).hexdigest()}"
agents = ["support_agent"]
"""


def bearer(key: str, scheme: str = "Bearer") -> bytes:
    return f"Authorization: {scheme} {key}\r\n".encode()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"Authorization:\r\n",
        b"Authorization: Bearer\r\n",
        b"Authorization: Bearer \r\n",
        bearer(canary),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(KEY.upper()),
        bearer(KEY, "Basic"),
        bearer(f"{KEY}, Bearer {KEY}"),
        bearer(sha256(KEY.encode()).hexdigest()),
        b"Authorization: Bearer \xff\xfe" + CANARY + b"\r\n",
        f"api-key: {KEY}\r\n".encode(),
        f"Authorization: {KEY}\r\n".encode(),
    ],
)
async def test_without_the_right_key_nothing_is_served(tmp_path: Path, header: bytes) -> None:
    async with running_gateway(tmp_path, policy=KEYS) as gateway, connected(gateway.data_url) as connection:
        asked = [
            request(headers=header, body=ordinary()),
            request("GET", "/v1/models", headers=header),
            request("GET", "/v1/models/qa_agent", headers=header),
        ]
        for one in asked:
            connection.send(one)
            reply = await connection.reply()
            check_refusal(reply, 401, "invalid_api_key")
            assert KEY.encode() not in reply.head + reply.body
            assert reply.headers["www-authenticate"] == "Bearer"
        assert not gateway.simulator.calls
        assert not gateway.journal()
        connection.send(request(headers=bearer(KEY), body=ordinary()))
        assert (await connection.reply()).status == 200


async def test_a_key_opens_the_agents_it_names_and_no_others(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=KEYS) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=bearer(NARROW_KEY), body=ordinary(model="qa_agent")))
        check_refusal(await connection.reply(), 403, "agent_not_allowed", param="model")
        # Not by another door either.
        connection.send(
            request(headers=bearer(NARROW_KEY) + b"x-gateway-agent: qa_agent\r\n", body=ordinary(model="x"))
        )
        check_refusal(await connection.reply(), 403, "agent_not_allowed", param="model")
        # The router need not choose for one that has no choice.
        for header, model in (
            (bearer(NARROW_KEY, "bearer"), "support_agent"),
            (bearer(NARROW_KEY), "anything"),
            (bearer(NARROW_KEY), "auto"),
        ):
            connection.send(request(headers=header, body=ordinary(model=model)))
            reply = await connection.reply()
            assert (reply.status, reply.headers["x-gateway-agent"]) == (200, "support_agent")
        assert {record.key for record in gateway.journal()} == {"narrow"}


async def test_the_callers_key_goes_no_further(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, policy=KEYS) as gateway, connected(gateway.data_url) as connection:
        connection.send(request(headers=bearer(KEY), body=ordinary()))
        reply = await connection.reply()
        seen = gateway.simulator.last_request
        assert seen is not None
        everything = reply.head + reply.body + repr(seen.headers).encode() + gateway.runtime.journal.path.read_bytes()
        assert KEY.encode() not in everything
        assert sha256(KEY.encode()).hexdigest().encode() not in everything
