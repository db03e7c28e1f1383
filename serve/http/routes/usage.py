"""The route for a tenant's usage and its cost; for operators, that of all tenants."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from ...accounts.usage import Asked, Bucket, parse_day, parse_groups, read_usage
from ...wire.errors import ApiError
from ..auth import UsageReader, is_operator

router = APIRouter(prefix="/v1/usage", tags=["usage"])
ALL = "*"
DAYS = 30  # where no start is named
Day = Annotated[str | None, Query(description="A day by UTC, such as 2026-11-30.")]


@router.get("", operation_id="getUsage")
def page(
    request: Request,
    caller: UsageReader,
    start: Day = None,
    end: Day = None,
    group_by: Annotated[str, Query(description="Some of day, tenant and model, with commas between them.")] = "day",
    tenant: Annotated[str, Query(description="Of another tenant, or * of all: with scope operator.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(description="The last_id of the page before.")] = None,
) -> JSONResponse:
    """Sum up the jobs that ended from `start` to `end`, both included; by default of the last 30 days."""
    last = _parsed("end", end) or datetime.now(UTC).date()
    first = _parsed("start", start) or last - timedelta(days=DAYS - 1)
    if first > last:
        raise _invalid("start", f"start must not be after end, got {first} and {last}")
    try:
        asked = Asked(start=first, end=last, by=parse_groups("group_by", group_by))
    except ValueError as error:
        raise _invalid("group_by", str(error)) from None
    asked = Asked(start=first, end=last, by=asked.by, tenant=_tenant(request, caller, tenant, asked.by))
    try:
        buckets, has_more = read_usage(request.app.state.context.database, asked, limit, after)
    except ValueError as error:
        raise _invalid("after", str(error)) from None
    return JSONResponse(show_usage(buckets, has_more))


def show_usage(buckets: list[Bucket], has_more: bool) -> dict[str, Any]:
    ids = (buckets[0].cursor, buckets[-1].cursor) if buckets else (None, None)
    return {
        "object": "list",
        "data": [show_bucket(bucket) for bucket in buckets],
        "first_id": ids[0],
        "last_id": ids[1],
        "has_more": has_more,
    }


def show_bucket(bucket: Bucket) -> dict[str, Any]:
    return {
        "object": "usage.bucket",
        "day": bucket.day,
        "tenant": bucket.tenant,
        "model": bucket.model,
        "jobs": bucket.jobs,
        "completed": bucket.completed,
        "failed": bucket.jobs - bucket.completed,
        "engine_seconds": round(bucket.engine_seconds, 6),
        "video_seconds": round(bucket.video_seconds, 3),
        "cost": bucket.cost.show() if bucket.cost else None,
    }


def _tenant(request: Request, caller: UsageReader, named: str, by: Sequence[str]) -> str | None:
    """Return the caller's tenant; for an operator the one named, or None for all: by `*`, or if they are told apart."""
    if is_operator(request, caller.key):
        return None if named == ALL or (not named and "tenant" in by) else named or caller.tenant
    if named not in ("", caller.tenant):
        message = "Another tenant's usage needs a key of scope operator."
        raise ApiError(403, message, code="insufficient_permissions", type="permission_error", param="tenant")
    return caller.tenant


def _parsed(name: str, text: str | None) -> date | None:
    try:
        return parse_day(name, text) if text else None
    except ValueError as error:
        raise _invalid(name, str(error)) from None


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}': {message}.", code="invalid_value", param=param)
