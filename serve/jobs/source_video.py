"""Clips that requests start from: one of the tenant's finished videos, or one that was sent; an mp4 of our own making
either way, beside the job that starts from it."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.core.request import frames_for
from ...runtime.media.writer import write_video
from ..intake.body import Upload
from ..intake.media import decode_video, measure_video
from ..store.jobs import Job
from ..store.tables import COMPLETED
from ..wire.errors import ApiError
from .output_shape import Shape, nearest
from .served_models import ServedModel
from .services import Context

MAX_DECODED_BYTES = 2**30  # of a clip that was sent: 388 frames at 1280x720


@dataclass(frozen=True)
class Source:
    """A clip that a request starts from."""

    data: bytes  # mp4
    sha256: str
    width: int
    height: int
    num_frames: int
    fps: int

    def shape_for(self, model: ServedModel, whole: bool = True) -> Shape:
        """Return the clip's own size and length with the model's. Raises ApiError 400 if the whole clip is too long."""
        native = nearest(self.width, self.height, model.native_sizes)
        frames = frames_for(self.num_frames, model.limits)
        if whole and frames > model.limits.max_num_frames:
            longest = f"{model.limits.max_num_frames} frames, {model.limits.max_num_frames / self.fps:.4g} s"
            message = f"Invalid 'video': it has {self.num_frames} frames, and this model remakes at most {longest}."
            raise ApiError(400, message, code="invalid_value", param="video")
        return Shape(self.width, self.height, self.num_frames, self.fps, *native, frames)


def finished_source(context: Context, job: Job) -> Source:
    """Return a finished job's clip. Raises ApiError 400 or 404 if there is no file (yet, or any more)."""
    data = read_whole(context, job)
    width, height = (int(side) for side in job.request["size"].split("x"))
    return Source(data, video_of(job)["sha256"], width, height, job.request["num_frames"], job.request["fps"])


def read_whole(context: Context, job: Job) -> bytes:
    """Return a finished job's mp4. Raises ApiError 400 or 404 if there is none."""
    try:
        return b"".join(context.artifacts.read(video_of(job)["key"]))
    except FileNotFoundError:  # deleted since its row was read
        raise files_gone() from None


def files_gone() -> ApiError:
    return ApiError(404, "The files of this video are gone.", code="video_expired", param="video_id")


def video_of(job: Job, variant: str = "video") -> dict[str, str]:
    """Return the record of a finished job's file. Raises ApiError if there is none (yet, or any more)."""
    if job.has_expired:
        raise files_gone()
    if job.state != COMPLETED:
        if job.has_ended:
            raise ApiError(400, "This video has failed, so there is no file.", code="video_failed", param="video_id")
        raise ApiError(400, "This video is not finished yet.", code="video_not_ready", param="video_id")
    found: dict[str, str] = (job.artifacts or {})[variant]
    return found


async def sent_source(context: Context, upload: Upload, model: ServedModel) -> Source:
    """Decode a clip that was sent in a process of its own, and write it anew at the model's frame rate.

    Raises ApiError 400 if it is no clip within the bounds.
    """
    config, fps = context.config, model.defaults.fps
    asked: dict[str, Any] = dict(fps=fps, max_pixels=config.max_media_pixels, max_seconds=config.max_media_seconds)
    found = await measure_video(upload.path, **asked)
    width, height = found.width // 2 * 2, found.height // 2 * 2  # H.264 has half as many colours a side
    max_frames = max(1, MAX_DECODED_BYTES // (3 * width * height))
    if found.frames > max_frames:
        message = f"Invalid 'video': at {width}x{height} it may have at most {max_frames} frames, got {found.frames}."
        raise ApiError(400, message, code="file_too_large", param="video")
    decoded = await decode_video(upload.path, width, height, max_frames=found.frames, keep="first", **asked)
    return await asyncio.to_thread(_written, decoded.frames_path, fps, upload.sha256)


def _written(frames_path: Path, fps: int, sha256: str) -> Source:
    frames = np.load(frames_path, mmap_mode="r")
    with tempfile.TemporaryDirectory(dir=frames_path.parent) as folder:
        data = write_video(Path(folder) / "source.mp4", frames, fps).read_bytes()
    num_frames, height, width, _ = frames.shape
    return Source(data, sha256, width, height, num_frames, fps)
