"""Devices and dtypes by their names, and the memory of a device: how it is allocated, what there is, what was held."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from .config import Settings, configures_allocator

logger = logging.getLogger(__name__)
EXPANDABLE = "expandable_segments:True"
LAYOUT_BYTES = 256 * 2**20  # of packs' layouts kept; each holds its prompts' keys and values once more
# Of timesteps' embeddings and modulations kept: 14 (dim) bytes each in bf16, 72 kB of A14B's, so 234 timesteps: each of
# both experts' in 40 steps five times over.
TIME_EMBEDDING_BYTES = 16 * 2**20
SHARE = {"cuda": 0.92, "cpu": 0.8}  # of the memory that there is
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of text encoders and denoisers
HOST_SHARE = 0.8  # of the machine's memory, for pinned copies of weights


def parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda, got {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds none")
    return where


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    return dtype


def expand_segments(device: torch.device) -> None:
    """Let allocations of any size come from segments that grow, for as long as this process lives.

    Each CUDA stream has a pool of its own. In segments of fixed sizes what decoding leaves behind in its stream's pool
    is in pieces, which steps get only when an allocation has failed, by a free that waits for the device; a segment
    that grows is given back by the page. To be called before the first allocation; whoever sets PYTORCH_ALLOC_CONF (or
    PYTORCH_CUDA_ALLOC_CONF) decides instead. CUDA graphs keep their own pools, as before. Tensors in such segments
    cannot be handed to another process by all drivers; nothing here does.
    """
    if device.type != "cuda":
        return
    if configures_allocator():
        logger.info("device memory is allocated as PYTORCH_ALLOC_CONF says")
        return
    torch._C._accelerator_setAllocatorSettings(EXPANDABLE)
    logger.info("device memory is allocated with %s", EXPANDABLE)


def memory_bytes(device: torch.device, settings: Settings) -> int:
    """What weights, texts and requests may take together."""
    return settings.memory_bytes or round(SHARE[device.type] * device_memory(device))


def cache_bytes(device: torch.device, settings: Settings) -> int:
    """What caches may take beside weights and requests: of texts, and on CUDA of packs' layouts and timesteps."""
    others = LAYOUT_BYTES + TIME_EMBEDDING_BYTES if device.type == "cuda" else 0
    return text_cache_bytes(device, settings) + others


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
