"""A job's pictures and clips: those that its engine is given, and the files that its client gets."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...runtime.core.request import Video, VideoRequest
from ...runtime.media.clips import Frames, read_video
from ...runtime.media.postprocess import Artifact, Finish, finish, fit
from ..jobs.job_request import EXTEND, IMAGE, SOURCE, video_request

MAX_SOURCE_FRAMES, MAX_SOURCE_PIXELS = 4096, 4096 * 4096
PREVIEW_SIDE = 256  # pixels of a preview's longer side at least: it is looked at, and the model's may be 64


def shown(asked: dict[str, Any], files: dict[str, Path]) -> VideoRequest:
    """Return the engine's request, with the clip that it extends or remakes in the model's own size."""
    request = video_request(asked, files.get(IMAGE))
    if SOURCE not in files:
        return request
    width, height, num_frames = request.size
    frames, _ = read_video(files[SOURCE], MAX_SOURCE_FRAMES, MAX_SOURCE_PIXELS)
    if asked["kind"] == EXTEND:
        return replace(request, video=fit(frames[-asked["context"] :], Finish(width, height)))
    frames = fit(frames[:num_frames], Finish(width, height))
    still = np.repeat(frames[-1:], num_frames - len(frames), axis=0)  # models make 4k+1 frames; the surplus is cut off
    return replace(request, video=np.concatenate((frames, still)), strength=asked["strength"])


def finished(asked: dict[str, Any], files: dict[str, Path], video: Video, folder: Path) -> Artifact:
    """Write the clip and its thumbnail into `folder`, at the size and length that were asked for."""
    width, height = (int(side) for side in asked["size"].split("x"))
    to = Finish(width, height, asked["num_frames"])
    frames = video.frames
    if asked["kind"] == EXTEND:
        source, _ = read_video(files[SOURCE], MAX_SOURCE_FRAMES, MAX_SOURCE_PIXELS)
        frames = fit(frames[asked["context"] :], Finish(width, height))
        frames = np.concatenate((fit(source, Finish(width, height)), frames))
    return finish(frames, video.fps, folder / "video.mp4", folder / "thumbnail.webp", to)


def preview_webp(frames: Frames, fps: float) -> bytes:
    """Return an animated WebP of a preview [T, H, W, 3], enlarged for viewing."""
    height, width = frames.shape[1:3]
    scale = max(1, -(-PREVIEW_SIDE // max(height, width)))
    size = (width * scale, height * scale)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    buffer = BytesIO()
    animation = dict(save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    pictures[0].save(buffer, "WEBP", quality=80, **animation)
    return buffer.getvalue()
