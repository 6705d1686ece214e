"""Every failure has one shape, the one OpenAI's SDKs parse, and a code that the table knows."""

import json

import pytest

from gateway.domain.errors import CODES, FaultKind, GatewayError, Refused, UpstreamFault


@pytest.mark.parametrize("code", CODES)
def test_each_code_encodes_to_the_openai_shape(code: str) -> None:
    error = Refused(code, "why", param="model")
    assert json.loads(error.encode()) == {
        "error": {"message": "why", "type": CODES[code].type, "param": "model", "code": code}
    }
    assert error.status == CODES[code].status
    assert 400 <= error.status <= 599


def test_statuses_and_types_agree() -> None:
    for code, row in CODES.items():
        if row.status >= 500:
            assert row.type == "server_error", code
        elif row.status != 429:
            assert row.type == "invalid_request_error", code
        assert row.meaning.endswith("."), code


def test_param_is_null_where_no_field_is_to_blame() -> None:
    assert json.loads(Refused("invalid_json", "no").encode())["error"]["param"] is None


def test_a_code_outside_the_table_needs_a_status_and_a_type_of_its_own() -> None:
    with pytest.raises(AssertionError, match="BUG"):
        Refused("no_such_code", "x")
    with pytest.raises(AssertionError, match="BUG"):
        UpstreamFault(FaultKind.SERVER, "3051", "x", status=503)
    fault = UpstreamFault(FaultKind.SERVER, "3051", "x", status=503, type="server_error")
    assert (fault.code, fault.status, fault.kind) == ("3051", 503, FaultKind.SERVER)


def test_a_provider_may_bring_its_own_status_to_a_known_code() -> None:
    fault = UpstreamFault(FaultKind.NOT_FOUND, "model_not_found", "retired", status=410)
    assert (fault.status, fault.type) == (410, "invalid_request_error")


def test_both_halves_are_one_family_and_keep_their_text() -> None:
    for error in (Refused("draining", "m"), UpstreamFault(FaultKind.CUT, "upstream_cut", "m")):
        assert isinstance(error, GatewayError)
        assert str(error) == error.message == "m"
        assert error.headers == {}


def test_text_of_any_script_survives() -> None:
    text = 'say "no" – ' + chr(0x1F642) + "\n\x00"
    assert json.loads(Refused("bad_request", text).encode())["error"]["message"] == text
