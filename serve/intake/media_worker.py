"""The program that decodes one upload, in a process of its own: a crash of the decoder ends there.

    python -I -m skylapse.serve.intake.media_worker '{"source": ..., "output": ..., "medium": "picture", ...}'

It prints "ready" and then a line of JSON: what it found, or why it refuses, {"refused": "small", "got": "8x8"}.
Sentences are `runtime.media.refusal`'s: what decoders say may hold addresses of memory (CVE-2026-22778). When it ends
without a line, by itself, the fault is ours.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from ...runtime.media.clips import Clip, open_clip
from ...runtime.media.pictures import fitted, picture_of
from ...runtime.media.refusal import Bounds, Refused

# PyAV, Pillow and NumPy import these when they first need them, which is too late in here.
LAZY = (
    *("av.subtitles.stream", "av.filter", "av.video.reformatter", "av.sidedata.encparams", "av.error"),
    *("PIL.ImageCms", "PIL.TiffImagePlugin", "PIL.ExifTags", "PIL.ImagePalette", "xml.etree.ElementTree"),
    *("numpy.lib.format", "encodings.unicode_escape", "encodings.latin_1", "encodings.idna"),
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The file to decode, the output to write, and the limits."""

    source: str
    output: str  # a file that is not there yet
    medium: Literal["picture", "clip"]
    width: int  # of the output
    height: int
    max_pixels: int  # of the source
    max_seconds: float = 600.0
    max_source_frames: int = 1
    max_frames: int = 1  # of the output; 0: what there is is told and nothing written
    keep: Literal["first", "last"] = "first"
    fps: float | None = None  # of the output; None: the clip's own
    max_cpu_s: int
    max_memory_bytes: int

    @property
    def bounds(self) -> Bounds:
        # Bytes were counted as they arrived.
        return Bounds(self.max_pixels, 2**62, self.max_seconds, self.max_source_frames)

    @property
    def max_output_bytes(self) -> int:
        # A PNG of noise is a little longer than its pixels.
        return 3 * self.width * self.height * max(1, self.max_frames) + 2**20


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    load_all()
    with open(task.source, "rb") as source, open(task.output, "xb") as output:
        confine(task)
        print("ready", flush=True)
        try:
            decode = decode_picture if task.medium == "picture" else decode_clip
            answer = decode(source, output, task)
        except Refused as refused:
            answer = {"refused": refused.word, "got": refused.got}
        except MemoryError:
            answer = {"refused": "costly", "got": ""}
        print(json.dumps(answer), flush=True)


def load_all() -> None:
    for name in LAZY:
        importlib.import_module(name)


def confine(task: Task) -> None:
    """Restrict this process to the task's memory, time and output, and forbid new files and sockets altogether."""
    used_s = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = task.max_cpu_s + int(used_s.ru_utime + used_s.ru_stime)
    bounds = {
        resource.RLIMIT_AS: (task.max_memory_bytes, 0),
        resource.RLIMIT_CPU: (cpu_s, 1),  # the soft one first: SIGXCPU tells it from a kill
        resource.RLIMIT_FSIZE: (task.max_output_bytes, 0),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NOFILE: (0, 0),  # those that are open stay so
    }
    for kind, (bound, room) in bounds.items():
        hard = resource.getrlimit(kind)[1]
        soft, own_hard = (bound, bound + room) if hard == resource.RLIM_INFINITY else (min(bound, hard), hard)
        resource.setrlimit(kind, (soft, min(own_hard, bound + room)))


def decode_picture(source: BinaryIO, output: BinaryIO, task: Task) -> dict[str, Any]:
    """Write a PNG of exactly width x height, which holds pixels and nothing else."""
    image = picture_of(source, "", task.bounds)
    pixels = fitted(image, task.width, task.height)
    Image.fromarray(pixels).save(output, "PNG", compress_level=1)  # read once and deleted
    return {"width": image.width, "height": image.height, "frames": 1, "fps": 1.0}


def decode_clip(source: BinaryIO, output: BinaryIO, task: Task) -> dict[str, Any]:
    """Write an .npy of uint8 [frames, height, width, 3]: the first or the last `max_frames` at `fps`, fitted."""
    with open_clip(source, task.bounds) as clip:
        picks = clip.picks(task.fps)
        if task.max_frames:
            kept = picks[: task.max_frames] if task.keep == "first" else picks[-task.max_frames :]
            write_frames(output, clip, kept, task)
        fps = task.fps or clip.fps
        return {"width": clip.width, "height": clip.height, "frames": len(picks), "fps": fps}


def write_frames(output: BinaryIO, clip: Clip, picks: np.ndarray[Any, np.dtype[np.intp]], task: Task) -> None:
    shape = (len(picks), task.height, task.width, 3)
    np.lib.format.write_array_header_1_0(output, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for frame in clip.frames(picks):
        output.write(fitted(Image.fromarray(frame), task.width, task.height).tobytes())


if __name__ == "__main__":
    main()
