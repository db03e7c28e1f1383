"""Whether the service is there, whether it can take jobs, and what Prometheus wants to know of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import SQLAlchemyError

from ..auth import check_scrapes
from ..metrics import render
from ..store.processes import DISPATCHER, ENGINE

router = APIRouter(tags=["health"])
SILENT_S = 10.0


@router.get("/healthz", operation_id="health")
def health(request: Request) -> JSONResponse:
    """200 while this ingress answers, with what it knows of the others."""
    context = request.app.state.context
    try:
        processes = context.processes.alive(SILENT_S)
        store = "ok"
    except SQLAlchemyError:
        processes, store = [], "unreachable"
    engines = [{"id": p.id, **p.facts} for p in processes if p.kind == ENGINE]
    dispatchers = sum(p.kind == DISPATCHER for p in processes)
    body = {"status": "ok", "store": store, "dispatchers": dispatchers, "engines": engines, "models": _models(request)}
    return JSONResponse(body)


@router.get("/readyz", operation_id="ready")
def ready(request: Request) -> JSONResponse:
    """200 when jobs are taken and will be worked on: the store answers and a dispatcher is alive.

    An engine need not be: where they scale to none, the first job starts one.
    """
    try:
        dispatchers = request.app.state.context.processes.alive(SILENT_S, DISPATCHER)
    except SQLAlchemyError:
        return JSONResponse({"status": "store unreachable"}, 503, {"retry-after": "2"})
    if not dispatchers:
        return JSONResponse({"status": "no dispatcher"}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ready"})


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Everything that Prometheus is told, from the store: the same on every ingress, which adds what it has counted."""
    await asyncio.to_thread(check_scrapes, request)
    with suppress(SQLAlchemyError):  # a store that only reads is enough for the rest
        await request.app.state.counter.flush()
    text = await asyncio.to_thread(render, request.app.state.context)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _models(request: Request) -> list[str]:
    config = request.app.state.context.config
    return [config.model, *config.aliases]
