"""Leave texts out of a PNG, and read what its other chunks say of colours and pixel shape.

Pillow unpacks every text and profile up to a bound and refuses the picture beyond it. A workflow in a `zTXt` chunk and
the profile of a calibrated display are longer than that.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from .refusal import Subject

START = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 16 * 2**20  # unpacked; those of displays with tables have 1 to 4 MiB
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
XMP = b"XML:com.adobe.xmp\0"  # the one text that may turn a picture
MAX_XMP_BYTES = 2**20


@dataclass
class PngFacts:
    """The chunks that change how pixels are shown, the last of each kind; None: there is none."""

    profile: bytes | None = None  # iCCP, unpacked
    is_srgb: bool = False
    gamma: float | None = None  # gAMA: the exponent of the file, 0.45455 for about 2.2
    chromaticities: tuple[float, ...] | None = None  # cHRM: white, red, green, blue, each x and y
    cicp: tuple[int, int, int, int] | None = None  # primaries, transfer, matrix, full range (ITU-T H.273)
    density: tuple[int, int] = (0, 0)  # pHYs: pixels per unit, across and down
    bits: int = 8  # of a value


def split(data: bytes, subject: Subject) -> tuple[bytes, PngFacts]:
    """Return the picture without texts and profile, and what its chunks say. Broken chunks stay for the decoder."""
    facts, view = PngFacts(), memoryview(data)
    kept: list[bytes | memoryview] = []
    start = kept_from = len(START)
    while start + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        content, end = view[start + 8 : start + 8 + length], start + 12 + length
        if end > len(data):
            break
        is_left_out = name == b"iCCP" or (name in TEXTS and not _may_turn(content))
        if is_left_out:
            kept.append(view[kept_from:start])
            kept_from = end
        if name not in (b"IDAT", b"fdAT", *TEXTS):
            _read_chunk(name, bytes(content), facts, subject)
        start = end
    return b"".join([START, *kept, view[kept_from:]]), facts


def _may_turn(text: memoryview) -> bool:
    return len(text) <= MAX_XMP_BYTES and bytes(text[: len(XMP) + 1]) == XMP + b"\0"  # not packed


def _read_chunk(name: bytes, content: bytes, facts: PngFacts, subject: Subject) -> None:
    """Note what a chunk says. A chunk of the wrong length is ignored, as in browsers."""
    size = len(content)
    if name == b"IHDR" and size == 13:
        facts.bits = content[8]
    elif name == b"iCCP":
        facts.profile = _unpacked(content.partition(b"\0")[2][1:], subject)
    elif name == b"sRGB" and size == 1:
        facts.is_srgb = True
    elif name == b"gAMA" and size == 4:
        facts.gamma = struct.unpack(">I", content)[0] / 100_000
    elif name == b"cHRM" and size == 32:
        facts.chromaticities = tuple(value / 100_000 for value in struct.unpack(">8I", content))
    elif name == b"cICP" and size == 4:
        facts.cicp = (content[0], content[1], content[2], content[3])
    elif name == b"pHYs" and size == 9:
        across, down, _ = struct.unpack(">IIB", content)
        facts.density = (across, down)


def _unpacked(content: bytes, subject: Subject) -> bytes | None:
    """Return an unpacked profile, or None where it cannot be unpacked."""
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(content, MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    if len(profile) > MAX_PROFILE_BYTES:
        raise subject.refused("profile", "more")
    return profile
