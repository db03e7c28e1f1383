"""The synchronous API of MLPerf's load generator and TensorRT-LLM: a durable job whose client waits.

Source: mlcommons/endpoints, adapter `videogen`. A client that goes away leaves the job as it is.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from pathlib import Path

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ...intake.body import read_body
from ...jobs.create import Draft, draft_video, make_job
from ...jobs.job_request import LATENTS
from ...jobs.services import Context
from ...jobs.source_video import read_whole
from ...store.jobs import Job, NotFound
from ...wire.errors import ApiError
from ...wire.requests import Generation
from ..auth import Writer
from ..job_feed import Watch
from .videos import IdempotencyKey, add_image, find_model, parse, refuse_files

router = APIRouter(prefix="/v1/videos", tags=["videos"])
MAX_LATENT_BYTES = 2**28


@router.post("/generations", operation_id="generateVideo")
async def generate(request: Request, caller: Writer, idempotency_key: IdempotencyKey = None) -> Response:
    """Make a video and answer with it."""
    context: Context = request.app.state.context
    with await read_body(request, max_bytes=context.config.max_body_bytes, folder=context.config.scratch) as body:
        asked = parse(Generation, body.fields)
        model = await find_model(request, asked)
        refuse_files(body.files, but="input_reference")
        if asked.boundary_ratio not in (None, model.folder.index.get("boundary_ratio")):
            message = "Invalid 'boundary_ratio': it is the checkpoint's own."
            raise ApiError(400, message, code="unsupported", param="boundary_ratio")
        if asked.response_format == "video_path":
            _allowed(context, "response_format")
        draft = draft_video(asked.video, model)
        draft.request["guidance_scale_2"] = asked.guidance_scale_2
        await add_image(draft, body.files.get("input_reference"), context.config.max_media_pixels)
        if asked.latent_path is not None:
            await asyncio.to_thread(_add_latents, context, draft, asked.latent_path)
        traceparent = request.headers.get("traceparent")
        job = await asyncio.to_thread(
            make_job, context, caller, draft, asked, idempotency_key, "/v1/videos/generations", traceparent
        )
    request.state.job = job.id  # for the log
    job = await _ended(request.app.state.watch, job)
    if job.error_code is not None:
        status = 400 if job.error_code in ("invalid_request", "too_large", "cancelled") else 500
        raise ApiError(status, job.error_message or job.error_code, code=job.error_code, type="video_generation_error")
    data = await asyncio.to_thread(read_whole, context, job)
    if asked.response_format == "raw" or "video/mp4" in request.headers.get("accept", ""):
        return Response(data, media_type="video/mp4", headers={"x-video-id": job.id})
    if asked.response_format == "video_path":
        path = await asyncio.to_thread(_leave, _allowed(context, "response_format") / f"{job.id}.mp4", data)
        return JSONResponse({"video_id": job.id, "video_path": str(path)})
    return JSONResponse({"video_id": job.id, "video_bytes": base64.b64encode(data).decode()})


async def _ended(watch: Watch, job: Job) -> Job:
    async with watch.watching(job) as queue:
        newest: Job | None = job
        while newest is not None and not newest.has_ended:
            newest = await queue.get()
    if newest is None:
        raise NotFound
    return newest


def _allowed(context: Context, param: str) -> Path:
    """Return the operator's directory for files handed over by path. Raises ApiError 400 if there is none."""
    if not context.config.output_dir:
        message = f"Invalid '{param}': this service hands no files over by path."
        raise ApiError(400, message, code="unsupported", param=param)
    return Path(context.config.output_dir).resolve()


def _add_latents(context: Context, draft: Draft, name: str) -> None:
    """Add initial noise [C, T, H, W] from a .npy file in the operator's directory; never a pickle."""
    folder = _allowed(context, "latent_path")
    path = (folder / name).resolve()
    refusal = ApiError(400, "Invalid 'latent_path': a .npy file of float32 [C, T, H, W] in the service's directory.",
                       code="invalid_value", param="latent_path")  # fmt: skip
    if "\0" in name or not path.is_relative_to(folder) or path.suffix != ".npy" or not path.is_file():
        raise refusal
    if path.stat().st_size > MAX_LATENT_BYTES:
        raise refusal
    try:
        latents = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        raise refusal from None
    if latents.ndim != 4 or latents.dtype != np.float32 or not np.isfinite(latents).all():
        raise refusal
    buffer = io.BytesIO()
    np.save(buffer, latents)
    draft.files[LATENTS] = buffer.getvalue()


def _leave(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, path)
    return path
