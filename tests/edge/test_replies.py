"""The one shape of every error, and headers that hold what headers may."""

import msgspec
import pytest

from gateway.domain.errors import CODES, FaultKind, Refused, UpstreamFault
from gateway.edge.replies import SERVER_NAME, error_reply, header_text


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_status_and_openais_shape(code: str) -> None:
    reply = error_reply(Refused(code, "why", param="model", headers={"Retry-After": "3"}), {"x-request-id": "req-1"})
    assert reply.status == CODES[code].status
    assert reply.content_type == "application/json"
    assert reply.headers["Server"] == SERVER_NAME
    assert reply.headers["Retry-After"] == "3"
    assert reply.headers["x-request-id"] == "req-1"
    assert isinstance(reply.body, bytes)
    error = {"message": "why", "type": CODES[code].type, "param": "model", "code": code}
    assert msgspec.json.decode(reply.body) == {"error": error}


def test_a_providers_own_code_and_status_go_through() -> None:
    fault = UpstreamFault(FaultKind.REJECTED, "content_filter", "no", status=400, type="invalid_request_error")
    reply = error_reply(fault)
    assert reply.status == 400
    assert isinstance(reply.body, bytes)
    assert msgspec.json.decode(reply.body)["error"]["code"] == "content_filter"


def test_the_errors_own_headers_win_over_the_calls() -> None:
    reply = error_reply(Refused("overloaded", "later", headers={"Retry-After": "9"}), {"Retry-After": "1"})
    assert reply.headers.getall("Retry-After") == ["9"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with: punctuation; and ~", "plain, with: punctuation; and ~"),
        ("a\r\nX-Evil: 1", "a??X-Evil: 1"),
        ("tab\tNUL\0DEL\x7fESC\x1b", "tab?NUL?DEL?ESC?"),
        ("ü–漢\U0001f600", "????"),
        ("\u0085\u2028\udcff", "???"),
        ("", ""),
    ],
)
def test_what_goes_into_a_header_is_printable_ascii(text: str, shown: str) -> None:
    assert header_text(text) == shown
    assert header_text(text).isascii()
