"""Pictures and clips from clients: recognised by their bytes, decoded in their own process, refused in our words.

Whatever happens in that process (a crash, no memory, an endless loop, nonsense as its answer) is an ApiError here: 400
where the file is at fault, 503 where we are, as when the process is killed or cannot start.
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
from typing import IO, Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...runtime.media.kinds import CLIPS, PICTURES, kind_of
from ...runtime.media.refusal import MAX_FPS, MAX_PIXELS, MAX_SIDE, OUT_OF_BOUNDS, SENTENCES, Bounds, Medium, sentence
from ..wire.errors import ApiError

T = TypeVar("T")

MAX_SECONDS = 120.0
# Limits of a decoder. Pictures of 4096x4096 took 0.9 s (JPEG), 2.4 s (WebP) and 560 MiB of addresses, 216 of them
# before the file was opened; without the limit a PNG of 17 KB takes 704 MB.
IMAGE_CPU_S, VIDEO_CPU_S = 15, 60
WALL_PER_CPU = 3.0  # the cores are the engine's, too
MEMORY_BYTES, MEMORY_BYTES_A_PIXEL = 384 * 2**20, 32
MAX_ANSWER_BYTES = 1000
NPY_HEADER_BYTES = 128
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)  # by what it read

# Two at a time, since each may take a core and a gigabyte; threads of their own, so that nothing else waits for them.
_decoders = ThreadPoolExecutor(2, thread_name_prefix="media")
_places = BoundedSemaphore(18)  # decoding or waiting; beyond it clients are asked to come back
_PYTHON = (sys.executable, "-I", "-m", f"{__package__}.media_worker")  # -I: no module from the folder or PYTHONPATH
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # no secret of ours; a thread a core would each reserve memory

logger = logging.getLogger(__name__)


class Found(BaseModel):
    """The worker's report on a file that it has decoded; believed within bounds only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    width: Annotated[int, Field(ge=1, le=MAX_SIDE)]  # as it is shown
    height: Annotated[int, Field(ge=1, le=MAX_SIDE)]
    frames: Annotated[int, Field(ge=1, lt=2**31)]  # at `fps`
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _is_a_reason(word: str) -> str:
    if word not in SENTENCES:
        raise ValueError("no such reason")
    return word


class Refusal(BaseModel):
    """A refusal by the worker: a reason of `runtime.media.refusal`, and what was found: numbers or a name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: Annotated[str, AfterValidator(_is_a_reason)]
    got: Annotated[str, Field(pattern=r"^[A-Za-z0-9 .:/_-]{0,40}$")] = ""


ANSWER: TypeAdapter[Found | Refusal] = TypeAdapter(Found | Refusal)


@dataclass(frozen=True)
class DecodedVideo:
    """Frames for a model, and the facts of their source."""

    frames_path: Path  # .npy, uint8 [frames, height, width, 3], beside the upload and gone with it
    source_width: int  # as it is shown
    source_height: int
    source_frames: int  # of the whole source, at `fps`
    fps: float


@dataclass(frozen=True)
class _Upload:
    """A file to decode, and its name in refusals."""

    path: Path
    param: str
    medium: Medium
    bounds: Bounds
    task: dict[str, Any]  # of media_worker.Task, as far as it is known

    def refusal(self, word: str, got: str = "") -> ApiError:
        message = f"Invalid '{self.param}': {sentence(word, self.medium, self.bounds, got)}."
        code = "invalid_image" if self.medium == "picture" else "invalid_video"
        return ApiError(400, message, code="file_too_large" if word in OUT_OF_BOUNDS else code, param=self.param)


async def decode_image(
    source: Path, width: int, height: int, *, max_pixels: int = MAX_PIXELS, param: str = "input_reference"
) -> bytes:
    """Return a PNG of `width` x `height` with exactly the pixels that `runtime.media.pictures.read_image` returns.

    ApiError 400 for what is no still PNG, JPEG or WebP within the bounds; 503 while too many wait for a decoder.
    """
    bounds = Bounds(max_pixels=max_pixels)
    task = {"width": width, "height": height, "max_pixels": max_pixels, "max_cpu_s": IMAGE_CPU_S}
    return await _in_a_thread(partial(_decode_image, _Upload(source, param, "picture", bounds, task)))


async def measure_video(
    source: Path,
    *,
    fps: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    param: str = "video",
) -> Found:
    """Return a clip's size as it is shown, and its number of frames at `fps` (None: its own rate); errors as below."""
    task = {"width": 1, "height": 1, "max_frames": 0, "fps": fps}
    upload = _clip(source, param, max_pixels, max_seconds, task)
    return await _in_a_thread(partial(_measure_video, upload))


async def decode_video(
    source: Path,
    width: int,
    height: int,
    *,
    max_frames: int,
    keep: Literal["first", "last"],
    fps: float | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    param: str = "video",
) -> DecodedVideo:
    """Decode the first or last `max_frames` of a clip at `fps`, each fitted to `width` x `height` like a picture.

    ApiError 400 for what is no mp4, mov, mkv or webm within the bounds; 503 while too many wait for a decoder.
    """
    task = {"width": width, "height": height, "max_frames": max_frames, "keep": keep, "fps": fps}
    upload = _clip(source, param, max_pixels, max_seconds, task)
    return await _in_a_thread(partial(_decode_video, upload))


def _clip(source: Path, param: str, max_pixels: int, max_seconds: float, task: dict[str, Any]) -> _Upload:
    bounds = Bounds(max_pixels=max_pixels, max_seconds=max_seconds, max_frames=int(max_seconds * MAX_FPS))
    task |= {"max_pixels": max_pixels, "max_seconds": max_seconds, "max_source_frames": bounds.max_frames}
    return _Upload(source, param, "clip", bounds, task | {"max_cpu_s": VIDEO_CPU_S})


async def _in_a_thread(decode: Callable[[], T]) -> T:
    if not _places.acquire(blocking=False):
        message = "Too many uploads are being decoded."
        raise ApiError(503, message, code="overloaded", type="server_error", retry_after_s=5)
    try:
        return await asyncio.get_running_loop().run_in_executor(_decoders, decode)
    finally:
        _places.release()


# ------------------------------------------------------------------------------------------------- in the thread


def _decode_image(upload: _Upload) -> bytes:
    task = upload.task
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", task["width"], task["height"])
    with _decoded(upload, PICTURES) as (output, _):
        png = output.read_bytes()
        if not png.startswith(header):
            raise ValueError("no PNG of that size")
    output.unlink()
    return png


def _measure_video(upload: _Upload) -> Found:
    with _decoded(upload, CLIPS) as (output, found):
        output.unlink()
    return found


def _decode_video(upload: _Upload) -> DecodedVideo:
    with _decoded(upload, CLIPS) as (output, found):
        if not _holds_frames(output, upload.task):
            raise ValueError("no frames of that size")
    return DecodedVideo(output, found.width, found.height, found.frames, found.fps)


def _holds_frames(npy: Path, task: dict[str, Any]) -> bool:
    """Return whether the file has the one valid header: numpy's own reading of nonsense raises many kinds of error."""
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
def _decoded(upload: _Upload, kinds: tuple[str, ...]) -> Iterator[tuple[Path, Found]]:
    """Yield the worker's output and its report on the source; the output is removed if the block raises."""
    source, bounds = upload.path, upload.bounds
    with source.open("rb") as file:
        if (kind := kind_of(file)) not in kinds:  # which the worker would say, too: a process less
            raise upload.refusal("kind", kind)
    output = source.with_name(f"{source.name}-{secrets.token_hex(4)}.{'png' if upload.medium == 'picture' else 'npy'}")
    memory = MEMORY_BYTES + MEMORY_BYTES_A_PIXEL * bounds.max_pixels + 2 * source.stat().st_size
    places = {"source": str(source), "output": str(output), "medium": upload.medium, "max_memory_bytes": memory}
    try:
        answer = _answer_of_worker(upload.task | places)
        if isinstance(answer, Refusal):
            raise upload.refusal(answer.refused, answer.got)
        try:
            yield output, answer
        except (OSError, ValueError) as error:
            logger.error("a decoder left no output that could be read: %r", error)
            raise _unavailable() from error
    except BaseException:
        output.unlink(missing_ok=True)
        raise


def _answer_of_worker(task: dict[str, Any]) -> Found | Refusal:
    """Return the worker's answer however it ends. It is read from a file: a pipe is read while something writes to it.

    The file is at fault if the worker says so, crashes by what it reads, or uses up the time of a core that it has.
    Anything else is our fault: the system kills it for want of memory, or an operator does; time on the clock passes
    because other processes have the cores.
    """
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as complaints:
        command = [*_PYTHON, json.dumps(task)]
        timeout_s = WALL_PER_CPU * task["max_cpu_s"]
        try:
            code: int | None = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answers,
                stderr=complaints,
                env=_ENVIRONMENT,
                timeout=timeout_s,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        ready, _, answer = _beginning(answers).partition(b"\n")
        complaint = _ending(complaints)
    if ready == b"ready":  # before, it has not touched the file yet
        if code == -signal.SIGXCPU:
            return Refusal(refused="costly")
        if code is not None and -code in CRASHES:
            logger.warning("a decoder crashed (status %d): %r", code, complaint)
            return Refusal(refused="crash")
        if code == 0:
            try:
                return ANSWER.validate_json(answer)
            except ValidationError:
                pass
    outcome = f"took more than {timeout_s:g} s" if code is None else f"ended with status {code}"
    logger.error("a decoder gave no answer: it %s: %r", outcome, complaint)
    raise _unavailable()


def _unavailable() -> ApiError:
    message = "Uploads cannot be decoded at the moment."
    return ApiError(503, message, code="decoder_unavailable", type="server_error", retry_after_s=5)


def _beginning(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(MAX_ANSWER_BYTES)


def _ending(file: IO[bytes]) -> bytes:
    """Return the end of a traceback, since its last line says most."""
    file.seek(max(0, file.seek(0, 2) - MAX_ANSWER_BYTES))
    return file.read(MAX_ANSWER_BYTES)
