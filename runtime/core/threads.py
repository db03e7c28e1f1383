"""The number of CPU threads of a denoising step: as many as pay while others use the machine, too.

The threads of an operation wait for each other at its end. Beside busy neighbours one of them is not scheduled while
the others wait, and a step takes many times its usual time. So a step that waits is a reason to try fewer, and time
that has passed is one to try more; what a trial cost bounds how soon the next one may come.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from statistics import median_low

import torch

from .openmp import mkl_is_strict

STALLED = 0.15  # of a step's time in which its thread did not run: it waited for others, or for a core
USUAL_STEPS = 5  # the usual time of a token is their median
TRIAL_STEPS, TRIAL_S = 2, 0.25  # a trial ends with the step that completes the one or the other
KEEP = 0.97  # of the usual time: the most that a trial may take to be kept
SIMILAR = 1.25  # packs whose tokens differ by more are not compared: a small one takes more time a token
TRIAL_SHARE = 0.03  # of all time: the most that trials in vain may cost
PATIENCE_S = 0.5  # from a change to the next trial at least


@dataclass
class _Steps:
    """The newest steps of similar packs with one number of threads."""

    tokens: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_STEPS))

    def is_like(self, tokens: int) -> bool:
        return max(tokens, self.tokens) <= SIMILAR * min(tokens, self.tokens)

    def add(self, tokens: int, seconds: float) -> None:
        if not self.is_like(tokens):
            self.tokens = tokens
            self.seconds.clear()
        self.seconds.append(seconds / tokens)

    @property
    def median(self) -> float:
        """Return the median of the seconds that a token took."""
        return median_low(self.seconds)


@dataclass
class _Trial:
    before: int  # the number of threads to go back to
    usual: _Steps  # with that number
    steps: _Steps
    count: int = 0  # of steps
    took_s: float = 0.0
    excess_s: float = 0.0  # of that, what the usual number would not have taken


class CpuThreads:
    """Chooses between `most` threads, half of them, a quarter, ..., and 1, by the seconds that a token takes with each.

    most: torch's threads, and no more than the cores that this process may use. changes_midway: the number may change
    while requests are under way. It must not where results are not the same to the bit with any number (`keep_bits`):
    what a request becomes would depend on its neighbours.
    """

    def __init__(
        self,
        most: int | None = None,
        *,
        changes_midway: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.most = most or min(torch.get_num_threads(), usable_cores())
        self.number = self.most
        self.changes_midway = changes_midway
        self._clock, self._cpu_clock, self._set = clock, cpu_clock, set_threads
        self._usual = _Steps()
        self._trial: _Trial | None = None
        self._has_tried_fewer = False
        self._stalled = False
        self._fewer_from_s, self._more_from_s = -inf, self._clock() + PATIENCE_S

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let torch use this number in the calling thread; afterwards it has the number that it had before."""
        before = torch.get_num_threads()
        self._set(self.number)
        try:
            yield
        finally:
            self._set(before)

    @contextmanager
    def step(self, tokens: int, is_first: bool = False) -> Iterator[None]:
        """Measure a step of so many tokens, and choose the number of threads before it.

        is_first: no request has taken a step yet. A step that raises is not counted.
        """
        if self.changes_midway or is_first:
            self._choose(tokens)
            self._set(self.number)
        began_s, began_cpu_s = self._clock(), self._cpu_clock()
        yield
        took_s = self._clock() - began_s
        self._stalled = self._cpu_clock() - began_cpu_s < (1 - STALLED) * took_s
        self._count(tokens, took_s)

    def _count(self, tokens: int, took_s: float) -> None:
        trial = self._trial
        if trial is None:
            self._usual.add(tokens, took_s)
        elif trial.usual.is_like(tokens):
            trial.steps.add(tokens, took_s)
            trial.count += 1
            trial.took_s += took_s
            trial.excess_s += took_s - tokens * trial.usual.median

    def _choose(self, tokens: int) -> None:
        if (trial := self._trial) is not None:
            if trial.count >= TRIAL_STEPS or trial.took_s >= TRIAL_S:
                self._end(trial, is_better=trial.steps.median <= KEEP * trial.usual.median)
            elif not trial.usual.is_like(tokens):
                self._end(trial, is_better=False)
        if self._trial is None and (number := self._next()) is not None:
            self._trial = _Trial(self.number, self._usual, _Steps())
            self.number = number

    def _next(self) -> int | None:
        """Return a number of threads that is worth a trial now."""
        steps, now_s = len(self._usual.seconds), self._clock()
        wants_fewer = (self._stalled and steps >= 1) or (not self._has_tried_fewer and steps >= 2)
        if self.number > 1 and wants_fewer and now_s >= self._fewer_from_s:
            return self.number // 2
        if self.number < self.most and steps >= 1 and now_s >= self._more_from_s:
            return min(self.most, 2 * self.number)
        return None

    def _end(self, trial: _Trial, is_better: bool) -> None:
        """Keep the number that was tried, or go back and wait for as long as the trial's cost asks."""
        now_s, fewer = self._clock(), self.number < trial.before
        self._trial = None
        if is_better:
            self._usual = trial.steps
            if fewer:
                self._more_from_s = max(self._more_from_s, now_s + PATIENCE_S)
            else:
                self._fewer_from_s = now_s
            return
        self.number, self._usual = trial.before, trial.usual
        from_s = now_s + max(PATIENCE_S, trial.excess_s / TRIAL_SHARE)
        if fewer:
            self._has_tried_fewer, self._fewer_from_s = True, from_s
        else:
            self._more_from_s = from_s


def choose_threads(device: torch.device, dtype: torch.dtype, quantize: str | None) -> CpuThreads | None:
    """Return what chooses an engine's threads; None on a GPU, whose steps the host's threads do not take."""
    if device.type != "cpu":
        return None
    return CpuThreads(changes_midway=quantize is None and keep_bits(dtype))


def keep_bits(dtype: torch.dtype) -> bool:
    """Return whether matrix products of this dtype are the same to the bit with any number of threads.

    MKL's in fp32 are, in its strict mode; oneDNN's in bf16 are not.
    """
    return dtype == torch.float32 and torch.backends.mkl.is_available() and mkl_is_strict()


def usable_cores() -> int:
    """Return the cores that this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # "max 100000" or "150000 100000", microseconds
    if quota.exists():
        share, period = quota.read_text().split()
        if share != "max":
            cores = min(cores, ceil(int(share) / int(period)))
    return max(1, cores)
