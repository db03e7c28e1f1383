"""Middleware in Ray's HTTP proxy: it bounds the headers, and how far ahead of the ingress a body is read.

Ray's proxy reads a body as fast as its client sends it and keeps what the ingress has not fetched yet: ten clients that
sent a gigabyte each would fill the memory of the node, whatever the ingress refuses. Ray calls `middlewares` by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..intake.malloc_trim import trim
from ..wire.errors import ApiError

WINDOW_BYTES = 2**19  # of a request, read and not yet on their way to the ingress
LOOK_S = 1.0  # how often a full window is looked at, should it be kept by something that never frees it
MAX_HEADER_BYTES = 64 * 2**10  # h11's bound; httptools has none


def middlewares() -> list[Middleware]:
    return [Middleware(Edge)]


class Edge:
    """ASGI middleware that bounds a request's headers and reads its body through a `Window`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        num_bytes = len(scope.get("raw_path", b"")) + sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > MAX_HEADER_BYTES:
            error = ApiError(431, "The headers are too large.", code="headers_too_large")
            return await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
        window = Window(receive)
        try:
            await self.app(scope, window.receive, send)
        finally:
            if window.has_waited:  # a small body leaves nothing worth the walk
                trim()


class Window:
    """Wraps `receive`, and waits while the proxy still holds too much of what it gave.

    Ray's queue tells nobody what was fetched from it, but lets go of the messages once they are serialized.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._held_bytes = 0
        self._freed = asyncio.Event()
        self.has_waited = False

    async def receive(self) -> Message:
        if self._held_bytes >= WINDOW_BYTES:
            await self._room()
        message = Held(await self._receive())
        if num_bytes := len(message.get("body", b"")):
            self._held_bytes += num_bytes
            weakref.finalize(message, self._free, num_bytes).atexit = False
        return message

    async def _room(self) -> None:
        self.has_waited = True
        self._freed.clear()
        try:
            await asyncio.wait_for(self._freed.wait(), LOOK_S)
        except TimeoutError:
            self._held_bytes = 0  # better to read on than to hang

    def _free(self, num_bytes: int) -> None:
        self._held_bytes = max(0, self._held_bytes - num_bytes)
        self._freed.set()


class Held(dict[str, Any]):
    """A message whose release can be seen; pickled for another process, it is a plain dict."""

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)
