"""Convert HDR frames to SDR: light by ITU-R BT.2100, rolled off by FFmpeg's `tonemap` filter, in one table a clip.

FFmpeg's `haldclut` applies the table: 0.12 s a frame of 1080p, where the formulas themselves take 1 s.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import colour

if TYPE_CHECKING:  # imported where a clip is opened
    import av

Transfer: TypeAlias = Literal["PQ", "HLG"]
Light: TypeAlias = NDArray[np.float64]  # [..., 3], 1 is the white of SDR

WHITE = 100.0  # cd/m2 of SDR's white, which the filter means by 1
PEAK = 1000.0  # cd/m2 of the brightest that is told apart: HLG's nominal display, and what most PQ is mastered on
CURVE = "mobius"  # nearly leaves alone what SDR could show: of its curves the one that moves colours least
LEVEL = 8  # of the table: 64 nodes a side; between them it is within 2 of 255 of the formulas
SIDE = LEVEL**3  # of the table as a picture


class ToSdr:
    """Converts coded BT.2020 RGB to coded BT.709 RGB, for frames of one size."""

    def __init__(self, transfer: Transfer, width: int, height: int) -> None:
        from av import VideoFormat
        from av.filter import Graph

        self._num_frames = 0
        self._graph = Graph()
        self._graph.threads = 1
        frames, table = (
            self._graph.add_buffer(width=w, height=h, format=VideoFormat("rgb48le", w, h), time_base=Fraction(1))
            for w, h in ((width, height), (SIDE, SIDE))
        )
        lookup = self._graph.add("haldclut", "interp=tetrahedral:clut=first")
        frames.link_to(lookup, 0, 0)
        table.link_to(lookup, 0, 1)
        lookup.link_to(self._graph.add("buffersink"))
        self._graph.configure()
        self._graph.push(_frame(_table(transfer), 0), 1)
        self._graph.push(None, 1)

    def pixels(self, coded: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """Convert a frame [height, width, 3] of 16 bits to one of 8."""
        self._graph.push(_frame(coded, self._num_frames), 0)
        self._num_frames += 1
        shown = self._graph.vpull().to_ndarray()
        return ((shown.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _frame(pixels: NDArray[np.uint16], time: int) -> av.VideoFrame:
    import av

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
    frame.pts, frame.time_base = time, Fraction(1)
    return frame


@cache
def _table(transfer: Transfer) -> NDArray[np.uint16]:
    """Return the table [SIDE, SIDE, 3] of the values that nodes become; red runs fastest (a Hald picture)."""
    coded = np.linspace(0, 1, LEVEL**2)
    blue, green, red = np.meshgrid(coded, coded, coded, indexing="ij")
    grid = np.stack((red, green, blue), -1).reshape(-1, 3)
    light = _light_of_pq(grid) if transfer == "PQ" else _light_of_hlg(grid)
    matrix = colour.to_srgb_matrix(colour.BT2020)
    assert matrix is not None
    shown = np.clip(_rolled_off(np.minimum(light, PEAK / WHITE) @ matrix.T), 0, 1) ** (1 / 2.4)  # BT.1886
    return (shown * 65535).round().astype(np.uint16).reshape(SIDE, SIDE, 3)


def _light_of_pq(coded: Light) -> Light:
    """Return the light of PQ, which codes absolute luminance (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    root = coded ** (1 / m2)
    return (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * (10_000 / WHITE)


def _light_of_hlg(coded: Light) -> Light:
    """Return the light of HLG (BT.2100): the scene's, as a display of PEAK shows it (system gamma 1.2)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - c) / a) + b) / 12)
    luma = scene @ np.array([0.2627, 0.6780, 0.0593])
    return scene * luma[:, None] ** 0.2 * (PEAK / WHITE)


def _rolled_off(light: Light) -> Light:
    """Put light [n, 3] through the filter, as a picture of SIDE pixels a row."""
    import av
    from av.filter import Graph

    frame = av.VideoFrame.from_ndarray(light.astype(np.float32).reshape(-1, SIDE, 3), format="gbrpf32le")
    frame.color_trc, frame.pts = 8, 0  # linear
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    curve = graph.add("tonemap", f"tonemap={CURVE}:desat=0:peak={PEAK / WHITE}")
    graph.link_nodes(source, curve, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.vpull().to_ndarray().reshape(-1, 3).astype(np.float64)
