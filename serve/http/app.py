"""The HTTP application: its routes, and what they share (request ids, OpenAI's error envelope)."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic.fields import FieldInfo
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import __version__
from ..core.logs import JOB, REQUEST
from ..jobs.served_models import Catalog
from ..jobs.services import Context
from ..store.jobs import NotFound
from ..wire.errors import ApiError, refused_field
from .health import Signs
from .job_feed import Watch
from .key_use import KeyUse
from .openapi import MAKES, describe_api
from .request_counter import RequestCounter
from .routes import (
    admin,
    admin_jobs,
    admin_keys,
    characters,
    content,
    events,
    generations,
    health,
    models,
    page,
    session,
    usage,
    videos,
)
from .routes import (
    edits as remakes,
)

logger = logging.getLogger(__name__)
OPERATORS = (admin, admin_jobs, admin_keys)
ROUTES = (characters, remakes, videos, content, events, generations, models, usage, *OPERATORS, health, session, page)
MAKES_JOBS = (*MAKES, "generateVideo")  # operations
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def create_app(context: Context, behind_proxy: bool = False) -> FastAPI:
    """Create the application of an ingress replica; all that it answers comes from the store.

    behind_proxy: Ray's proxy gives requests and answers their ids.
    """
    counter = RequestCounter(context.database, context.ledger.counters)

    @asynccontextmanager
    async def until_stopped(app: FastAPI) -> AsyncIterator[None]:
        yield
        with suppress(SQLAlchemyError):
            await counter.flush()

    app = FastAPI(
        title="skylapse",
        version=__version__,
        lifespan=until_stopped,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.context, app.state.counter = context, counter
    app.state.catalog = Catalog(context.config)
    app.state.watch = Watch(context.jobs)
    app.state.signs = Signs(context.processes)
    app.state.key_use = KeyUse(context.keys)
    for routes in ROUTES:
        app.include_router(routes.router)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(SQLAlchemyError, _store_away)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(Labelled, counter=counter, behind_proxy=behind_proxy)
    describe_api(app)
    return app


class Labelled:
    """Middleware that adds an id, which the logs name, and the time taken to every answer, and counts the answer."""

    def __init__(self, app: ASGIApp, counter: RequestCounter, behind_proxy: bool = False) -> None:
        self.app, self.counter, self.behind_proxy = app, counter, behind_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began_s = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "") if self.behind_proxy else ""
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0  # none: the client has gone
        REQUEST.set(request_id)

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.counter.answered(scope, status)
                headers = MutableHeaders(scope=message)
                if not self.behind_proxy:
                    headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - began_s) * 1000))
                headers.setdefault("cache-control", "no-store")
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, labelled)
        except Exception:
            if not status:  # it is answered outside of this
                status = 500
                self.counter.answered(scope, status)
            raise
        finally:
            _log_answer(scope, status, time.perf_counter() - began_s)


def _log_answer(scope: Scope, status: int, seconds: float) -> None:
    """Log one line for a request, with its route and not its URL; polls that succeed are logged at level debug only."""
    route = getattr(scope.get("route"), "path", "unknown")
    is_poll = scope["method"] in ("GET", "HEAD") and 200 <= status < 400
    level = logging.DEBUG if is_poll else logging.WARNING if status >= 500 else logging.INFO
    facts = {"method": scope["method"], "route": route, "status": status, "ms": round(1000 * seconds)}
    job = scope["state"].get("job") or scope.get("path_params", {}).get("video_id", "")
    if JOB.fullmatch(job):
        facts["job"] = job
    logger.log(level, "%s %s %d", scope["method"], route, status, extra={"facts": facts})


# ---------------------------------------------------------------------------------------------------------- errors


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if error.status not in (401, 403) and getattr(request.scope.get("route"), "operation_id", None) in MAKES_JOBS:
        request.app.state.counter.refused(error.code or "invalid_request")
    return _answer(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Answer 400 for a path or query parameter that is invalid."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return _answer(refused_field(first | {"loc": (param,)}, _parameter(request.scope.get("route"), param)))


def _parameter(route: object, name: str) -> FieldInfo | None:
    """Return a route's own declaration of a parameter."""
    if not isinstance(route, APIRoute):
        return None
    declared = (*route.dependant.query_params, *route.dependant.header_params, *route.dependant.path_params)
    return next((one.field_info for one in declared if one.alias == name), None)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {404: ("unknown_url", "There is nothing at this URL."), 405: ("method_not_allowed", "Not by this method.")}
    code, message = codes.get(error.status_code, ("invalid_request", "The request cannot be answered."))
    answer = _answer(ApiError(error.status_code, message, code=code))
    if error.status_code == 405 and (methods := _methods(request.url.path)):
        answer.headers["allow"] = ", ".join(sorted(methods))
    return answer


def _methods(path: str) -> set[str]:
    """Return the methods of all routes at a path; Starlette's own header has those of one route only."""
    routes = [route for part in ROUTES for route in part.router.routes if isinstance(route, APIRoute)]
    found = [route for route in routes if route.path_regex.match(path)]
    exact = [route for route in found if route.path == path]  # `/v1/videos/edits` is no video
    return {method for route in exact or found for method in route.methods or ()}


async def _not_found(request: Request, error: Exception) -> JSONResponse:
    return _answer(no_video())


def no_video() -> ApiError:
    return ApiError(404, "There is no such video.", code="video_not_found", param="video_id")


async def _store_away(request: Request, error: Exception) -> JSONResponse:
    logger.error("the store does not answer: %s", type(error).__name__)
    message = "The service cannot reach its store; try again in a moment."
    return _answer(ApiError(503, message, code="store_unavailable", type="server_error", retry_after_s=2))


async def _broken(request: Request, error: Exception) -> JSONResponse:
    logger.error("request %s failed", request.state.request_id, exc_info=error)
    message = f"The server had an error while it answered request {request.state.request_id}."
    return _answer(ApiError(500, message, code="internal_error", type="server_error"))
