"""Turn decoded frames into the pixels that are shown: in SDR RGB, cut to the aperture, upright, square, opaque."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import colour, hdr
from .pictures import MAX_ASPECT, Pixels
from .refusal import Subject

if TYPE_CHECKING:  # imported where a clip is opened: pictures need no FFmpeg
    import av

# ITU-T H.273, tables 2 to 4.
BT709, UNSPECIFIED, BT601, BT2020 = 1, 2, 6, 9
WIDE_PRIMARIES = {BT2020: colour.BT2020, 11: colour.DISPLAY_P3, 12: colour.DISPLAY_P3}
# Primaries of SD television are taken as BT.709's, and every transfer of SDR as sRGB's, as browsers do.
SDR_TRANSFERS = (0, BT709, UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15)
HDR_TRANSFERS: dict[int, hdr.Transfer] = {16: "PQ", 18: "HLG"}
TRANSFERS = {8: "linear light", 9: "log", 10: "log", 17: "SMPTE 428"}
MATRICES = (0, BT709, UNSPECIFIED, 3, 4, 5, 6, 7, BT2020)  # what swscale converts; it takes others as BT.601 silently
MATRIX_NAMES = {8: "YCgCo", 10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"}
HD_WIDTH, HD_HEIGHT = 1280, 577  # from here on a clip that names no matrix is BT.709's, below BT.601's, as in mpv


class FrameReader:
    """Makes pixels of a clip's frames, in the way that its first frame asks for; Refused where that cannot be done."""

    def __init__(
        self,
        first: av.VideoFrame,
        sample_aspect: Fraction | None,
        aperture: tuple[int, int, int, int] | None,
        subject: Subject,
    ) -> None:
        from av.video.reformatter import VideoReformatter

        self.stored_size = first.width, first.height
        self._subject = subject
        self._reformatter = VideoReformatter()
        self._matrix = self._matrix_of(first)
        self._to_sdr = self._to_sdr_of(first)
        self._has_alpha = any(component.is_alpha for component in first.format.components)
        self._aperture = self._aperture_of(aperture)
        self._turn = self._turn_of(first)
        width, height = self._aperture[2] - self._aperture[0], self._aperture[3] - self._aperture[1]
        self._upright_size = self._square_size(width, height, sample_aspect or Fraction(1))
        self.width, self.height = self._upright_size[::-1] if self._turn[0] else self._upright_size
        subject.check_size(self.width, self.height)

    def pixels(self, frame: av.VideoFrame) -> Pixels:
        """Return a frame's pixels, uint8 [height, width, 3]. The frame is used only while this call lasts."""
        if (frame.width, frame.height) != self.stored_size:  # later frames may be larger than the header says
            raise self._subject.refused("resized", f"{frame.width}x{frame.height}")
        pixels = self._rgb(frame)
        left, top, right, bottom = self._aperture
        pixels = pixels[top:bottom, left:right]
        if pixels.shape[1::-1] != self._upright_size:
            pixels = np.asarray(Image.fromarray(pixels).resize(self._upright_size, Image.Resampling.LANCZOS))
        is_swapped, flips_x, flips_y = self._turn
        if is_swapped:
            pixels = pixels.swapaxes(0, 1)
        return np.ascontiguousarray(pixels[:: -1 if flips_y else 1, :: -1 if flips_x else 1])

    def _rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        from av.video.reformatter import ColorRange, Interpolation

        exact = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        frame.colorspace = self._matrix
        if frame.color_range == 0 and not frame.format.is_rgb and "yuvj" not in frame.format.name:
            frame.color_range = ColorRange.MPEG  # as the books say; swscale would take grey as full
        kind = "rgb48le" if self._to_sdr else "rgba" if self._has_alpha else "rgb24"
        converted = self._reformatter.reformat(frame, format=kind, interpolation=exact, threads=1).to_ndarray()
        if self._to_sdr:
            return self._to_sdr.pixels(converted.astype(np.uint16, copy=False))
        pixels = converted.astype(np.uint8, copy=False)
        if primaries := WIDE_PRIMARIES.get(int(frame.color_primaries)):
            pixels[..., :3] = np.asarray(colour.by_numbers(Image.fromarray(pixels[..., :3]), None, primaries))
        if self._has_alpha:  # on black, as pictures are
            pixels = ((pixels[..., :3].astype(np.uint16) * pixels[..., 3:] + 127) // 255).astype(np.uint8)
        return pixels

    def _matrix_of(self, frame: av.VideoFrame) -> int:
        matrix = int(frame.colorspace)
        if matrix not in MATRICES:
            raise self._subject.refused("matrix", MATRIX_NAMES.get(matrix, f"number {matrix}"))
        if matrix in (0, UNSPECIFIED, 3) and not frame.format.is_rgb:
            return BT709 if frame.width >= HD_WIDTH or frame.height >= HD_HEIGHT else BT601
        return matrix

    def _to_sdr_of(self, frame: av.VideoFrame) -> hdr.ToSdr | None:
        transfer = int(frame.color_trc)
        if transfer in HDR_TRANSFERS:
            return hdr.ToSdr(HDR_TRANSFERS[transfer], frame.width, frame.height)
        if transfer not in SDR_TRANSFERS:
            raise self._subject.refused("transfer", TRANSFERS.get(transfer, f"number {transfer}"))
        return None

    def _aperture_of(self, aperture: tuple[int, int, int, int] | None) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom). An aperture that reaches out of the frame is ignored, as in QuickTime."""
        width, height = self.stored_size
        if aperture is not None:
            wide, high, left, top = aperture
            if 0 <= left < left + wide <= width and 0 <= top < top + high <= height:
                return left, top, left + wide, top + high
        return 0, 0, width, height

    def _turn_of(self, frame: av.VideoFrame) -> tuple[bool, bool, bool]:
        """Return whether the display matrix swaps x and y, whether it then mirrors x, and whether it mirrors y."""
        found = frame.side_data.get("DISPLAYMATRIX")
        if found is None:
            return False, False, False
        matrix = bytes(found)[:36]  # type: ignore[call-overload]  # it has a buffer, which its types do not tell
        a, b, _, c, d, *_ = (value / 2**16 for value in struct.unpack("=9i", matrix))
        # x' = ax + cy, y' = bx + dy
        along, across = max(abs(a), abs(d)), max(abs(b), abs(c))
        is_swapped = across > along
        if min(along, across) > 0.02 * max(along, across) or not along + across:
            angle = math.degrees(math.atan2(b, a))
            raise self._subject.refused("turned", f"{angle:.0f} degrees")
        return (True, c < 0, b < 0) if is_swapped else (False, a < 0, d < 0)

    def _square_size(self, width: int, height: int, aspect: Fraction) -> tuple[int, int]:
        """Return (width, height) with square pixels: the shorter side of a pixel grows, as in HTML."""
        if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
            raise self._subject.refused("aspect", f"{aspect.numerator}:{aspect.denominator}"[:24])
        return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


class Deinterlacer:
    """Makes whole frames out of two fields each (bwdif, one frame for one); frames without fields pass as they are."""

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._colours: list[tuple[int, int, int, int]] = []

    def push(self, frame: av.VideoFrame, time_base: Fraction) -> Iterator[av.VideoFrame]:
        """Take a frame and yield those that are ready; one is held back."""
        if self._graph is None:
            if not frame.interlaced_frame:
                yield frame
                return
            self._graph = self._graph_for(frame, time_base)
        self._graph.push(frame)
        yield from self._pulled()

    def finish(self) -> Iterator[av.VideoFrame]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pulled()

    def _graph_for(self, frame: av.VideoFrame, time_base: Fraction) -> av.filter.Graph:
        from av.filter import Graph

        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
        graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
        graph.configure()
        return graph

    def _pulled(self) -> Iterator[av.VideoFrame]:
        from av.error import BlockingIOError, EOFError

        assert self._graph is not None
        try:
            while True:
                yield self._graph.vpull()
        except (BlockingIOError, EOFError):
            return
