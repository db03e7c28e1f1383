"""Pictures and clips that clients send: told by their bytes, decoded in a process of its own, refused in words of ours.

Whatever happens in that process (a crash, no memory, an endless loop, nonsense as its answer) is an ApiError here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore
from typing import IO, Annotated, Any, Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import ApiError

Kind: TypeAlias = Literal["png", "jpeg", "webp", "mp4"]
T = TypeVar("T")

MAX_PIXELS = 4096 * 4096  # of a picture, if the caller has no bound of its own; sides are bounded in the worker
MAX_SECONDS = 120.0
# Of a decoder. Pictures of 4096x4096 took 0.9 s (JPEG), 2.4 s (WebP) and 560 MiB of addresses, 216 of them before the
# file was opened; without the limit a PNG of 17 KB takes 704 MB.
IMAGE_CPU_S, VIDEO_CPU_S = 15, 60
WALL_PER_CPU = 3.0  # the cores are the engine's, too
MEMORY_BYTES, MEMORY_BYTES_A_PIXEL = 384 * 2**20, 32
MAX_ANSWER_BYTES = 1000
NPY_HEADER_BYTES = 128

# Two at a time, since each may take a core and a gigabyte; threads of their own, so that nothing else waits for them.
_decoders = ThreadPoolExecutor(2, thread_name_prefix="media")
_places = BoundedSemaphore(18)  # decoding or waiting; beyond it clients are asked to come back
_PYTHON = (sys.executable, "-I", "-m", f"{__package__}.media_worker")  # -I: no module from the folder or PYTHONPATH
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # no secret of ours; a thread a core would each reserve memory

MP4_BRANDS = {*(b"iso%d" % version for version in range(2, 10)), b"isom", b"mp41", b"mp42", b"avc1", b"M4V ", b"dash"}

REFUSALS = {
    "broken": "must be an intact {what} file",
    "codec": "must hold H.264, H.265, VP9, AV1 or MPEG-4 video",
    "animated": "must be a still picture, not an animation",
    "small": "must be at least 16x16 pixels",
    "large": "must be at most 4096 pixels on a side and {max_pixels} pixels in all",
    "long": "must last at most {max_seconds:g} seconds, at 120 frames a second at most",
    "costly": "takes more time or memory to decode than is allowed",
}
TOO_LARGE = ("large", "long")

logger = logging.getLogger(__name__)


class Found(BaseModel):
    """What the worker says of a file that it has decoded; believed within bounds only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    width: Annotated[int, Field(ge=1, le=4096)]
    height: Annotated[int, Field(ge=1, le=4096)]
    frames: Annotated[int, Field(ge=1, lt=2**31)]
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Refusal(BaseModel):
    """A word of the table above."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: Literal["broken", "codec", "animated", "small", "large", "long", "costly"]


ANSWER: TypeAdapter[Found | Refusal] = TypeAdapter(Found | Refusal)


@dataclass(frozen=True)
class DecodedVideo:
    """Frames for a model, and what they were taken from."""

    frames_path: Path  # .npy, uint8 [frames, height, width, 3], beside the upload and gone with it
    source_width: int  # upright
    source_height: int
    source_frames: int
    fps: float


async def decode_image(
    source: Path, width: int, height: int, *, max_pixels: int = MAX_PIXELS, param: str = "input_reference"
) -> bytes:
    """A PNG of exactly `width` x `height` with the pixels that `runtime.video_file.read_image` makes of the file.

    ApiError 400 for what is no still PNG, JPEG or WebP within the bounds; 503 while too many wait for a decoder.
    """
    task = {"kind": sniff(source), "width": width, "height": height, "max_pixels": max_pixels}
    if task["kind"] not in ("png", "jpeg", "webp"):
        raise _refusal("broken", param, task)
    return await _in_a_thread(partial(_decode_image, source, task, param))


async def decode_video(
    source: Path,
    width: int,
    height: int,
    *,
    max_frames: int,
    keep: Literal["first", "last"],
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    param: str = "video",
) -> DecodedVideo:
    """The first or the last `max_frames` frames of an mp4, each fitted to `width` x `height` as a picture is.

    ApiError 400 for what is no mp4 within the bounds; 503 while too many wait for a decoder.
    """
    task = {"kind": "mp4", "width": width, "height": height, "max_frames": max_frames, "keep": keep}
    task |= {"max_pixels": max_pixels, "max_seconds": max_seconds}
    if sniff(source) != "mp4":
        raise _refusal("broken", param, task)
    return await _in_a_thread(partial(_decode_video, source, task, param))


def sniff(path: Path) -> Kind | None:
    """What a file is by its first bytes; names and media types are the client's word."""
    with path.open("rb") as file:
        head = file.read(12)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and head[8:] in MP4_BRANDS:  # `ftypheic`, say, is a picture that FFmpeg would open, too
        return "mp4"
    return None


async def _in_a_thread(decode: Callable[[], T]) -> T:
    if not _places.acquire(blocking=False):
        message = "Too many uploads are being decoded."
        raise ApiError(503, message, code="overloaded", type="server_error", retry_after_s=5)
    try:
        return await asyncio.get_running_loop().run_in_executor(_decoders, decode)
    finally:
        _places.release()


# ------------------------------------------------------------------------------------------------- in the thread


def _decode_image(source: Path, task: dict[str, Any], param: str) -> bytes:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", task["width"], task["height"])
    with _decoded(source, task | {"max_cpu_s": IMAGE_CPU_S}, param) as (output, _):
        png = output.read_bytes()
        if not png.startswith(header):
            raise ValueError("no PNG of that size")
    output.unlink()
    return png


def _decode_video(source: Path, task: dict[str, Any], param: str) -> DecodedVideo:
    with _decoded(source, task | {"max_cpu_s": VIDEO_CPU_S}, param) as (output, found):
        if not _holds_frames(output, task):
            raise ValueError("no frames of that size")
    return DecodedVideo(output, found.width, found.height, found.frames, found.fps)


def _holds_frames(npy: Path, task: dict[str, Any]) -> bool:
    """By the one header that the file can have: numpy's own reading of nonsense ends in errors of many kinds."""
    num_bytes, frame_bytes = npy.stat().st_size, 3 * task["width"] * task["height"]
    num_frames = (num_bytes - NPY_HEADER_BYTES) // frame_bytes
    shape = (num_frames, task["height"], task["width"], 3)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with npy.open("rb") as file:
        is_whole = file.read(NPY_HEADER_BYTES) == header.getvalue()
    return (
        is_whole and num_bytes == NPY_HEADER_BYTES + num_frames * frame_bytes and 1 <= num_frames <= task["max_frames"]
    )


@contextmanager
def _decoded(source: Path, task: dict[str, Any], param: str) -> Iterator[tuple[Path, Found]]:
    """The worker's output and what it says of the source; the output is removed where the block finds fault with it."""
    output = source.with_name(f"{source.name}-{secrets.token_hex(4)}.{'npy' if 'keep' in task else 'png'}")
    memory = MEMORY_BYTES + MEMORY_BYTES_A_PIXEL * task["max_pixels"] + source.stat().st_size
    task = task | {"source": str(source), "output": str(output), "max_memory_bytes": memory}
    try:
        answer = _answer_of_worker(task)
        if isinstance(answer, Refusal):
            raise _refusal(answer.refused, param, task)
        try:
            yield output, answer
        except (OSError, ValueError) as error:
            logger.warning("a decoder left no output that could be read: %r", error)
            raise _refusal("broken", param, task) from error
    except BaseException:
        output.unlink(missing_ok=True)
        raise


def _answer_of_worker(task: dict[str, Any]) -> Found | Refusal:
    """However it ends. Its answer goes to a file: a pipe would be read for as long as something writes to it."""
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as complaints:
        command = [*_PYTHON, json.dumps(task)]
        timeout_s = WALL_PER_CPU * task["max_cpu_s"]
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answers,
                stderr=complaints,
                env=_ENVIRONMENT,
                timeout=timeout_s,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        ready, _, answer = _beginning(answers).partition(b"\n")
        complaint = _beginning(complaints)
    if ready != b"ready":  # it has not touched the file yet: the fault is ours
        logger.error("a decoder did not start (status %d): %r", code, complaint)
        message = "Uploads cannot be decoded at the moment."
        raise ApiError(503, message, code="decoder_unavailable", type="server_error", retry_after_s=5)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):  # by the limit of time or, of memory, by the system
        return Refusal(refused="costly")
    try:
        if code == 0:
            return ANSWER.validate_json(answer)
    except ValidationError:
        pass
    logger.warning("a decoder ended without an answer (status %d): %r", code, complaint)
    return Refusal(refused="broken")


def _beginning(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(MAX_ANSWER_BYTES)


def _refusal(word: str, param: str, task: dict[str, Any]) -> ApiError:
    what, kind = ("mp4", "video") if "keep" in task else ("PNG, JPEG or WebP", "image")
    message = f"Invalid '{param}': {REFUSALS[word].format(what=what, **task)}."
    return ApiError(400, message, code="file_too_large" if word in TOO_LARGE else f"invalid_{kind}", param=param)
