"""Every failure a caller may see: its status, its type, its code.

`GatewayError` is abstract and has two halves, as in any protocol: `Refused`, our own doing or the caller's, and
`UpstreamFault`, the provider's. Its message is safe to show by construction: it is written here or taken from the
provider's own error text. Anything else that is raised never reaches a caller; it becomes a bare `internal_error`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec


class ErrorCode(NamedTuple):
    """One row of the table of errors: what HTTP says, what the OpenAI SDKs see, and when it happens."""

    status: int
    type: str
    meaning: str


# `insufficient_quota` and `rate_limit_error` are the types the OpenAI SDKs and frameworks already know.
CODES: Mapping[str, ErrorCode] = {
    # The request as HTTP.
    "bad_request": ErrorCode(400, "invalid_request_error", "The bytes received are not valid HTTP."),
    "request_timeout": ErrorCode(408, "invalid_request_error", "The head or the body did not arrive in time."),
    "not_found": ErrorCode(404, "invalid_request_error", "There is no such path."),
    "method_not_allowed": ErrorCode(405, "invalid_request_error", "The path exists, the method does not."),
    "unsupported_expectation": ErrorCode(417, "invalid_request_error", "`Expect` holds more than 100-continue."),
    "unsupported_encoding": ErrorCode(415, "invalid_request_error", "A request body with `Content-Encoding`."),
    "body_too_large": ErrorCode(413, "invalid_request_error", "The body is over `server.max_body_bytes`."),
    "incomplete_body": ErrorCode(400, "invalid_request_error", "The body ended early or its framing is broken."),
    # The request as JSON.
    "invalid_json": ErrorCode(400, "invalid_request_error", "The body is not one valid JSON object in UTF-8."),
    "invalid_type": ErrorCode(400, "invalid_request_error", "A field has the wrong type; `param` names it."),
    "invalid_value": ErrorCode(400, "invalid_request_error", "A field is outside its range; `param` names it."),
    "missing_field": ErrorCode(400, "invalid_request_error", "A required field is absent; `param` names it."),
    "invalid_header": ErrorCode(400, "invalid_request_error", "An `x-gateway-*` header holds what it may not."),
    # Who asks, and for what.
    "invalid_api_key": ErrorCode(401, "invalid_request_error", "The policy wants a key; none or a wrong one came."),
    "origin_not_allowed": ErrorCode(403, "invalid_request_error", "A web page asks, and the policy has no keys."),
    "agent_not_allowed": ErrorCode(403, "invalid_request_error", "The key may not use this agent."),
    "override_not_allowed": ErrorCode(403, "invalid_request_error", "The policy forbids this `x-gateway-*` override."),
    "model_not_found": ErrorCode(404, "invalid_request_error", "Neither an agent nor a model the policy lets pass."),
    "call_not_found": ErrorCode(404, "invalid_request_error", "Feedback for a call that is not known, or not yours."),
    # Money.
    "budget_exceeded": ErrorCode(429, "insufficient_quota", "A cap is used up; Retry-After names its reset."),
    "budget_reserved": ErrorCode(429, "rate_limit_error", "What is left of a cap is held by calls in flight."),
    "model_not_priced": ErrorCode(402, "invalid_request_error", "A cap in dollars applies and no price is known."),
    "spending_stopped": ErrorCode(403, "invalid_request_error", "Somebody threw a kill switch: `gateway costs stop`."),
    "budget_unavailable": ErrorCode(503, "server_error", "The ledger's store is out of order and the cap is closed."),
    "rollout_refused": ErrorCode(409, "invalid_request_error", "The evidence, or how it stands, is against it."),
    # Our own state.
    "overloaded": ErrorCode(503, "server_error", "More concurrent calls or connections than the limit."),
    "draining": ErrorCode(503, "server_error", "The gateway is shutting down; try another one."),
    "journal_unavailable": ErrorCode(503, "server_error", "The journal cannot be written, so no call is admitted."),
    "internal_error": ErrorCode(500, "server_error", "A bug. The log has the cause under the request id."),
    # The provider.
    "upstream_timeout": ErrorCode(504, "server_error", "The provider did not answer in time."),
    "upstream_unreachable": ErrorCode(502, "server_error", "No connection to the provider, or it was reset."),
    "upstream_invalid": ErrorCode(502, "server_error", "What the provider sent is not a chat completion."),
    "upstream_cut": ErrorCode(502, "server_error", "The provider's answer broke off after it had begun."),
    "upstream_error": ErrorCode(502, "server_error", "The provider failed and gave no code of its own."),
    "upstream_auth": ErrorCode(502, "server_error", "The provider refused the gateway's own key."),
}


class GatewayError(Exception):
    """Abstract: a failure that may be shown to the caller."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        if code in CODES:
            status, type = status or CODES[code].status, type or CODES[code].type
        if status is None or type is None:
            raise AssertionError(f"BUG: error code {code!r} is not in the table")
        self.code = code
        self.message = message
        self.status: int = status
        self.type: str = type
        self.param = param
        self.headers: Mapping[str, str] = headers or {}

    def body(self) -> dict[str, Any]:
        """The OpenAI error object, ready to be encoded."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """`body()` as JSON bytes."""
        return msgspec.json.encode(self.body())


class Refused(GatewayError):
    """The gateway itself declines: malformed, unknown agent, over budget, overloaded, ..."""


class FaultKind(StrEnum):
    """What went wrong on the way to or from a provider. What follows from each: `decide/fallback.py:REMEDIES`."""

    CONNECT = "connect"  # No connection: refused, unreachable, name not found, TLS failed.
    RESET = "reset"  # The connection broke before anything of the answer had gone out.
    FIRST_BYTE = "first_byte"  # Accepted, and not a byte within the deadline.
    FIRST_TOKEN = "first_token"  # Headers, and no content within the deadline.
    STALL = "stall"  # Nothing more within the stall limit, the connection open.
    DRIP = "drip"  # More, but slower than the least rate.
    CUT = "cut"  # The answer broke off after some of it had gone out.
    SERVER = "server"  # 5xx, or an error in the place of an answer.
    RATE_LIMITED = "rate_limited"  # 429: later.
    QUOTA = "quota"  # 429 or 402: the account is empty.
    NOT_FOUND = "not_found"  # 404: the model is retired or was never there.
    AUTH = "auth"  # 401 or 403: our key, not the caller's.
    INVALID = "invalid"  # What came is no chat completion: HTML, nothing, another type, too large.
    CONTEXT_LENGTH = "context_length"  # The prompt is too long for this model.
    FILTERED = "filtered"  # The provider's content filter.
    REJECTED = "rejected"  # Any other 4xx: the request itself.
    DEADLINE = "deadline"  # The call's own time is over.
    OVERRUN = "overrun"  # More than `max_tokens` allows, or money that was taken back: cut by us.
    LEFT = "left"  # The caller has gone, and nobody waits for the answer any more.


class UpstreamFault(GatewayError):
    """A provider failed, in one of the ways of `FaultKind`."""

    def __init__(
        self,
        kind: FaultKind,
        code: str,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(code, message, status=status, type=type, param=param, headers=headers)
        self.kind = kind
        self.retry_after_s = retry_after_s
