"""Peaks that are made up, so that what follows from them can be counted by hand."""

from __future__ import annotations

from skylapse.runtime.memory.peaks import Coding, Curve, Peaks


def line(slope: float, offset: float = 0.0) -> Curve:
    return Curve(((0.0, offset), (1.0, offset + slope)))


def coding(slopes: dict[int, float], state: float = 0.0, output: float = 0.0) -> Coding:
    """Return made-up peaks of coding. slopes: latent frames at a time -> bytes a pixel."""
    return Coding({chunk: line(slope) for chunk, slope in slopes.items()}, state, output)


def made_up(
    step: float = 100, apart: float = 60, encode: float = 0.02, decode: float = 0.02, state: float = 0.0, **numbers: int
) -> Peaks:
    """step, apart: bytes a token; encode, decode: bytes a pixel in chunks of 4, and half of that in chunks of 1."""
    halves = [coding({4: slope, 1: slope / 2}, state) for slope in (encode, decode)]
    return Peaks(line(step), line(apart), halves[0], halves[1], **({"text": 0, "image": 0} | numbers))
