"""The routes for videos: create, list, retrieve, cancel, delete."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from ...intake.body import Upload, read_body
from ...intake.media import decode_image
from ...jobs.create import Draft, draft_video, make_job
from ...jobs.job_request import IMAGE
from ...jobs.served_models import ServedModel
from ...store.jobs import Job, NotFound
from ...wire.errors import ApiError, refusal
from ...wire.requests import VIDEO_ID, CreateVideo, Sampling, show_page, show_video
from ..auth import Caller, Reader, Writer

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/videos", tags=["videos"])
Asked = TypeVar("Asked", bound=Sampling)
VideoId = Annotated[str, Path(description="A video's id.")]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", description="Makes a retry safe, for a day.")]
POLL_AFTER_MS = 1000  # the SDKs use the first answer's for the whole of their loop


@router.post("", operation_id="createVideo")
async def create(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Make a video from a prompt, and from a first frame where one is sent."""
    context = request.app.state.context
    with await read_body(request, max_bytes=context.config.max_body_bytes, folder=context.config.scratch) as body:
        asked = parse(CreateVideo, body.fields)
        model = await find_model(request, asked)
        refuse_files(body.files, but="input_reference")
        draft = draft_video(asked, model)
        await add_image(draft, body.files.get("input_reference"), context.config.max_media_pixels)
        traceparent = request.headers.get("traceparent")
        job = await asyncio.to_thread(
            make_job, context, caller, draft, asked, idempotency_key, "/v1/videos", traceparent
        )
    return answer(request, job)


@router.get("", operation_id="listVideos")
def page(
    request: Request,
    caller: Reader,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """List the tenant's videos."""
    context = request.app.state.context
    try:
        if after is not None and not VIDEO_ID.fullmatch(after):
            raise NotFound
        jobs, has_more = context.jobs.page(caller.tenant, limit, after, order == "asc")
    except NotFound:
        message = "Invalid 'after': there is no such video."
        raise ApiError(400, message, code="invalid_value", param="after") from None
    return JSONResponse(show_page([show_video(job, context.config.retention_s) for job in jobs], has_more))


@router.get("/{video_id}", operation_id="retrieveVideo")
def retrieve(request: Request, caller: Reader, video_id: VideoId) -> JSONResponse:
    """Get a video."""
    return answer(request, find_job(request, caller, video_id))


@router.post("/{video_id}/cancel", operation_id="cancelVideo")
def cancel(request: Request, caller: Writer, video_id: VideoId) -> JSONResponse:
    """End a video that is not finished: it has failed with `cancelled`, and its engine stops before the next step."""
    check_id(video_id)
    return answer(request, request.app.state.context.jobs.cancel(caller.tenant, video_id))


@router.delete("/{video_id}", operation_id="deleteVideo")
def delete(request: Request, caller: Writer, video_id: VideoId) -> JSONResponse:
    """Forget a video, its prompt and its files, whatever its state."""
    check_id(video_id)
    context = request.app.state.context
    context.jobs.delete(caller.tenant, video_id)
    try:
        context.artifacts.remove(f"jobs/{video_id}")
    except OSError as error:  # the sweeper will
        logger.warning("files of job %s are left: %s", video_id, type(error).__name__)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


# ------------------------------------------------------------------------------------------ shared with other routes


def parse(schema: type[Asked], fields: dict[str, Any]) -> Asked:
    """Validate the fields. Raises ApiError 400 for the first one that is wrong."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise refusal(error, schema) from None


def find_job(request: Request, caller: Caller, video_id: str) -> Job:
    check_id(video_id)
    job: Job = request.app.state.context.jobs.get(caller.tenant, video_id)
    return job


def check_id(video_id: str) -> None:
    """Raise NotFound for an invalid id, so that another tenant's, a malformed and an unknown one look alike."""
    if not VIDEO_ID.fullmatch(video_id):
        raise NotFound


async def find_model(request: Request, asked: Sampling) -> ServedModel:
    return await asyncio.to_thread(request.app.state.catalog.find, asked.model)


def refuse_files(files: dict[str, Upload], but: str) -> None:
    for name in files:
        if name != but:
            raise ApiError(400, f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)


async def add_image(draft: Draft, upload: Upload | None, max_pixels: int) -> None:
    """Add the first frame, at the model's size. Raises ApiError 400 if the model takes none, or needs one."""
    model = draft.model
    if upload is None:
        if model.needs_image:
            message = "Missing required parameter: 'input_reference' (this model makes videos from an image)."
            raise ApiError(400, message, code="missing_required_parameter", param="input_reference")
        return
    if not model.takes_image:
        message = "This model takes no image."
        raise ApiError(400, message, code="unsupported", param="input_reference")
    width, height = (int(side) for side in draft.request["native_size"].split("x"))
    draft.files[IMAGE] = await decode_image(upload.path, width, height, max_pixels=max_pixels)
    draft.digests["input_reference"] = upload.sha256


def answer(request: Request, job: Job) -> JSONResponse:
    """Answer with a video, and a header that says when to ask for it again."""
    request.state.job = job.id  # for the log
    response = JSONResponse(show_video(job, request.app.state.context.config.retention_s))
    if not job.has_ended:
        wait_ms = POLL_AFTER_MS if job.eta_s is None else min(5000, max(200, round(1000 * job.eta_s)))
        response.headers["openai-poll-after-ms"] = str(wait_ms)
    return response
