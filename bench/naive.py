"""The yardstick: what anybody would write in forty lines with aiohttp. It forwards, and no more.

Not an example to follow: no limits, no timeouts, no retries, and the caller's headers go out as they came in.
"""

import argparse

import aiohttp
import uvloop
from aiohttp import web

_OWN_TO_EACH_HOP = {"host", "content-length", "transfer-encoding", "connection", "keep-alive"}
UPSTREAM = web.AppKey("upstream", str)
SESSION = web.AppKey("session", aiohttp.ClientSession)


def _forwarded(headers: "aiohttp.typedefs.LooseHeaders") -> dict[str, str]:
    return {name: value for name, value in dict(headers).items() if name.lower() not in _OWN_TO_EACH_HOP}


async def forward(request: web.Request) -> web.StreamResponse:
    url = request.app[UPSTREAM] + request.path_qs
    body = await request.read()
    session = request.app[SESSION]
    async with session.request(request.method, url, data=body, headers=_forwarded(request.headers)) as answer:
        headers = _forwarded(answer.headers)
        if answer.content_length is not None:
            return web.Response(status=answer.status, headers=headers, body=await answer.read())
        stream = web.StreamResponse(status=answer.status, headers=headers)
        await stream.prepare(request)
        async for data in answer.content.iter_any():
            await stream.write(data)
        await stream.write_eof()
        return stream


async def _session(app: web.Application):  # type: ignore[no-untyped-def]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app[SESSION]:
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.naive", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    arguments = parser.parse_args()
    app = web.Application()
    app[UPSTREAM] = arguments.upstream
    app.cleanup_ctx.append(_session)
    app.router.add_route("*", "/{path:.*}", forward)
    loop = uvloop.new_event_loop()
    web.run_app(app, host="127.0.0.1", port=arguments.port, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main()
