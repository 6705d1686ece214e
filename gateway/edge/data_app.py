"""The application behind the data listener: the paths agents call, and an OpenAI-shaped answer for every other."""

from pathlib import Path

from aiohttp import web

from gateway.domain.errors import Refused
from gateway.edge.admit import leave_to_read_body
from gateway.edge.chat import chat
from gateway.edge.feedback import PATH as FEEDBACK_PATH
from gateway.edge.feedback import FeedbackDesk
from gateway.edge.models import list_models, show_model
from gateway.edge.replies import SERVER_NAME, error_reply
from gateway.edge.runtime import RUNTIME, Runtime

CHAT_PATH = "/v1/chat/completions"


def data_app(runtime: Runtime, store: Path) -> web.Application:
    """Everything under /v1. `store` is the file in which calls and feedback are."""
    app = web.Application(client_max_size=runtime.server.max_body_bytes)
    app[RUNTIME] = runtime
    app.router.add_post(CHAT_PATH, chat, expect_handler=leave_to_read_body)
    desk = FeedbackDesk(store)
    app.on_cleanup.append(desk.close)
    app.router.add_post(FEEDBACK_PATH, desk.take, expect_handler=leave_to_read_body)
    app.router.add_get("/v1/models", list_models)
    # A model's name may hold slashes and colons.
    app.router.add_get("/v1/models/{id:.+}", show_model)
    add_no_such_path(app)
    return app


def add_no_such_path(app: web.Application) -> None:
    """Last of all: 404 or 405 in OpenAI's shape for what no route takes."""
    resources = list(app.router.resources())

    async def no_such_path(request: web.Request) -> web.Response:
        methods: set[str] = set()
        for resource in resources:
            methods |= (await resource.resolve(request))[1]
        if not methods:
            return error_reply(Refused("not_found", "there is no such path here"))
        listed = ", ".join(sorted(methods))
        return error_reply(Refused("method_not_allowed", f"this path takes {listed}", headers={"Allow": listed}))

    # CONNECT and `OPTIONS *` have targets that no path pattern matches; the listener answers those.
    app.router.add_route("*", "/{path:.*}", no_such_path, expect_handler=leave_to_read_body)
    app.on_response_prepare.append(_hide_server)


async def _hide_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER_NAME
