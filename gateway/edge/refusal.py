"""The fault behind what a provider said: a status other than 200, or an error object in the place of an answer."""

import email.utils
import time
from collections.abc import Mapping

from gateway.decide.fallback import kind_of_refusal
from gateway.domain.errors import FaultKind, UpstreamFault
from gateway.domain.wire import read_answer
from gateway.edge.upstream import Exchange

# Of a provider's refusal, these go on to the caller: the SDKs pace themselves by them.
_PASSED_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
_RATE_LIMIT_PREFIX = "x-ratelimit-"
_CODES = {FaultKind.NOT_FOUND: "model_not_found"}


def refusal(exchange: Exchange, body: bytes) -> UpstreamFault:
    """The fault behind a status other than 200."""
    status = exchange.status
    said = exchange.read_error(body)
    kind = kind_of_refusal(status, said)
    if kind is FaultKind.AUTH:
        # The provider's words here may quote our key, in part.
        return UpstreamFault(kind, "upstream_auth", "the provider refused the gateway's own key")
    if kind is FaultKind.INVALID:
        return UpstreamFault(kind, "upstream_invalid", f"the provider answered {status}, which is no answer")
    passed = {name: exchange.headers.get(name, "") for name in _PASSED_HEADERS}
    return UpstreamFault(
        kind,
        said.code or _CODES.get(kind, "upstream_error"),
        said.message,
        status=status,
        type=said.type or ("invalid_request_error" if status < 500 and status != 429 else "server_error"),
        param=said.param,
        headers={
            **{name: value for name, value in passed.items() if value and value.isprintable()},
            **rate_limit_headers(exchange.headers),
        },
        retry_after_s=retry_after_s(exchange.headers, time.time()),
    )


def error_in_answer(exchange: Exchange, data: bytes) -> UpstreamFault:
    """The fault behind an error object that came under status 200."""
    said = exchange.read_error(data)
    code = said.code or "upstream_error"
    return UpstreamFault(FaultKind.SERVER, code, said.message, status=502, type=said.type or "server_error")


def no_stream(exchange: Exchange, body: bytes) -> UpstreamFault:
    """The fault behind a body of another type where a stream was asked for."""
    answer = read_answer(body)
    if answer is not None and answer.has_error:
        return error_in_answer(exchange, body)
    return UpstreamFault(FaultKind.INVALID, "upstream_invalid", "the provider did not answer with a stream")


def rate_limit_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The provider's rate-limit headers, for SDKs that pace themselves."""
    return {
        name: value
        for name, value in headers.items()
        if name.lower().startswith(_RATE_LIMIT_PREFIX) and value.isprintable()
    }


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """What the provider asks to be left alone for: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    milliseconds, said = _number(headers.get("retry-after-ms", "")), headers.get("Retry-After", "")
    if milliseconds is not None:
        return milliseconds / 1000
    seconds = _number(said)
    return _until(said, now_s) if seconds is None else seconds


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None


def _until(date: str, now_s: float) -> float | None:
    try:
        return max(0.0, email.utils.parsedate_to_datetime(date).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
