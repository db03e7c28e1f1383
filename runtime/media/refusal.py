"""Refusals of pictures and clips: one sentence a reason, the same on the command line and over HTTP."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

Medium: TypeAlias = Literal["picture", "clip"]

MIN_SIDE, MAX_SIDE = 16, 8192
MAX_PIXELS = 40_000_000  # of a picture or of one frame; telephones make 24 million
MAX_FPS = 120.0  # frames that a second is counted for where a bound is one of seconds


@dataclass(frozen=True)
class Bounds:
    """The bounds that a file must keep to."""

    max_pixels: int = MAX_PIXELS
    max_bytes: int = 512 * 2**20
    max_seconds: float = 600.0
    max_frames: int = 1025


PICTURE_BOUNDS, CLIP_BOUNDS = Bounds(max_bytes=64 * 2**20), Bounds()

FILES: dict[Medium, tuple[str, str]] = {
    "picture": ("a", "PNG, JPEG or WebP file"),
    "clip": ("an", "mp4, mov, mkv or webm file"),
}
SENTENCES = {
    "kind": "must be {a} {file}",
    "broken": "must be an intact {file}",
    "crash": "must be an intact {file}: it ends the program that decodes it",
    "costly": "must take less time and memory to decode",
    "bytes": "must have at most {max_bytes} bytes",
    "small": "must be at least 16x16 pixels",
    "wide": "must be at most 8192 pixels on a side",
    "large": "must have at most {max_pixels} pixels",
    "aspect": "must have pixels at most 4 times as long on one side as on the other",
    "animated": "must be a still picture, not an animation",
    "colour": "must have colours of a kind that is converted",
    "profile": "must have a colour profile of at most 16 MiB",
    "long": "must last at most {max_seconds:g} s",
    "frames": "must have from 1 to {max_frames} frames",
    "picture": "must hold a clip, not sound or cover art alone",
    "codec": "must hold H.264, H.265, VP8, VP9, AV1, MPEG-4 or ProRes video",
    "encrypted": "must not be encrypted",
    "resized": "must keep to the size of its first frame",
    "turned": "must be turned by a multiple of 90 degrees",
    "transfer": "must have the transfer of SDR, PQ or HLG",
    "matrix": "must have the colour matrix of BT.601, BT.709, BT.2020 or RGB",
    "speed": "must not hold or slow frames by its edit list",
    "timing": "must tell when each frame is shown",
}
OUT_OF_BOUNDS = ("bytes", "wide", "large", "long", "frames", "profile")  # another file of the kind would be taken


class Refused(ValueError):
    """A file that is not taken. `str()` is the command line's line; the service makes its own of `word` and `got`."""

    def __init__(self, word: str, label: str, medium: Medium, bounds: Bounds, got: str = "", detail: str = "") -> None:
        self.word = word
        self.got = got  # of our own making: a decoder's words may hold addresses of memory (CVE-2026-22778)
        super().__init__(f"{label} {sentence(word, medium, bounds, got)}{detail and f' ({detail})'}")


def sentence(word: str, medium: Medium, bounds: Bounds, got: str = "") -> str:
    """Return the sentence of a refusal: "must ...", and at its end what was found."""
    a, file = FILES[medium]
    return SENTENCES[word].format(a=a, file=file, **asdict(bounds)) + (f", got {got}" if got else "")


BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, ArithmeticError, LookupError)


@dataclass(frozen=True)
class Subject:
    """A file that is being read: the name that errors call it by, and its bounds."""

    label: str
    medium: Medium
    bounds: Bounds

    def refused(self, word: str, got: str = "", detail: str = "") -> Refused:
        return Refused(word, self.label, self.medium, self.bounds, got, detail)

    def check_size(self, width: int, height: int) -> None:
        """Raise Refused where a picture or frame of `width` x `height` is out of bounds."""
        got = f"{width}x{height}"
        if min(width, height) < MIN_SIDE:
            raise self.refused("small", got)
        if max(width, height) > MAX_SIDE:
            raise self.refused("wide", got)
        if width * height > self.bounds.max_pixels:
            raise self.refused("large", got)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Make a Refused of the errors that a decoder raises about its file; errors of ours pass through.

        Ours are a missing module and an error of the system that has a number, such as EMFILE where no more files may
        be opened. FFmpeg's errors have numbers of their own, Pillow's have none.
        """
        try:
            yield
        except (Refused, ImportError):
            raise
        except MemoryError as error:
            raise self.refused("costly") from error
        except Exception as error:
            is_ffmpegs = type(error).__module__.startswith("av.")
            number = getattr(error, "errno", None)
            if number == errno.ENOMEM or "memory" in str(error):
                raise self.refused("costly") from error
            if number in (errno.EMFILE, errno.ENFILE) or not (is_ffmpegs or isinstance(error, BROKEN)):
                raise
            if number is not None and not is_ffmpegs:
                raise
            words = getattr(error, "strerror", None) if is_ffmpegs else str(error)
            raise self.refused("broken", detail=str(words or type(error).__name__)) from error
