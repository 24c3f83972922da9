"""The page's server: what it serves, and to whom."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedgrad.errors import EmbedgradError, OptionError
from embedgrad.inference.play.copies import copies
from embedgrad.inference.play.player import Events, Player
from embedgrad.report.page.play import play_page

OURS = ("127.0.0.1", "localhost")  # names of this machine, which an address on the web never has
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
REFUSED = "refused: open the address that embedgrad play printed\n"


@final
class Guard:
    """Lets in only who asks this machine by name, from no other page, with the token."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; every response gets `HEADERS`."""

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self.app  # which knows no websockets
        if scope["type"] == "http" and not self._allows(Headers(scope=scope), scope["path"]):
            app = PlainTextResponse(REFUSED, 403)
        await app(scope, receive, send_safely)

    def _allows(self, headers: Headers, path: str) -> bool:
        host = headers.get("host", "")
        own = host.rpartition(":")[0] in OURS and headers.get("origin") in (None, f"http://{host}")
        token = path.lstrip("/").partition("/")[0]
        return secrets.compare_digest(token.encode(), self.token.encode()) and own


def build_app(player: Player, token: str) -> ASGIApp:
    """The page of a player below /TOKEN/."""
    # One thread, so that the model does one thing at a time.
    worker = ThreadPoolExecutor(1, thread_name_prefix="play")
    turn = asyncio.Lock()

    async def work(function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    async def stream(first: dict[str, Any], events: Events) -> AsyncIterator[str]:
        yield _line(first)
        try:
            async with turn:
                while (event := await work(next, events, None)) is not None:
                    yield _line(event)
        finally:  # where the page has gone, too: nobody reads the rest
            worker.submit(events.close)

    async def answer(request: Request) -> Response:
        query, events = await work(player.ask, await _body(request))
        url = f"http://{request.headers['host']}/{token}/answer"
        first = {"copies": copies(player.folders[query.run], query, url)}
        return StreamingResponse(stream(first, events), media_type="application/x-ndjson")

    async def judge(request: Request) -> Response:
        return JSONResponse(await work(player.judge, await _body(request)))

    async def rows(request: Request) -> Response:
        return JSONResponse(await work(player.write_rows, (await _body(request)).get("run")))

    files = play_page([])

    def page(name: str) -> Route:
        def get(_: Request) -> Response:
            content, kind = files[name] if name else play_page(player.describe())[name]
            return Response(content, media_type=kind)

        return Route(f"/{name}", get)

    routes = [page(name) for name in files]
    for name, endpoint in (("answer", answer), ("feedback", judge), ("rows", rows)):
        routes.append(Route(f"/{name}", endpoint, methods=["POST"]))
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)], exception_handlers={EmbedgradError: _refuse}
    )
    return Guard(app, token)


def _line(event: object) -> str:
    return json.dumps(event) + "\n"


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the request: is not JSON ({error})") from error
    if not isinstance(body, dict):
        raise OptionError("the request: expected a JSON object")
    return body


def _refuse(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)
