"""Read what FFmpeg passes over in an mp4's boxes: the clean aperture, and edits that hold or slow frames."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_BYTES = 2**20  # of a box that is read; those looked for have less than a hundred, edit lists a few
CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts")
SAMPLE_ENTRY_BYTES = 86  # of VisualSampleEntry, its own header included


@dataclass
class TrackFacts:
    """One track. aperture: (width, height, x, y) of the part of a stored frame that is shown; None: all of it."""

    aperture: tuple[int, int, int, int] | None = None
    keeps_speed: bool = True


def tracks_of(file: BinaryIO) -> list[TrackFacts]:
    """Return facts of each track in the order of the file, which is FFmpeg's order of streams; leaves `file` at 0."""
    facts: list[TrackFacts] = []
    file.seek(0, 2)
    for path, start, end in _boxes(file, 0, file.tell(), ()):
        if path == (b"moov", b"trak"):
            facts.append(TrackFacts())
        elif facts and path[:2] == (b"moov", b"trak") and end - start <= MAX_BYTES:
            file.seek(start)
            if path[-1] == b"elst":
                facts[-1].keeps_speed = _keeps_speed(file.read(end - start))
            elif path[-1] == b"stsd":
                facts[-1].aperture = _aperture(file.read(end - start))
    file.seek(0)
    return facts


def _boxes(
    file: BinaryIO, start: int, end: int, path: tuple[bytes, ...]
) -> Iterator[tuple[tuple[bytes, ...], int, int]]:
    """Yield (names from the outermost on, first byte of the content, its end) of every box, in order."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8)), 16
        box_end = end if size == 0 else start + size
        if box_end < start + header or box_end > end:  # broken or cut short, which FFmpeg tells
            return
        yield (*path, name), start + header, box_end
        if name in CONTAINERS:
            yield from _boxes(file, start + header, box_end, (*path, name))
        start = box_end


def _keeps_speed(content: bytes) -> bool:
    """Return False for an edit that holds one frame (rate 0) or changes the speed: QuickTime alone plays it."""
    if len(content) < 8:
        return True
    form = ">QqI" if content[0] == 1 else ">IiI"  # duration, first time of the medium (-1: nothing is shown), rate
    size, num_edits = struct.calcsize(form), int.from_bytes(content[4:8])
    whole = content[8 : 8 + size * min(num_edits, (len(content) - 8) // size)]
    return all(rate == 0x1_0000 for _, time, rate in struct.iter_unpack(form, whole) if time != -1)


def _aperture(stsd: bytes) -> tuple[int, int, int, int] | None:
    """Return the aperture that the first sample entry's `clap` gives, or None.

    A `clap` has a width, a height and the offset of its middle, each a fraction (ISO/IEC 14496-12).
    """
    entry = stsd[8 : 8 + int.from_bytes(stsd[8:12])]
    if len(entry) < SAMPLE_ENTRY_BYTES:
        return None
    stored_width, stored_height = struct.unpack(">HH", entry[32:36])
    start = SAMPLE_ENTRY_BYTES
    while start + 8 <= len(entry):
        size, name = struct.unpack(">I4s", entry[start : start + 8])
        if name == b"clap" and size == 40 and start + 40 <= len(entry):
            values = struct.unpack(">IIIIiIiI", entry[start + 8 : start + 40])
            if 0 in values[1::2]:
                return None
            width, height, x, y = (values[i] / values[i + 1] for i in (0, 2, 4, 6))
            left = round((stored_width - width) / 2 + x)
            top = round((stored_height - height) / 2 + y)
            return round(width), round(height), left, top
        if size < 8:
            return None
        start += size
    return None
