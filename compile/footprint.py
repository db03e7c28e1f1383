"""Predict the memory that coding takes before anything is done, and measure that of a loaded backend.

Runtimes have arenas of their own, which torch's allocator knows nothing of; so the process (the CPU) or the device
(CUDA) is asked. Whatever else the process does meanwhile is counted too: a measured figure is an upper bound. A
predicted one counts tensors, and names an estimate for all else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.func import functional_call

from ..kernels.fake_cuda import fake_cuda
from ..kernels.live_bytes import LiveBytes
from .stream import FIRST, NEXT, Coder, States

PROC = Path("/proc/self")
CAPABILITY = 90  # of the fake device: no coder's kernels differ by architecture
GIB = 2**30
# An estimate for a process that uses CUDA: its context, and what cuBLAS and cuDNN keep.
CONTEXT_BYTES = GIB // 2


@dataclass(frozen=True)
class Footprint:
    """Bytes of a loaded artifact, and of its work on frames of `area` latents."""

    held_bytes: int
    work_bytes: int
    area: int

    def work_at(self, height: int, width: int) -> int:
        """Return the bytes of work on frames of height x width latents: activations and states grow with their area."""
        return round(self.work_bytes * height * width / self.area)


class NoRoom(torch.OutOfMemoryError):
    """Work that was not begun, because the device has too little memory free for it."""


def free_bytes(device: torch.device, cached: bool = False) -> int | None:
    """Return the free bytes of a GPU, with those that this process's allocator keeps unused if `cached`.

    None for a CPU: its memory is not checked beforehand.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if cached else 0
    return torch.cuda.mem_get_info(device)[0] + unused


def require_room(device: torch.device, num_bytes: int, what: str, limit_bytes: int | None = None) -> None:
    """Raise NoRoom if this process cannot have so much of the device now, or not within its own limit.

    what: the thing that needs it, as the beginning of a sentence. limit_bytes: of all that the process has there.
    """
    free = free_bytes(device, cached=True)
    if free is None:
        return
    if num_bytes > free:
        raise NoRoom(f"{what}: about {gib(num_bytes)} of the device's memory are needed, {gib(free)} are free")
    if limit_bytes is not None and num_bytes > (left := limit_bytes - taken_bytes(device)):
        raise NoRoom(f"{what}: about {gib(num_bytes)} are needed, SKYLAPSE_MEMORY_MB leaves {gib(max(0, left))}")


def taken_bytes(device: torch.device) -> int:
    """Return the bytes of the device that torch's tensors in this process take."""
    return torch.cuda.memory_allocated(device)


def clip_bytes(coder: Coder, size: tuple[int, int], chunk: int, dtype: torch.dtype) -> int:
    """Return the most bytes of tensors at once while eager codes latents of `size`, `chunk` latent frames at a time.

    The module itself is run on fake CUDA tensors; what convolutions take beside their tensors is not counted.
    """
    weights = (*coder.module.named_parameters(), *coder.module.named_buffers())
    shapes = {name: weight.shape for name, weight in weights}
    states: States | None = None
    with torch.no_grad(), fake_cuda(CAPABILITY):
        state = {name: torch.empty(shape, device="cuda", dtype=dtype) for name, shape in shapes.items()}
        with LiveBytes() as live:
            for graph in (FIRST, NEXT, NEXT):  # by the third chunk everything that stays is there
                x = torch.empty(coder.input_shape(chunk, *size, graph), dtype=dtype, device="cuda")
                y, states = functional_call(coder.module, state, (x, states))
                del x, y
    return live.peak_bytes


def build_bytes(coder: Coder, size: tuple[int, int], chunk: int, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Return the most bytes of a GPU that building a backend for latents of `size` takes: tensors, and estimates above.

    A plan's scratch memory is there all the while; beside it stand in turn the builder's workspace, a clip's two sets
    of states, and the same clip by eager in fp32, by which the plan is judged.
    """
    states = coder.states.num_bytes(*size, dtype.itemsize)
    scratch = max(0, clip_bytes(coder, size, chunk, dtype) - states)
    weights = sum(p.numel() for p in coder.module.parameters()) * (torch.float32.itemsize + dtype.itemsize)
    judge = clip_bytes(coder, size, chunk, torch.float32)
    return 2 * CONTEXT_BYTES + weights + scratch + max(workspace_bytes, 2 * states, judge)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


@dataclass
class Grown:
    """The most bytes by which the memory in use has grown since `watch` began."""

    num_bytes: int = 0


@contextmanager
def watch(device: torch.device) -> Iterator[Grown]:
    """Measure the growth of the memory in use inside the block."""
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
    """Reset the kernel's mark of the highest resident memory; returns the line to read, VmRSS if it cannot be reset."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what is freed, and not given back, takes in what is measured
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return "VmRSS"
    return "VmHWM"


def _foreign_bytes(device: torch.device) -> int:
    """Return the bytes in use of the device that torch's allocator has not taken."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _status_bytes(name: str) -> int:
    """Return a line of the kernel's account of this process, in bytes; 0 where there is none (not on Linux)."""
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
