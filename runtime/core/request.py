"""A request to a model and its result: VideoRequest, its bounds, and Video."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import floor
from reprlib import repr as short  # a wrong value is shown, but never a megabyte of it
from typing import TYPE_CHECKING

from ..cache.spec import check_cache

if TYPE_CHECKING:  # torch-free and numpy-free: a request is made and refused before anything heavy is imported
    from pathlib import Path
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from ..cache.step_cache import CacheReport
    from .usage import Usage

    Frames: TypeAlias = NDArray[np.uint8]  # [frames, height, width, 3]
    ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]  # an array is [height, width, 3]

MAX_PROMPT_CHARACTERS = 10_000
MIN_SIDE, MAX_SIDE = 16, 4096  # of a frame, in pixels
SOLVERS = ("unipc", "euler", "dpmpp")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRequest:
    """One video to make; None means the checkpoint's own default. ValueError names the first field out of bounds.

    image, last_image: become the first and the last frame, to the pixel where the model takes clean frames.
    video: a path (mp4, mov, mkv, webm) or uint8 [4k+1, height, width, 3]. Alone it is the beginning of the clip, kept
        and continued: num_frames counts its frames in and must be above their number.
    strength: the clip is made from `video` instead (SDEdit, arXiv 2108.01073): all of its num_frames frames (None: as
        many as it has) are noised to where the last int(strength * num_inference_steps) steps begin, and only these,
        one at least, are taken. At 1 it differs from a clip without `video` by (1 - sigma) of it in the initial noise:
        1e-6 with UniPC, nothing with Euler.

    All of them are scaled until they cover width x height and cropped at the centre. Every frame of a video counts as
    one, whatever its rate.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None  # of the second, low-noise expert of a model that has two
    guidance_interval: tuple[float, float] | None = None  # noise levels (low, high) outside which there is no guidance
    solver: str | None = None
    shift: float | None = None
    seed: int = 0
    image: ImageSource | None = None
    last_image: ImageSource | None = None
    video: str | os.PathLike[str] | Frames | None = None
    strength: float | None = None
    cache: str | None = (
        "none"  # high, balanced, fast, or a policy: "easy", "easy:0.1", "first_block:threshold=0.1,order=1"
    )

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt[:20]!r}")
        _check_text("negative_prompt", self.negative_prompt)

        _check_whole("width", self.width, MIN_SIDE, MAX_SIDE)
        _check_whole("height", self.height, MIN_SIDE, MAX_SIDE)
        _check_whole("num_frames", self.num_frames, 1, 1025)
        # The nearest shapes that a model takes are known only with its limits: `check_shape` names them.
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side % 8:
                raise ValueError(f"{name} must be a multiple of 8 (of 32 to suit every model), got {side}")
        if self.num_frames is not None and (self.num_frames - 1) % 4:
            raise ValueError(f"num_frames must be 4k+1, got {self.num_frames}")
        _check_whole("fps", self.fps, 1, 120)

        _check_whole("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_real("guidance_scale", self.guidance_scale, 0, 100)
        _check_real("guidance_scale_2", self.guidance_scale_2, 0, 100)
        _check_interval("guidance_interval", self.guidance_interval)
        _check_choice("solver", self.solver, SOLVERS)
        _check_real("shift", self.shift, 0, 100, above=True)
        _check_whole("seed", self.seed, 0, 2**63 - 1, required=True)

        _check_pixels("image", self.image, num_axes=3)
        _check_pixels("last_image", self.last_image, num_axes=3)
        _check_pixels("video", self.video, num_axes=4)
        _check_real("strength", self.strength, 0, 1, above=True)
        if self.cache is not None:
            _check_text("cache", self.cache)
            check_cache(self.cache)

    def resolved(self, defaults: ModelDefaults, limits: ModelLimits) -> VideoRequest:
        """Return the request with the model's defaults in place of None; ValueError if the model cannot make it."""
        missing = {f.name: getattr(defaults, f.name) for f in fields(defaults) if getattr(self, f.name) is None}
        if "num_frames" in missing and self.video is not None and self.strength is not None:
            from ..conditioning.given import count_video

            missing["num_frames"] = count_video(self)
        request = replace(self, **missing)
        check_shape(*request.size, limits)
        return request

    @property
    def continues_video(self) -> bool:
        """Return whether `video` is the beginning of the clip, rather than what it is made from."""
        return self.video is not None and self.strength is None

    @property
    def size(self) -> tuple[int, int, int]:
        """Return (width, height, num_frames) of a resolved request."""
        assert self.width is not None and self.height is not None and self.num_frames is not None, "not resolved yet"
        return self.width, self.height, self.num_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDefaults:
    """A checkpoint's defaults for fields that a request leaves None; they are named as in VideoRequest."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    solver: str | None = None
    shift: float | None = None
    cache: str = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """The shapes that a checkpoint can make."""

    size_multiple: int  # of width and height: VAE compression times patch size
    temporal_multiple: int = 4  # num_frames is a multiple of it, plus one
    max_num_frames: int
    max_pixels: int  # of one frame
    max_prompt_tokens: int = 512


def check_shape(width: int, height: int, num_frames: int, limits: ModelLimits) -> None:
    """Raise ValueError for a shape that a model cannot make, naming the nearest that it can."""
    for name, side, other in (("width", width, height), ("height", height, width)):
        highest = min(MAX_SIDE, limits.max_pixels // max(other, MIN_SIDE))
        _check_multiple(name, side, limits.size_multiple, 0, range(MIN_SIDE, highest + 1))
    _check_multiple("num_frames", num_frames, limits.temporal_multiple, 1, range(1, limits.max_num_frames + 1))
    if num_frames > limits.max_num_frames:
        raise ValueError(f"num_frames must be at most {limits.max_num_frames} for this model, got {num_frames}")
    if width * height > limits.max_pixels:
        asked = f"{width}x{height} ({width * height})"
        raise ValueError(f"width x height must be at most {limits.max_pixels} pixels for this model, got {asked}")


def longest_seconds(num_frames: int, fps: float) -> str:
    """Return the seconds that so many frames last, rounded down to thousandths so that it never tells too much."""
    return f"{floor(num_frames * 1000 / fps) / 1000:g}" if num_frames / fps < 1000 else f"{floor(num_frames / fps)}"


def frames_for(wanted: int, limits: ModelLimits) -> int:
    """Return the smallest number of frames that a model can make and that is at least `wanted`."""
    return -(-(wanted - 1) // limits.temporal_multiple) * limits.temporal_multiple + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMetadata:
    """The way that a video was made: enough to make it again."""

    request: VideoRequest | None = None  # resolved, so no default is left to guess
    model: str | None = None
    timings_s: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds
    cache: CacheReport | None = None
    cut_tokens: Mapping[str, int] = field(
        default_factory=dict
    )  # prompt, negative_prompt -> its last that were not read
    peak_bytes: int | None = None  # most device memory held meanwhile, by all; None where the device does not count it
    lossy_kernels: tuple[str, ...] = ()  # asked for, and less exact than rounding alone: ("attention=sage",)
    usage: Usage | None = None  # in the engine that finished it; without what an engine did before a checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Finished frames, uint8 [frames, height, width, 3], to be shown at `fps`."""

    frames: Frames
    fps: int
    metadata: VideoMetadata = field(default_factory=VideoMetadata)

    def __post_init__(self) -> None:
        assert self.frames.ndim == 4 and self.frames.shape[3] == 3, self.frames.shape
        assert self.frames.dtype == "uint8" and len(self.frames) > 0, (self.frames.dtype, len(self.frames))

    @property
    def num_frames(self) -> int:
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.fps

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write .mp4, or lossless .webp and .png, or .gif, whole or not at all; returns the path."""
        from ..media.postprocess import finish

        return finish(self.frames, self.fps, path).video


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {short(text)}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
    if "\0" in text:
        raise ValueError(f"{name} must not contain NUL, got one at character {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of argv that are no UTF-8 arrive as lone surrogates
        raise ValueError(f"{name} must be valid Unicode, got a broken character at {error.start}") from error


def _check_whole(name: str, value: object, low: int, high: int, *, required: bool = False) -> None:
    if value is None and not required:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {short(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _check_real(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise ValueError unless `value` is None or a number from `low` to `high`; `above`: and not `low` itself.

    NaN is out of every range, since no comparison with it holds."""
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {short(value)}")
    if not low <= value <= high or (above and value == low):
        allowed = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _check_interval(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of noise levels (low, high), got {short(value)}")
    for level in value:
        _check_real(name, level, 0, 1)
    if value[0] > value[1]:
        raise ValueError(f"{name} must be (low, high), got {value}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got {short(value)}")


def _check_multiple(name: str, value: int, multiple: int, more: int, allowed: range) -> None:
    """Raise ValueError unless `value` is a multiple, plus `more`; it names the nearest ones that are `allowed`."""
    if not (surplus := (value - more) % multiple):
        return
    near = [near for near in (value - surplus, value - surplus + multiple) if near in allowed]
    nearest = f" (nearest: {' or '.join(map(str, near))})" if near else ""
    wanted = f"{multiple}k+{more}" if more else f"a multiple of {multiple}"
    raise ValueError(f"{name} must be {wanted} for this model, got {value}{nearest}")


def _check_pixels(name: str, value: object, num_axes: int) -> None:
    """Raise ValueError unless it is a path, a PIL image (if `num_axes` is 3) or uint8 [(frames,) height, width, 3]."""
    if value is None or isinstance(value, str | os.PathLike):
        return
    # An object is an instance of numpy's or PIL's classes only if someone has imported them already.
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
        shape = "[height, width, 3]" if num_axes == 3 else "[frames, height, width, 3]"
        if value.dtype != numpy.uint8 or value.ndim != num_axes or value.shape[-1] != 3 or not value.size:
            raise ValueError(f"{name} must be uint8 {shape}, got {value.dtype} {list(value.shape)}")
        return
    pil = sys.modules.get("PIL.Image")
    if num_axes == 3 and pil and isinstance(value, pil.Image):
        return
    kinds = "a path, a PIL image or a uint8 array" if num_axes == 3 else "a path or a uint8 array"
    raise ValueError(f"{name} must be {kinds}, got {short(value)}")
