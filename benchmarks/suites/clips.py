"""Sizes and prompts that the suites share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ...runtime.core.request import VideoRequest

Size = tuple[int, int, int]  # width, height, frames
DIRECTIONS = ("left", "right", "up", "down")


def size_of(text: str) -> Size:
    """ "64x64x17" """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and part.isascii() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHTxFRAMES, for example 64x64x17, got {text!r}")
    width, height, num_frames = map(int, parts)
    return width, height, num_frames


def words_of(size: Size) -> str:
    return "x".join(map(str, size))


def prompt_of(seed: int) -> str:
    """In the demo model's world; any other model takes it too."""
    return f"a red circle moving {DIRECTIONS[seed % len(DIRECTIONS)]}"


def clip_request(size: Sequence[int], steps: int, seed: int, cache: str = "none") -> VideoRequest:
    """A clip of a size, its prompt by the seed."""
    width, height, num_frames = size
    return VideoRequest(
        prompt=prompt_of(seed),
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=steps,
        seed=seed,
        cache=cache,
    )
