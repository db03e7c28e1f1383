"""Operators' routes for tenants, engines and the audit, and helpers that all operators' routes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from ...intake.body import read_body
from ...jobs.services import Context
from ...store.audit import Actor
from ...store.processes import ENGINE
from ...wire.admin_requests import ChangeTenant, show_engine, show_entry, show_tenant
from ...wire.errors import ApiError, refusal
from ...wire.requests import show_page
from ..auth import Caller, Operator

router = APIRouter(prefix="/v1/admin", tags=["operators"])
Asked = TypeVar("Asked", bound=BaseModel)
Limit = Annotated[int, Query(ge=1, le=100)]
PRINTABLE = r"^[!-~]{1,64}$"
After = Annotated[str | None, Query(pattern=PRINTABLE, description="The last id of the page before.")]
MAX_BODY_BYTES = 64 * 2**10
SILENT_S = 10.0  # after which an engine counts as gone, as in /healthz


@router.get("/tenants", operation_id="listTenants")
def tenants(request: Request, caller: Operator, limit: Limit = 20, after: After = None) -> JSONResponse:
    """List every tenant that has a key, a job or a setting, by name, with its effective settings."""
    context: Context = request.app.state.context
    found, has_more = context.tenants.page(limit, after)
    return JSONResponse(show_page([show_tenant(context, *one) for one in found], has_more))


@router.patch("/tenants/{tenant}", operation_id="changeTenant")
async def change_tenant(request: Request, caller: Operator, tenant: Annotated[str, Path()]) -> JSONResponse:
    """Set a tenant's limits, from its next job on; null takes a setting back to the configuration's."""
    asked = await read_json(request, ChangeTenant)
    return await run_in_threadpool(_change_tenant, request, caller, tenant, asked)


def _change_tenant(request: Request, caller: Caller, name: str, asked: ChangeTenant) -> JSONResponse:
    context: Context = request.app.state.context
    with refusing():
        tenant = context.tenants.change(name, asked.model_dump(exclude_unset=True), actor(request, caller))
    return JSONResponse(show_tenant(context, tenant, context.tenants.load(name)))


@router.get("/engines", operation_id="listEngines")
def engines(request: Request, caller: Operator) -> JSONResponse:
    """List the engines that are alive, with the facts that they report of themselves."""
    found = request.app.state.context.processes.alive(SILENT_S, ENGINE)
    return JSONResponse(show_page([show_engine(engine) for engine in found], has_more=False))


@router.post("/engines/{engine_id}/drain", operation_id="drainEngine")
def drain(request: Request, caller: Operator, engine_id: Annotated[str, Path()]) -> JSONResponse:
    """Let an engine begin nothing more: it finishes what fits into `drain_s`, and gives the rest back."""
    processes = request.app.state.context.processes
    if any(engine.id == engine_id for engine in processes.alive(SILENT_S, ENGINE)):
        processes.drain(engine_id, actor(request, caller))
        for engine in processes.alive(SILENT_S, ENGINE):
            if engine.id == engine_id:
                return JSONResponse(show_engine(engine))
    raise ApiError(404, "There is no such engine.", code="engine_not_found", param="engine_id")


@router.get("/audit", operation_id="listAudit")
def audit(
    request: Request,
    caller: Operator,
    limit: Limit = 20,
    after: Annotated[int | None, Query(ge=1, lt=2**63, description="The last id of the page before.")] = None,
) -> JSONResponse:
    """List the changes that operators have made, the newest first."""
    found, has_more = request.app.state.context.audit.page(limit, after)
    return JSONResponse(show_page([show_entry(entry) for entry in found], has_more))


# ------------------------------------------------------------------------------------------ shared by operators' routes


def actor(request: Request, caller: Caller) -> Actor:
    return Actor(caller.key.id, request.state.request_id)


async def read_json(request: Request, schema: type[Asked]) -> Asked:
    """Read the body's fields; no body is one without fields. Raises ApiError 4xx."""
    folder = request.app.state.context.config.scratch
    with await read_body(request, max_bytes=MAX_BODY_BYTES, folder=folder) as body:
        fields: dict[str, Any] = body.fields
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise refusal(error) from None


@contextmanager
def refusing() -> Iterator[None]:
    """Turn a store's ValueError into ApiError 400; its text begins with the field's name."""
    try:
        yield
    except ValueError as error:
        param, _, what = str(error).partition(" ")
        raise ApiError(400, f"Invalid '{param}': {what}.", code="invalid_value", param=param) from None
