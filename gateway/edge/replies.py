"""What goes back besides the answer: error responses in OpenAI's shape, and the headers that explain a call."""

from aiohttp import web

from gateway.domain.errors import GatewayError

JSON = "application/json"
# In the place of aiohttp's own, which tells strangers which version to attack.
SERVER_NAME = "genesis-gateway"


def error_reply(error: GatewayError, headers: dict[str, str] | None = None) -> web.Response:
    """An error as the OpenAI SDKs read it."""
    sent = {"Server": SERVER_NAME, **(headers or {}), **error.headers}
    return web.Response(body=error.encode(), status=error.status, content_type=JSON, headers=sent)


def header_text(text: str) -> str:
    """Any text as a header value: printable ASCII, with `?` for what is not."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if " " <= char <= "~" else "?" for char in text)
