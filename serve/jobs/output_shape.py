"""Chooses the shape that a model makes for a request: the nearest native size, and enough frames.

A finished clip is scaled with its aspect kept, cut at the middle and trimmed to what was asked (`finish`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any

from ...runtime.core.request import ModelDefaults, ModelLimits, frames_for, longest_seconds
from ..wire.errors import ApiError
from ..wire.requests import CreateVideo


@dataclass(frozen=True)
class Shape:
    """The size and length that a client asked for, and the native ones that the model makes."""

    width: int
    height: int
    num_frames: int
    fps: int
    native_width: int
    native_height: int
    native_frames: int

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def native_size(self) -> str:
        return f"{self.native_width}x{self.native_height}"

    @property
    def seconds(self) -> str:
        return f"{self.num_frames / self.fps:g}"

    def describe(self) -> dict[str, Any]:
        """Return the fields of a job's row that describe the shape."""
        return {
            "size": self.size,
            "seconds": self.seconds,
            "num_frames": self.num_frames,
            "fps": self.fps,
            "native_size": self.native_size,
            "native_frames": self.native_frames,
        }


def shape_of(
    asked: CreateVideo, native_sizes: Sequence[tuple[int, int]], defaults: ModelDefaults, limits: ModelLimits
) -> Shape:
    """Return the shape. Raises ApiError 400, naming the model's maximum, for a clip too long or not to be scaled."""
    fps = asked.fps or defaults.fps
    if asked.size is None:
        width, height = defaults.width, defaults.height
    else:
        width, height = (int(side) for side in asked.size.split("x"))
    native = (width, height) if (width, height) in native_sizes else nearest(width, height, native_sizes)
    if not asked.resize and native != (width, height):
        sizes = ", ".join(f"{w}x{h}" for w, h in native_sizes)
        message = f"Invalid 'size': this model makes {sizes}, and resize is false."
        raise ApiError(400, message, code="invalid_value", param="size")
    num_frames, native_frames = _length(asked, fps, defaults, limits)
    return Shape(width, height, num_frames, fps, *native, native_frames)


def nearest(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size nearest in aspect, and of those that are equally near the one nearest in pixels."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(log(size[0] / size[1]) - log(width / height))
        return round(aspect, 6), abs(log(size[0] * size[1]) - log(width * height))

    return min(sizes, key=distance)


def _length(asked: CreateVideo, fps: int, defaults: ModelDefaults, limits: ModelLimits) -> tuple[int, int]:
    """Return (frames of the clip, frames that the model makes)."""
    if asked.num_frames is not None and asked.seconds is not None:
        message = "Invalid 'num_frames': give seconds or num_frames, not both."
        raise ApiError(400, message, code="invalid_value", param="num_frames")
    if asked.seconds is not None:
        name, wanted = "seconds", ceil(round(float(asked.seconds) * fps, 6))
    else:
        name, wanted = "num_frames", asked.num_frames or defaults.num_frames
    native = frames_for(wanted, limits)
    if native > limits.max_num_frames:
        longest = f"{limits.max_num_frames} frames, {longest_seconds(limits.max_num_frames, fps)} s at {fps} fps"
        raise ApiError(400, f"Invalid '{name}': this model makes at most {longest}.", code="invalid_value", param=name)
    return wanted, native
