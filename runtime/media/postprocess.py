"""The last stage of every clip that leaves skylapse: to the size and length that were asked for, then into a file.

What has to hold for all of them goes in here, in this order: scale and trim; (later) moderation and the watermark, on
the finished pixels; encode; (later) the signature, last, over the file's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .clips import Frames
from .pictures import PathLike
from .writer import check_writable, replaced_when_complete, write_video

THUMBNAIL_SIDE = 512  # pixels of the longer side at most


@dataclass(frozen=True)
class Finish:
    """What was asked for; None: as the model made it."""

    width: int | None = None
    height: int | None = None
    num_frames: int | None = None


@dataclass(frozen=True)
class Artifact:
    """The files of a finished clip."""

    video: Path
    thumbnail: Path | None
    width: int
    height: int
    num_frames: int
    fps: int

    @property
    def files(self) -> dict[str, Path]:
        """What there is, by what it is."""
        return {"video": self.video} | ({} if self.thumbnail is None else {"thumbnail": self.thumbnail})


def finish(
    frames: Frames, fps: int, video: PathLike, thumbnail: Path | None = None, to: Finish | None = None
) -> Artifact:
    """Write uint8 `frames` [F, H, W, 3] as `video`, and its middle frame as `thumbnail` (.webp), each whole or not.

    ValueError for a suffix that cannot be written or more frames than there are.
    """
    if thumbnail is not None:
        check_writable(thumbnail, (".webp",), "thumbnail")
    frames = fit(frames, to or Finish())
    path = write_video(video, frames, fps)
    if thumbnail is not None:
        image = Image.fromarray(frames[len(frames) // 2])
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        with replaced_when_complete(thumbnail) as unfinished:
            image.save(unfinished, "WEBP", quality=90)
    num_frames, height, width, _ = frames.shape
    return Artifact(path, thumbnail, width, height, num_frames, fps)


def fit(frames: Frames, to: Finish) -> Frames:
    """The first `num_frames` frames, scaled (Lanczos) until they cover width x height, and cut at the middle."""
    num_frames, height, width, _ = frames.shape
    if to.num_frames is not None and to.num_frames > num_frames:
        raise ValueError(f"num_frames must be at most the {num_frames} there are, got {to.num_frames}")
    frames = frames[: to.num_frames]
    wide, high = to.width or width, to.height or height
    if (wide, high) == (width, height):
        return frames
    scale = max(wide / width, high / height)
    left, top = (width - wide / scale) / 2, (height - high / scale) / 2
    box = (left, top, width - left, height - top)
    return np.stack([_scaled(frame, (wide, high), box) for frame in frames])


def _scaled(frame: Frames, size: tuple[int, int], box: tuple[float, float, float, float]) -> Frames:
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box=box))
