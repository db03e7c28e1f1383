"""Whether a figure has changed: the interval of a ratio by bootstrap, and a verdict that admits doubt.

A change counts where the whole interval lies beyond the threshold: 5 % finds a change of 10 % where the interval is
narrower than what is between, and what may be either is "unclear".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..record import Better, Spread

RESAMPLES = 10_000
MOST_NUMBERS = 20_000_000  # drawn at once; more samples than 2,000 are resampled less often
LEAST = 6  # fewer samples give no interval, as in the harness
INTERVAL = (0.025, 0.975)

Verdict = Literal["better", "worse", "changed", "same", "unclear"]


@dataclass(frozen=True)
class Change:
    """New over old; low and high: the interval of 95 %, None where there were too few samples."""

    ratio: float
    low: float | None
    high: float | None
    how: Literal["pairs", "medians", "intervals", "differences"]


def change_of_pairs(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Change:
    """The median of new / old, pair by pair: pairs are resampled, so what slows both sides of one decides nothing."""
    before, after = _positive(old), _positive(new)
    if len(before) != len(after):
        raise ValueError(f"pairs must have as many new samples as old ones, got {len(after)} and {len(before)}")
    ratios = after / before
    low, high = _interval(ratios, seed)
    return Change(float(np.median(ratios)), low, high, "pairs")


def change_of_medians(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Change:
    """The ratio of medians of runs that have nothing to do with one another: each side is resampled by itself."""
    before, after = _positive(old), _positive(new)
    ratio = float(np.median(after) / np.median(before))
    if min(len(before), len(after)) < LEAST:
        return Change(ratio, None, None, "medians")
    draws = _medians(after, seed) / _medians(before, seed + 1)
    low, high = np.quantile(draws, INTERVAL)
    return Change(ratio, float(low), float(high), "medians")


def change_of_differences(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Change | None:
    """1 + the median difference over the old median's size: for figures that may be zero or less, as dB and points are.

    None where the old median is 0, of which nothing is a share.
    """
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    scale = abs(float(np.median(before)))
    if scale == 0:
        return None
    if len(before) == len(after):
        shares = 1 + (after - before) / scale
        low, high = _interval(shares, seed)
        return Change(float(np.median(shares)), low, high, "differences")
    change = 1 + float(np.median(after) - np.median(before)) / scale
    if min(len(before), len(after)) < LEAST:
        return Change(change, None, None, "differences")
    low, high = np.quantile(1 + (_medians(after, seed) - _medians(before, seed + 1)) / scale, INTERVAL)
    return Change(change, float(low), float(high), "differences")


def change_of_spreads(old: Spread, new: Spread) -> Change:
    """From medians and their intervals alone, where a file has no samples: wider than need be, never narrower."""
    if old.low is None or old.high is None or new.low is None or new.high is None or min(old.low, new.low) <= 0:
        return Change(new.median / old.median, None, None, "intervals")
    return Change(new.median / old.median, new.low / old.high, new.high / old.low, "intervals")


def change(old: Sequence[float], new: Sequence[float], seed: int = 0) -> Change | None:
    """Pairs where both runs took as many samples, in the order in which they were taken; medians otherwise."""
    if list(old) == list(new):
        return Change(1.0, 1.0, 1.0, "pairs")  # what is computed and not timed, down to the bit
    if min(*old, *new) <= 0:
        return change_of_differences(old, new, seed)
    return (change_of_pairs if len(old) == len(new) else change_of_medians)(old, new, seed)


def judge(found: Change, threshold: float, better: Better) -> Verdict:
    """threshold: the least change that counts, 0.05 for 5 %; in ratios it reaches as far down as up, 1/1.05 to 1.05."""
    if found.low is None or found.high is None:
        return "unclear"
    up, down = 1 + threshold, 1 / (1 + threshold)
    if down <= found.low and found.high <= up:
        return "same"
    if found.low <= up and found.high >= down:
        return "unclear"
    if better == "neither":
        return "changed"
    return "worse" if (found.low > up) == (better == "lower") else "better"


def _positive(samples: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if len(values) == 0 or not np.all(values > 0):
        raise ValueError(f"samples of a ratio must be above 0, got {min(samples, default='none')}")
    return values


def _interval(values: NDArray[np.float64], seed: int) -> tuple[float, float] | tuple[None, None]:
    if len(values) < LEAST:
        return None, None
    low, high = np.quantile(_medians(values, seed), INTERVAL)
    return float(low), float(high)


def _medians(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Of as many values, drawn from them with replacement, again and again."""
    n = len(values)
    times = min(RESAMPLES, max(1000, MOST_NUMBERS // n))
    drawn = np.random.default_rng(seed).integers(0, n, size=(times, n))
    return np.asarray(np.median(values[drawn], axis=1), dtype=np.float64)
