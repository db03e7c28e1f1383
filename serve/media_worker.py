"""The program that decodes one upload, in a process of its own: what a decoder does in there ends in there.

    python -I -m skylapse.serve.media_worker '{"source": ..., "output": ..., "kind": "png", ...}'

It prints "ready" and then a line of JSON: what it found, or in one word why it refuses, {"refused": "broken"}.
Sentences are media.py's: what decoders say may hold addresses of memory (CVE-2026-22778).
"""

from __future__ import annotations

import errno
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal

import av
import av.subtitles.stream  # PyAV and Pillow import these two when they first need them, which is too late in here
import numpy as np
import PIL.TiffImagePlugin  # noqa: F401  # which reads EXIF
from av.container import InputContainer
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..runtime.video_file import read_image, upright

MIN_SIDE, MAX_SIDE = 16, 4096
MAX_FPS = 120
OPENERS: dict[str, Callable[[BinaryIO], Image.Image]] = {
    "png": PngImageFile,
    "jpeg": JpegImageFile,
    "webp": WebPImageFile,
}
CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to decode and how far to go."""

    source: str
    output: str  # a file that is not there yet
    kind: Literal["png", "jpeg", "webp", "mp4"]
    width: int  # of the output
    height: int
    max_pixels: int  # of the source
    max_seconds: float = 0.0
    max_frames: int = 1  # of the output
    keep: Literal["first", "last"] = "first"
    max_cpu_s: int
    max_memory_bytes: int

    @property
    def max_output_bytes(self) -> int:
        return (
            3 * self.width * self.height * self.max_frames + 2**20
        )  # a PNG of noise is a little longer than its pixels


class Refused(Exception):
    """Its argument is the word."""


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    Image.preinit()
    with open(task.source, "rb") as source, open(task.output, "xb") as output:
        confine(task)
        print("ready", flush=True)
        try:
            decode = decode_video if task.kind == "mp4" else decode_image
            answer = decode(source, output, task)
        except Refused as refused:
            answer = {"refused": refused.args[0]}
        except MemoryError:
            answer = {"refused": "costly"}
        except Exception as error:  # whatever decoders raise: it is about the file, which is why they are in here
            if isinstance(error, OSError) and error.errno == errno.EMFILE:  # but this is about what we did not import
                raise
            answer = {"refused": "broken"}
        print(json.dumps(answer), flush=True)


def confine(task: Task) -> None:
    """From here on: no more memory, time and output than the task's, and no new file or socket at all."""
    bounds = {
        resource.RLIMIT_AS: task.max_memory_bytes,
        resource.RLIMIT_CPU: task.max_cpu_s,
        resource.RLIMIT_FSIZE: task.max_output_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 0,  # those that are open stay so
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def decode_image(source: BinaryIO, output: BinaryIO, task: Task) -> dict[str, Any]:
    """A PNG of exactly width x height, which holds pixels and nothing else."""
    try:
        image = OPENERS[task.kind](source)
    except Image.DecompressionBombError as error:  # a WebP's canvas is checked by Pillow before we can
        raise Refused("large") from error
    check_size(image.width, image.height, task)
    if getattr(image, "is_animated", False):  # its first frame may be a title; the client knows which one is meant
        raise Refused("animated")
    pixels = read_image(image, task.width, task.height)
    Image.fromarray(pixels).save(output, "PNG", compress_level=1)  # read once and deleted
    return {"width": image.width, "height": image.height, "frames": 1, "fps": 1.0}


def decode_video(source: BinaryIO, output: BinaryIO, task: Task) -> dict[str, Any]:
    """An .npy of uint8 [frames, height, width, 3]: the first or the last `max_frames`, upright and fitted."""
    with opened(source, task) as (container, stream):
        num_frames, fps = count_frames(container, stream, task), float(stream.average_rate or stream.guessed_rate or 0)
    if not fps > 0:
        raise Refused("broken")
    skipped = max(0, num_frames - task.max_frames) if task.keep == "last" else 0
    shape: tuple[int, ...] | None = None
    num_kept = 0
    write_header(output, num_frames - skipped, task)
    source.seek(0)
    with opened(source, task) as (container, stream):
        for frame in islice(container.decode(stream), skipped, skipped + task.max_frames):
            pixels = upright(frame)
            if shape is None:
                shape = pixels.shape
            if (
                pixels.shape != shape or pixels.size > 3 * task.max_pixels
            ):  # later frames may be larger than the header says
                raise Refused("broken")
            output.write(read_image(pixels, task.width, task.height).tobytes())
            num_kept += 1
    if shape is None:
        raise Refused("broken")
    output.seek(0)
    write_header(output, num_kept, task)
    return {"width": shape[1], "height": shape[0], "frames": num_frames, "fps": fps}


@contextmanager
def opened(source: BinaryIO, task: Task) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The container and its picture, the header checked. With an open file and one format FFmpeg tries no others."""
    with av.open(source, "r", format="mp4", options={"codec_whitelist": ",".join(CODECS)}) as container:
        if not container.streams.video:
            raise Refused("broken")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context.name not in CODECS:
            raise Refused("codec")
        check_size(stream.width, stream.height, task)
        if (container.duration or 0) / av.time_base > task.max_seconds:
            raise Refused("long")
        context.thread_count = 1  # of a machine that has other work; memory is one frame's, not one a thread
        context.options = {"max_pixels": str(4 * task.max_pixels + 2**20)}  # decoders pad: a loose bound
        yield container, stream


def count_frames(container: InputContainer, stream: av.VideoStream, task: Task) -> int:
    """By the packets: nothing is decoded. A file that was cut short shows here."""
    num_frames = 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise Refused("broken")
        num_frames += packet.size > 0 and not packet.is_discard  # an edit list discards frames of the file
        if num_frames > task.max_seconds * MAX_FPS:
            raise Refused("long")
    return num_frames


def write_header(output: BinaryIO, num_frames: int, task: Task) -> None:
    """Of equal length for every number of frames: numpy leaves room for it to grow."""
    shape = (num_frames, task.height, task.width, 3)
    np.lib.format.write_array_header_1_0(output, {"descr": "|u1", "fortran_order": False, "shape": shape})


def check_size(width: int, height: int, task: Task) -> None:
    if min(width, height) < MIN_SIDE:
        raise Refused("small")
    if max(width, height) > MAX_SIDE or width * height > task.max_pixels:
        raise Refused("large")


if __name__ == "__main__":
    main()
