"""Operators' routes for jobs of all tenants: list, prioritise, cancel, retry."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from ...accounts.all_jobs import HasEnded
from ...jobs.retry import NotRetriable, retry
from ...jobs.services import Context
from ...store.jobs import Job, NotFound
from ...wire.admin_requests import ChangeJob, show_job
from ...wire.errors import ApiError
from ...wire.requests import VIDEO_ID, show_page
from ..auth import Caller, Operator
from .admin import After, Limit, actor, read_json

router = APIRouter(prefix="/v1/admin/jobs", tags=["operators"])
JobId = Annotated[str, Path(description="A job's id, which is its video's.")]
Text = Annotated[str | None, Query(pattern=r"^[^\x00]{1,200}$")]


@router.get("", operation_id="listJobs")
def page(
    request: Request,
    caller: Operator,
    tenant: Text = None,
    state: Literal["queued", "in_progress", "completed", "failed"] | None = None,
    model: Text = None,
    limit: Limit = 20,
    after: After = None,
) -> JSONResponse:
    """List all tenants' jobs, the newest first."""
    context: Context = request.app.state.context
    try:
        jobs, has_more = context.all_jobs.page(limit, after, tenant=tenant, state=state, model=model)
    except NotFound:
        message = "Invalid 'after': there is no such job."
        raise ApiError(400, message, code="invalid_value", param="after") from None
    return JSONResponse(show_page([show_job(job) for job in jobs], has_more))


@router.get("/{job_id}", operation_id="retrieveJob")
def retrieve(request: Request, caller: Operator, job_id: JobId) -> JSONResponse:
    """Get a job of any tenant."""
    return JSONResponse(show_job(_find(request, job_id)))


@router.patch("/{job_id}", operation_id="changeJob")
async def change(request: Request, caller: Operator, job_id: JobId) -> JSONResponse:
    """Put an unfinished job before or behind others."""
    asked = await read_json(request, ChangeJob)
    return await run_in_threadpool(_change, request, caller, job_id, asked)


def _change(request: Request, caller: Caller, job_id: str, asked: ChangeJob) -> JSONResponse:
    context: Context = request.app.state.context
    _find(request, job_id)
    try:
        job = context.all_jobs.prioritise(job_id, asked.priority, actor(request, caller))
    except HasEnded as error:
        raise ApiError(400, f"{str(error).capitalize()}.", code="job_has_ended", param="job_id") from None
    except NotFound:
        raise _no_job() from None
    return JSONResponse(show_job(job))


@router.post("/{job_id}/cancel", operation_id="cancelJob")
def cancel(request: Request, caller: Operator, job_id: JobId) -> JSONResponse:
    """End a job that is not finished, as its tenant could."""
    job = _find(request, job_id)
    try:
        return JSONResponse(show_job(request.app.state.context.jobs.cancel(job.tenant, job.id, actor(request, caller))))
    except NotFound:
        raise _no_job() from None


@router.post("/{job_id}/retry", operation_id="retryJob")
def try_again(request: Request, caller: Operator, job_id: JobId) -> JSONResponse:
    """Make a new job from the request and files of one that failed or was cancelled."""
    context: Context = request.app.state.context
    job = _find(request, job_id)
    request.app.state.catalog.find(job.request.get("model"))
    try:
        return JSONResponse(show_job(retry(context, job, actor(request, caller))))
    except NotRetriable as error:
        message = f"{str(error)[:1].upper()}{str(error)[1:]}."
        raise ApiError(400, message, code="not_retriable", param="job_id") from None


def _find(request: Request, job_id: str) -> Job:
    """Return the job. Raises ApiError 404 for an invalid or unknown id."""
    if not VIDEO_ID.fullmatch(job_id):
        raise _no_job()
    try:
        job: Job = request.app.state.context.all_jobs.get(job_id)
    except NotFound:
        raise _no_job() from None
    return job


def _no_job() -> ApiError:
    return ApiError(404, "There is no such job.", code="job_not_found", param="job_id")
