"""Who may use `/admin`: whoever knows the token; on loopback without a token, whoever is on this machine, and no page.

A page can have a browser send requests to this machine, even under a name of its own (DNS rebinding), and could read
the answers then. So without a token the name that was called must be this machine's own.
"""

from collections.abc import Awaitable, Callable
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from gateway.domain.errors import Refused
from gateway.edge.replies import error_reply
from gateway.edge.runtime import RUNTIME

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def guarded(serve: Handler) -> Handler:
    """The same, for those who may."""

    async def guard(request: web.Request) -> web.StreamResponse:
        refused = _refusal(request)
        return await serve(request) if refused is None else error_reply(refused)

    return guard


def _refusal(request: web.Request) -> Refused | None:
    server = request.app[RUNTIME].server
    token = server.admin_token.reveal()
    if not token:
        if not server.admin.is_loopback:
            return Refused("invalid_api_key", "set server.admin_token to use /admin off loopback")
        # Who knows a token is no page of a stranger, and may come by way of a proxy with a name.
        if not _is_own_name(request.headers.get("Host", ""), server.admin.host):
            return Refused("origin_not_allowed", "Host is not this machine's loopback address", param="Host")
        return None
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    is_right = compare_digest(shown.strip().encode("utf-8", "surrogateescape"), token.encode())
    if not (scheme.lower() == "bearer" and is_right):
        return Refused("invalid_api_key", "the admin token is required: Authorization: Bearer <token>")
    return None


def _is_own_name(host: str, own: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("localhost", own.lower()) or ip_address(name).is_loopback
    except ValueError:
        return False
