"""Memory of a device: what there is, and the most that was held at once, where the device counts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .config import Settings

SHARE = {"cuda": 0.92, "cpu": 0.8}  # of the memory that there is
HOST_SHARE = 0.8  # of the machine's memory, for pinned copies of weights


def memory_bytes(device: torch.device, settings: Settings) -> int:
    """What weights, texts and requests may take together."""
    return settings.memory_bytes or round(SHARE[device.type] * device_memory(device))


def host_bytes() -> int:
    """What pinned copies of weights may take."""
    return round(HOST_SHARE * device_memory(torch.device("cpu")))


def text_cache_bytes(device: torch.device, settings: Settings) -> int:
    """What the text cache may take: as configured, and never more than an eighth of a small memory."""
    return min(settings.text_cache_bytes, memory_bytes(device, settings) // 8)


def device_memory(device: torch.device) -> int:
    """Bytes of the device, or of the machine within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes allocated at once since `reset_peak`; None where nobody counts (the CPU)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
