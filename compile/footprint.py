"""How much memory a loaded backend takes: what it holds, and what a clip takes on top.

Runtimes have arenas of their own, which torch's allocator knows nothing of; so the process (the CPU) or the device
(CUDA) is asked. Whatever else the process does meanwhile is counted too: a figure is an upper bound.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Footprint:
    """Bytes of a loaded artifact, and of its work on frames of `area` latents."""

    held_bytes: int
    work_bytes: int
    area: int

    def work_at(self, height: int, width: int) -> int:
        """Of frames of height x width latents: activations and states grow with their area."""
        return round(self.work_bytes * height * width / self.area)


@dataclass
class Grown:
    """By how much the memory in use has grown at most, since `watch` began."""

    num_bytes: int = 0


@contextmanager
def watch(device: torch.device) -> Iterator[Grown]:
    """Measure what happens inside."""
    grown = Grown()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = _foreign_bytes(device) + torch.cuda.memory_allocated(device)
        yield grown
        torch.cuda.synchronize(device)
        # Other runtimes' arenas keep what they have taken, so what they hold now is their peak.
        after = _foreign_bytes(device) + torch.cuda.max_memory_allocated(device)
    else:
        mark = _begin()
        before = _status_bytes("VmRSS")
        yield grown
        after = max(_status_bytes("VmRSS"), _status_bytes(mark))
    grown.num_bytes = max(0, after - before)


def _begin() -> str:
    """Let the kernel's mark of the highest resident memory begin anew; which line to read, where it cannot."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what is freed, and not given back, takes in what is measured
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return "VmRSS"
    return "VmHWM"


def _foreign_bytes(device: torch.device) -> int:
    """Of the device's memory in use, what torch's allocator has not taken."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _status_bytes(name: str) -> int:
    """A line of the kernel's account of this process; 0 where there is none (another system than Linux)."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
