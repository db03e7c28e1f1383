"""Fair timing: rounds in which everyone takes a turn, ratios round by round, and how sure their medians are.

A machine that grows slow for a while slows all of a round, so ratios hold where times do not. No figure goes without
its spread; the interval of a median is by order statistics, which assumes nothing of how times are distributed.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from math import comb
from typing import Protocol

import torch

from ..runtime.core.events import is_device_lost
from .record import Spread

Run = Callable[[], object]
FLUSH_BYTES = 2**30  # far more than any L2 cache, and a third of a millisecond that the host needs to launch ahead


class Missing(Exception):
    """What cannot take part here, and why: not installed, not on this device."""


class Clock(Protocol):
    """A clock that counts the process's CPU time too has it of its last call in an attribute `cpu_s`."""

    def seconds(self, run: Run) -> float:
        """Of one call."""
        ...


class WallClock:
    """For the CPU: a call too short for the timer is repeated within its turn."""

    def __init__(self, least_s: float = 1e-3) -> None:
        self.least_s = least_s
        self.cpu_s = 0.0  # of the last call, all threads: others on the machine do not add to it as they do to seconds
        self._calls: dict[Run, int] = {}

    def seconds(self, run: Run) -> float:
        calls = self._calls.get(run, 1)
        began_cpu, began = time.process_time(), time.perf_counter()
        for _ in range(calls):
            run()
        seconds = (time.perf_counter() - began) / calls
        self.cpu_s = (time.process_time() - began_cpu) / calls
        self._calls.setdefault(run, max(1, min(1000, round(self.least_s / max(seconds, 1e-7)))))
        return seconds


class CudaClock:
    """For a GPU: the device's time between two events, its L2 cache flushed before them."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def seconds(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class Budget:
    """When a comparison ends: sure enough, or out of time, but never before `least` rounds."""

    seconds: float = 2.0
    least: int = 6  # fewer give no interval of 95 %
    most: int = 200
    width: float = 0.01  # of every ratio's interval


@dataclass
class Turns:
    """What the rounds gave: each one's seconds, CPU seconds where the clock has them, and who fell out and why."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)  # in the order of samples; empty on a GPU

    def ratio(self, name: str, to: str) -> Spread | None:
        """`name`'s seconds over `to`'s, round by round; None where one of them fell out."""
        if name not in self.samples or to not in self.samples:
            return None
        return spread_of(ratios(self.samples[name], self.samples[to]))


def take_turns(
    runs: Mapping[str, Run], clock: Clock, budget: Budget, now: Callable[[], float] = time.perf_counter
) -> Turns:
    """Everyone runs twice to warm up, then once a round: A B C, C B A, ... Who raises is out."""
    turns = Turns({name: [] for name in runs})
    with without_gc():  # or whoever happens to allocate most pays for everyone
        for _ in range(2):
            _round(runs, clock, turns, warm_up=True)
        began = now()
        for turn in count(1):
            _round(runs, clock, turns, backwards=turn % 2 == 0)
            if not turns.samples or turn >= budget.most:
                break
            if turn >= budget.least and (now() - began >= budget.seconds or _is_sure(turns, budget.width)):
                break
    return turns


@contextmanager
def without_gc() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _round(runs: Mapping[str, Run], clock: Clock, turns: Turns, backwards: bool = False, warm_up: bool = False) -> None:
    names = list(turns.samples)
    for name in reversed(names) if backwards else names:
        try:
            seconds = clock.seconds(runs[name])
        except Exception as error:  # whatever a peer raises is its own result
            turns.failed[name] = reason_of(error)
            del turns.samples[name]
            turns.cpu_s.pop(name, None)
            if is_device_lost(error):  # to everyone, but not by everyone
                turns.failed |= dict.fromkeys(turns.samples, f"the device was lost to {name}")
                turns.samples.clear()
                turns.cpu_s.clear()
                return
            continue
        if warm_up:
            continue
        turns.samples[name].append(seconds)
        cpu_s: float | None = getattr(clock, "cpu_s", None)
        if cpu_s is not None:
            turns.cpu_s.setdefault(name, []).append(cpu_s)


def _is_sure(turns: Turns, width: float) -> bool:
    first, *others = turns.samples
    spreads = [spread for other in others if (spread := turns.ratio(other, first))] or [spread_of(turns.samples[first])]
    return all(s.low is not None and s.high is not None and s.high - s.low <= width * s.median for s in spreads)


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Round by round; a CPU time of 0, which a clock too coarse for the call gives, counts as the least it can tell."""
    least = time.get_clock_info("process_time").resolution
    return [max(a, least) / max(b, least) for a, b in zip(of, to, strict=True)]


def spread_of(values: Sequence[float]) -> Spread:
    """Median, quartiles and the median's interval of 95 %."""
    ordered = sorted(values)
    low, high = confidence(ordered) or (None, None)
    q1, median, q3 = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return Spread(median=median, q1=q1, q3=q3, low=low, high=high, n=len(ordered))


def confidence(ordered: Sequence[float]) -> tuple[float, float] | None:
    """The interval that holds the median in 95 of 100 cases: each value is above it or below like a coin's throw."""
    n, tail, rank = len(ordered), 0.0, 0
    while rank < n and tail + comb(n, rank) / 2**n <= 0.025:
        tail += comb(n, rank) / 2**n
        rank += 1
    return (ordered[rank - 1], ordered[n - rank]) if rank else None


def _quantile(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def reason_of(error: BaseException) -> str:
    """For a result file: one line, without this machine's folders."""
    line = next(iter(str(error).strip().splitlines()), "")
    words = re.sub(r"(?:/[\w.+-]+)+/([\w.+-]+)", r"\1", line)[:200]
    return words if isinstance(error, Missing) else f"{type(error).__name__}: {words}"
