"""The most memory that was held at once while something ran."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_while(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes: allocated on a GPU, resident in this process on Linux, weights and all; None where nobody counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    counts = _reset_resident_peak()
    run()
    return resident_bytes("VmHWM") if counts else None


def held_bytes(device: torch.device) -> int | None:
    """What is held now, counted as `peak_while` counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int | None:
    """VmRSS, what is resident now, or VmHWM, the most since the last reset; None where there is no /proc."""
    try:
        status = (PROCESS / "status").read_text()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), None)


def _reset_resident_peak() -> bool:
    """False where this process may not: the peak would be that of its whole life."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
