"""Videos from videos: remix, edit, extension. Each is one path: a source, a draft, a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ...intake.body import Body, read_body
from ...jobs.create import Draft, draft_extension, draft_remake, make_job
from ...jobs.job_request import EDIT, REMIX, SOURCE
from ...jobs.served_models import Catalog, ServedModel
from ...jobs.source_video import Source, finished_source, sent_source
from ...store.jobs import Job
from ...wire.errors import ApiError
from ...wire.requests import EditVideo, ExtendVideo, RemixVideo, Sampling
from ..auth import Caller, Writer
from .videos import Asked, IdempotencyKey, VideoId, answer, find_job, find_model, parse, refuse_files

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("/edits", operation_id="editVideo")
async def edit(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Make a named or sent video again, by another prompt."""

    def draft(asked: EditVideo, model: ServedModel, source: Source) -> Draft:
        return draft_remake(EDIT, asked, model, source)

    return await _remake(request, caller, EditVideo, draft, idempotency_key)


@router.post("/extensions", operation_id="extendVideo")
async def extend(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None) -> JSONResponse:
    """Make a named or sent video longer; the answer is the whole clip, its old frames as they were."""
    return await _remake(request, caller, ExtendVideo, draft_extension, idempotency_key)


@router.post("/{video_id}/remix", operation_id="remixVideo")
async def remix(
    request: Request, caller: Writer, video_id: VideoId, idempotency_key: IdempotencyKey = None
) -> JSONResponse:
    """Make a finished video again, by another prompt."""

    def draft(asked: RemixVideo, model: ServedModel, source: Source) -> Draft:
        return draft_remake(REMIX, asked, model, source)

    return await _remake(request, caller, RemixVideo, draft, idempotency_key, video_id)


async def _remake(
    request: Request,
    caller: Caller,
    schema: type[Asked],
    draft_of: Callable[[Asked, ServedModel, Source], Draft],
    idempotency_key: str | None,
    video_id: str | None = None,
) -> JSONResponse:
    context, route = request.app.state.context, request.url.path
    with await read_body(request, max_bytes=context.config.max_body_bytes, folder=context.config.scratch) as body:
        asked = parse(schema, body.fields)
        model = None if asked.model is None else await find_model(request, asked)
        refuse_files(body.files, but="" if video_id else "video")
        named = video_id or _named(asked, body)
        if named is not None:
            job = await asyncio.to_thread(find_job, request, caller, named)
            model = model or _model_of(request, job)
            source = await asyncio.to_thread(finished_source, context, job)
        else:
            model = model or await find_model(request, asked)
            source = await sent_source(context, body.files["video"], model)
        draft = draft_of(asked, model, source)
        draft.files[SOURCE] = source.data
        draft.digests["video"] = source.sha256
        draft.request["remixed_from_video_id"] = named
        traceparent = request.headers.get("traceparent")
        job = await asyncio.to_thread(make_job, context, caller, draft, asked, idempotency_key, route, traceparent)
    return answer(request, job)


def _model_of(request: Request, job: Job) -> ServedModel:
    """Return the model that made the source, by the name that was asked for if it still means that model."""
    catalog: Catalog = request.app.state.catalog
    name = job.request["model"]
    return catalog.find(name if catalog.config.model_of(name) == job.model else job.model)


def _named(asked: Sampling, body: Body) -> str | None:
    """Return the id of the source; None if it was sent. Raises ApiError 400 for neither and for both."""
    reference = getattr(asked, "video", None)
    if reference is not None and "video" in body.files:
        raise ApiError(400, "Parameter 'video' was given more than once.", code="duplicate_parameter", param="video")
    if reference is None and "video" not in body.files:
        message = "Missing required parameter: 'video'."
        raise ApiError(400, message, code="missing_required_parameter", param="video")
    return None if reference is None else str(reference.id)
