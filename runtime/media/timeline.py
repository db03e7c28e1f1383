"""The times at which a clip's frames are shown, and the frames that a constant rate picks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .refusal import MAX_FPS

JITTER = 0.25  # of an interval: within it a rate counts as constant; Matroska's whole milliseconds at 60 fps make 0.03


@dataclass(frozen=True, eq=False)
class Timeline:
    """The frames' starts and the last one's end, in seconds from the first start, and the clip's own constant rate."""

    starts: NDArray[np.float64]
    end: float
    fps: float
    is_constant: bool

    def picks(self, fps: float | None = None) -> NDArray[np.intp]:
        """Return the indices of the frames that a clip of `fps` shows, rising, some more than once; None: its own rate.

        A clip whose frames already come at a constant rate is taken frame by frame at its own rate.
        """
        if fps is None and self.is_constant:
            return np.arange(len(self.starts))
        rate = fps or self.fps
        count = max(1, round(self.end * rate))
        times = np.arange(count) / rate + 0.5 / self.fps  # the nearest frame, not the one before
        return np.clip(np.searchsorted(self.starts, times * (1 + 1e-9), side="right") - 1, 0, len(self.starts) - 1)


def timeline_of(
    times: Sequence[int], time_base: Fraction, last_duration: int, told: Sequence[Fraction | None]
) -> Timeline:
    """Return the timeline of a clip from its frames' times.

    times: of at least one frame, rising, in units of `time_base` seconds; told: rates that the file claims.
    """
    unit = float(time_base)
    starts = (np.asarray(times, np.float64) - times[0]) * unit
    gaps = np.sort(np.diff(starts))
    gaps = gaps[gaps > 0]
    usual = float(gaps[(len(gaps) - 1) // 2]) if len(gaps) else 0.0  # the median; of two the shorter
    last = last_duration * unit or usual
    if not usual:  # one frame, which lasts as long as it says
        fps = _told(1 / last, told) if last else next((float(rate) for rate in told if rate), 1.0)
        return Timeline(starts, last or 1 / fps, fps, is_constant=True)
    mean = (len(starts) - 1) / starts[-1]
    off = np.abs(starts - np.arange(len(starts)) / mean).max() * mean
    if off <= JITTER:
        fps = _told(mean, told)
        return Timeline(starts, len(starts) / fps, fps, is_constant=True)
    fps = min(_told(1 / usual, told), MAX_FPS)
    return Timeline(starts, float(starts[-1]) + last, fps, is_constant=False)


def _told(fps: float, told: Sequence[Fraction | None]) -> float:
    """Return the file's own rate where it is within a hundredth: 24000/1001, not what milliseconds make of it."""
    return next((float(rate) for rate in told if rate and abs(float(rate) / fps - 1) < 0.01), fps)
