"""What a provider's refusal means to us, and what of it goes on to the caller."""

from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from gateway.domain.errors import FaultKind
from gateway.domain.provider_error import ProviderError, read_error
from gateway.edge.refusal import error_in_answer, no_stream, rate_limit_headers, refusal, retry_after_s
from tests.scripted import completion, error_body

NOW_S = 1_763_700_000.0


class Said:
    """An exchange of which only the head is wanted here."""

    def __init__(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.status = status
        self.headers: Mapping[str, str] = CIMultiDict(headers or {})

    async def read(self) -> bytes:
        raise AssertionError("the body is handed over")

    def read_error(self, body: bytes) -> ProviderError:
        return read_error(self.status, body)

    def chunks(self) -> AsyncIterator[bytes]:
        raise AssertionError("the body is handed over")

    def close(self) -> None: ...


def as_json(value: Any) -> bytes:
    return msgspec.json.encode(value)


# --- A status other than 200 ------------------------------------------------------------------------------------------


def test_the_providers_words_code_and_param_go_on() -> None:
    body = error_body("No such field.", type="invalid_request_error", code="unknown_parameter", param="x")
    fault = refusal(Said(400), as_json(body))
    assert fault.kind is FaultKind.REJECTED
    assert fault.status == 400
    assert fault.body() == body


@pytest.mark.parametrize(
    "status, body, kind, type, code",
    [
        (500, b"", FaultKind.SERVER, "server_error", "upstream_error"),
        (503, b"<html>", FaultKind.SERVER, "server_error", "upstream_error"),
        (529, b"{}", FaultKind.SERVER, "server_error", "upstream_error"),
        (429, b"", FaultKind.RATE_LIMITED, "server_error", "upstream_error"),
        (404, b"", FaultKind.NOT_FOUND, "invalid_request_error", "model_not_found"),
        (402, b"", FaultKind.QUOTA, "invalid_request_error", "upstream_error"),
        (408, b"", FaultKind.FIRST_BYTE, "invalid_request_error", "upstream_error"),
        (413, b"", FaultKind.CONTEXT_LENGTH, "invalid_request_error", "upstream_error"),
        (418, b"", FaultKind.REJECTED, "invalid_request_error", "upstream_error"),
    ],
)
def test_where_the_provider_says_nothing_the_status_speaks(
    status: int, body: bytes, kind: FaultKind, type: str, code: str
) -> None:
    fault = refusal(Said(status), body)
    assert (fault.kind, fault.status, fault.type, fault.code) == (kind, status, type, code)
    assert "html" not in fault.message


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_said_of_our_key_stays_here(status: int) -> None:
    fault = refusal(Said(status, {"Retry-After": "5"}), as_json(error_body("Incorrect API key: sk-12***78")))
    assert (fault.kind, fault.status, fault.code) == (FaultKind.AUTH, 502, "upstream_auth")
    assert "sk-" not in fault.message
    assert not fault.headers


@pytest.mark.parametrize("status", [201, 204, 302, 304, 399])
def test_a_status_that_is_neither_an_answer_nor_an_error_is_invalid(status: int) -> None:
    fault = refusal(Said(status, {"Location": "http://elsewhere"}), as_json(completion()))
    assert (fault.kind, fault.status, fault.code) == (FaultKind.INVALID, 502, "upstream_invalid")
    assert "elsewhere" not in fault.message


def test_of_the_headers_only_those_go_on_by_which_callers_pace_themselves() -> None:
    passed = {"retry-after": "3", "retry-after-ms": "3000", "x-should-retry": "true", "X-RateLimit-Limit": "9"}
    fault = refusal(Said(429, {**passed, "Set-Cookie": "a=b", "Server": "x", "Content-Length": "0"}), b"")
    assert fault.headers == passed
    assert fault.retry_after_s == 3


def test_headers_that_are_no_text_are_left_out() -> None:
    fault = refusal(Said(429, {"Retry-After": "\udcff", "x-ratelimit-reset": "\x07", "x-should-retry": "a\tb"}), b"")
    assert not fault.headers
    assert fault.retry_after_s is None


# --- An error under 200 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_code, code", [("engine_failure", "engine_failure"), (None, "upstream_error")])
def test_an_error_in_the_place_of_an_answer_is_the_providers_failure(given_code: str | None, code: str) -> None:
    fault = error_in_answer(Said(200), as_json(error_body("It fell over.", code=given_code)))
    assert (fault.kind, fault.status, fault.type) == (FaultKind.SERVER, 502, "server_error")
    assert (fault.code, fault.message) == (code, "It fell over.")


@pytest.mark.parametrize("error", ['"it broke"', "7", "[]", "{}", '{"message": null}'])
def test_an_error_of_any_shape_is_one(error: str) -> None:
    fault = error_in_answer(Said(200), f'{{"error": {error}}}'.encode())
    assert (fault.kind, fault.code) == (FaultKind.SERVER, "upstream_error")
    assert fault.message


def test_a_plain_body_where_a_stream_was_asked_for_is_told_by_what_it_holds() -> None:
    assert no_stream(Said(200), as_json(completion())).kind is FaultKind.INVALID
    assert no_stream(Said(200), b"<html>").kind is FaultKind.INVALID
    fault = no_stream(Said(200), as_json(error_body("It fell over.")))
    assert (fault.kind, fault.message) == (FaultKind.SERVER, "It fell over.")


# --- Retry-After ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, found",
    [
        ({}, None),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": " 2 "}, 2.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "1e999"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "2 minutes"}, None),
        ({"Retry-After": "²"}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"retry-after-ms": "-250"}, None),
        ({"retry-after-ms": "inf"}, None),
        # The finer one counts where both are there, as in the SDKs, and the other where the finer one is nonsense.
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9.0),
        ({"Retry-After": formatdate(NOW_S + 30, usegmt=True)}, 30.0),
        ({"Retry-After": formatdate(NOW_S, usegmt=True)}, 0.0),
        ({"Retry-After": formatdate(NOW_S - 3600, usegmt=True)}, 0.0),
        ({"Retry-After": "Friday, 21-Nov-25 04:40:10 GMT"}, 10.0),
        ({"Retry-After": "Fri, 99 Nov 2026 04:40:00 GMT"}, None),
        ({"Retry-After": "Fri, 21 Nov 9999999 04:40:00 GMT"}, None),
    ],
)
def test_what_a_provider_asks_to_be_left_alone_for(headers: dict[str, str], found: float | None) -> None:
    assert retry_after_s(CIMultiDict(headers), NOW_S) == found


@given(st.sampled_from(["Retry-After", "retry-after-ms"]), st.text(max_size=40))
def test_no_text_in_its_place_does_harm(name: str, value: str) -> None:
    found = retry_after_s(CIMultiDict({name: value}), NOW_S)
    assert found is None or 0 <= found < float("inf")


# --- Rate limits ------------------------------------------------------------------------------------------------------


def test_rate_limits_go_on_as_they_came_and_nothing_else() -> None:
    limits = {"x-ratelimit-limit-requests": "60", "X-RateLimit-Reset-Tokens": "6m0s", "x-ratelimit-remaining": ""}
    others = {"x-request-id": "r", "ratelimit": "x", "xx-ratelimit-a": "1", "x-ratelimit-bad": "a\x00b"}
    assert rate_limit_headers(CIMultiDict({**limits, **others})) == limits
