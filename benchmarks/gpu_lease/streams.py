"""Measure the time that kernels of several streams of a GPU ran at once, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

Interval = tuple[int, int]  # ns


@dataclass(frozen=True)
class Overlap:
    """Seconds of kernels. busy_s: of each stream; both_s: of the busiest two at the same time."""

    busy_s: dict[str, float]
    both_s: float

    @property
    def less_busy_s(self) -> float:
        """Return the seconds of the second busiest stream."""
        ordered = sorted(self.busy_s.values(), reverse=True)
        return ordered[1] if len(ordered) > 1 else 0.0


def overlap_of(run: Callable[[], object]) -> Overlap:
    """Measure the overlap of everything that `run` queues."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    assert profiler.profiler is not None
    return overlap(intervals(profiler.profiler.kineto_results.events()))


def intervals(events: Iterable[Any]) -> dict[int, list[Interval]]:
    """Return stream -> the intervals in which it was busy, from the profiler's own events."""
    found: dict[int, list[Interval]] = {}
    for event in events:
        if event.device_type() == DeviceType.CUDA and event.duration_ns() > 0:
            start = event.start_ns()
            found.setdefault(event.device_resource_id(), []).append((start, start + event.duration_ns()))
    return found


def overlap(found: Mapping[int, list[Interval]]) -> Overlap:
    joined = {stream: _joined(own) for stream, own in found.items()}
    busy = {str(stream): sum(stop - start for start, stop in own) / 1e9 for stream, own in joined.items()}
    busiest = sorted(joined, key=lambda stream: -busy[str(stream)])[:2]
    both = _common(*(joined[stream] for stream in busiest)) if len(busiest) == 2 else 0
    return Overlap(busy, both / 1e9)


def _joined(own: list[Interval]) -> list[Interval]:
    """Return the intervals in rising order, overlapping ones joined."""
    out: list[Interval] = []
    for start, stop in sorted(own):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _common(one: list[Interval], other: list[Interval]) -> int:
    """Return the ns that lie in both."""
    total, i, j = 0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total
