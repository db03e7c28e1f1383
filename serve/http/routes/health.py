"""Health, readiness and Prometheus metrics."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import SQLAlchemyError

from ...store.processes import DISPATCHER, ENGINE
from ..auth import check_scrapes
from ..metrics import render

router = APIRouter(tags=["health"])
SILENT_S = 10.0  # after which an engine is not told of any more


@router.get("/healthz", operation_id="health")
async def health(request: Request) -> JSONResponse:
    """Answer 200 while this ingress answers, with what it knows of the others."""
    processes = await request.app.state.signs.alive()
    store = "unreachable" if processes is None else "ok"
    engines = [{"id": p.id, **p.facts} for p in processes or () if p.kind == ENGINE and p.silent_s <= SILENT_S]
    dispatchers = sum(p.kind == DISPATCHER for p in processes or ())
    body = {"status": "ok", "store": store, "dispatchers": dispatchers, "engines": engines}
    body["models"] = request.app.state.catalog.names
    return JSONResponse(body)


@router.get("/readyz", operation_id="ready")
async def ready(request: Request) -> JSONResponse:
    """Answer 200 when jobs are taken and worked on: models are resolved, the store answers, a dispatcher is alive.

    An engine need not be alive: if they scale to none, the first job starts one.
    """
    if (reason := request.app.state.catalog.reason) is not None:
        return JSONResponse({"status": reason}, 503, {"retry-after": "2"})
    processes = await request.app.state.signs.alive()
    if processes is None:
        return JSONResponse({"status": "store unreachable"}, 503, {"retry-after": "2"})
    if not any(p.kind == DISPATCHER for p in processes):
        return JSONResponse({"status": "no dispatcher"}, 503, {"retry-after": "2"})
    return JSONResponse({"status": "ready"})


@router.get("/metrics", operation_id="metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return all metrics for Prometheus from the store: the same on every ingress, which first adds its own counts."""
    await asyncio.to_thread(check_scrapes, request)
    with suppress(SQLAlchemyError):  # a store that only reads is enough for the rest
        await request.app.state.counter.flush()
    text = await asyncio.to_thread(render, request.app.state.context)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
