"""What a step takes: a model of the time of a tick by what is in its pack, and its fit to measured ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

TRIMMED = 0.05  # of a group's ticks at each end: another process had the core


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a tick with a pack: `fixed_s` + a part a request, a token and a pair of tokens that attend.

    Tokens and pairs count all branches. A fit to measured ticks leaves pairs to the tokens (`pair_s` 0): it holds for
    the lengths that it was fitted to, and says too little of longer ones. idle_s: of a tick without a pack.
    """

    fixed_s: float
    request_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    idle_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fixed_s", "request_s", "token_s", "pair_s", "idle_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds from 0, got {value!r}")
        if self.fixed_s + self.request_s + self.token_s + self.pair_s == 0:
            raise ValueError("a step must take time: fixed_s, request_s, token_s or pair_s must be above 0")

    def seconds(self, tokens: float, requests: int, pairs: float = 0.0) -> float:
        if requests == 0:
            return self.idle_s
        return self.fixed_s + self.request_s * requests + self.token_s * tokens + self.pair_s * pairs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One class of requests, as an engine meets it.

    tokens: of a step, all branches; encode_s and decode_s: of each item of work, one a tick, as the engine has them;
    finish_s: between the engine's last frame and the finished file, outside the engine's loop; video_s: of the clip.
    """

    name: str
    tokens: int
    num_steps: int
    encode_s: tuple[float, ...] = (0.0,)
    decode_s: tuple[float, ...] = (0.0,)
    finish_s: float = 0.0
    num_branches: int = 2
    video_s: float = 1.0

    def __post_init__(self) -> None:
        for what in ("tokens", "num_steps", "num_branches"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} of shape {self.name!r} must be at least 1, got {getattr(self, what)}")
        if not self.encode_s or not self.decode_s:
            raise ValueError(f"shape {self.name!r} must have an item of encoding and one of decoding at least")
        for seconds in (*self.encode_s, *self.decode_s, self.finish_s):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"times of shape {self.name!r} must be seconds from 0, got {seconds!r}")

    @property
    def pairs(self) -> float:
        """Of tokens that attend to each other, all branches."""
        return self.tokens**2 / self.num_branches

    def alone_s(self, cost: StepCost) -> float:
        """Of a request that has an engine to itself: its work, in seconds of one engine.

        The last item of encoding shares its tick with the first step; items of decoding have ticks of their own.
        """
        steps_s = self.num_steps * cost.seconds(self.tokens, 1, self.pairs)
        idle_s = (len(self.encode_s) - 1 + len(self.decode_s)) * cost.idle_s
        return sum(self.encode_s) + steps_s + sum(self.decode_s) + idle_s


@dataclass(frozen=True)
class Ticks:
    """Measured: seconds of each tick without its items, tokens and requests of its pack (0: it had none)."""

    tick_s: Sequence[float]
    tokens: Sequence[float]
    requests: Sequence[float]

    def __post_init__(self) -> None:
        if not len(self.tick_s) == len(self.tokens) == len(self.requests):
            counts = f"{len(self.tick_s)}, {len(self.tokens)} and {len(self.requests)}"
            raise ValueError(f"ticks must have as many seconds as tokens and requests, got {counts}")
        if not any(self.tokens):
            raise ValueError("ticks must have steps with a pack in them, and have none")


@dataclass(frozen=True)
class Fit:
    """error: the median distance of a group's mean from what the model says, as a share of the mean; weighted."""

    cost: StepCost
    error: float
    groups: dict[tuple[int, int], float] = field(default_factory=dict)  # (tokens, requests) -> mean seconds


def fit(ticks: Ticks) -> Fit:
    """Least squares with no part below 0, over the means of ticks with the same pack, weighted by how many there are.

    Means, since what a queue waits for is a sum; but without the slowest and fastest ticks of each group. Relative
    errors count: a short step's matters to short requests as a long one's does to long ones.
    """
    grouped: dict[tuple[int, int], list[float]] = {}
    for seconds, tokens, requests in zip(ticks.tick_s, ticks.tokens, ticks.requests, strict=True):
        grouped.setdefault((int(tokens), int(requests) if tokens else 0), []).append(seconds)
    means = {pack: trimmed_mean(values) for pack, values in grouped.items()}
    packs = sorted(pack for pack in means if pack[0])
    measured = np.array([means[pack] for pack in packs])
    weights = np.sqrt([len(grouped[pack]) for pack in packs]) / measured
    terms = np.array([(1.0, requests, tokens) for tokens, requests in packs])
    parts = _least_squares(terms * weights[:, None], measured * weights)
    cost = StepCost(fixed_s=parts[0], request_s=parts[1], token_s=parts[2], idle_s=means.get((0, 0), 0.0))
    errors = [abs(cost.seconds(*pack) / means[pack] - 1) for pack in packs for _ in grouped[pack]]
    return Fit(cost, float(np.median(errors)), means)


def trimmed_mean(values: Sequence[float]) -> float:
    ordered = sorted(values)
    cut = int(TRIMMED * len(ordered))
    return float(np.mean(ordered[cut : len(ordered) - cut]))


def _least_squares(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """The best x >= 0 of |terms x - values|: of the few subsets of terms, the best whose own solution is not below 0.

    Where subsets fit equally well, as with packs of one shape alone, the one of fewest terms.
    """
    best, found = math.inf, [0.0] * terms.shape[1]
    for size in range(1, terms.shape[1] + 1):
        for subset in itertools.combinations(range(terms.shape[1]), size):
            solution = np.linalg.lstsq(terms[:, subset], values, rcond=None)[0]
            missed = float(np.sum((terms[:, subset] @ solution - values) ** 2))
            if (solution >= 0).all() and missed < best * (1 - 1e-9) - 1e-18:
                best, found = missed, [0.0] * terms.shape[1]
                for index, value in zip(subset, solution, strict=True):
                    found[index] = float(value)
    return found
