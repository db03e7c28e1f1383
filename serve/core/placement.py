"""GPUs of a service: the number that an engine asks Ray for, and the check that there are enough for all engines."""

from __future__ import annotations

import math

import ray

from .config import ServeConfig
from .model_entry import EngineGroup


def cluster_gpus() -> float:
    """Return the GPUs that Ray knows of now, in use or not; a cluster that scales may have more later."""
    if not ray.is_initialized():
        return 0.0
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]


def gpus_per_engine(group: EngineGroup, num_gpus: float) -> float:
    """Return the GPUs to ask Ray for, so that every engine gets one of its own; 0 for engines on a CPU.

    num_gpus: the GPUs that Ray knows of, which decide if no device is configured.
    """
    on_cuda = num_gpus > 0 if group.device is None else group.device == "cuda"
    return group.engine_gpus if on_cuda else 0.0


def check_gpus(config: ServeConfig, num_gpus: float, memory_bytes: int | None) -> None:
    """Raise ValueError if these GPUs have no room for all engines: Ray would wait for more for ever.

    memory_bytes: the most that an engine may take (SKYLAPSE_MEMORY_MB); None: it takes nearly all of its GPU.
    """
    shares = [(group, share) for group in config.groups if (share := gpus_per_engine(group, num_gpus))]
    if not shares:
        return
    if memory_bytes is None and any(share < 1 for _, share in shares):
        raise ValueError(
            "engine_gpus below 1 needs SKYLAPSE_MEMORY_MB: Ray counts shares of a GPU, it bounds no memory"
        )
    if num_gpus < 1:
        raise ValueError("device cuda was asked for, but Ray finds no GPU")
    there = "1 GPU" if num_gpus == 1 else f"{num_gpus:g} GPUs"
    if len(shares) == 1:
        ((group, share),) = shares
        room = int(num_gpus) * _engines_a_gpu(share)
        if group.min_engines > room:
            each = "one each" if share == 1 else f"{share:g} each"
            got = f"got {group.min_engines} (--device cpu takes none)"
            raise ValueError(f"engines must be at most {room} on {there}, {each}, {got}")
        return
    # Engines of different shares are not packed together: an upper bound of what they need.
    needed = sum(math.ceil(group.min_engines / _engines_a_gpu(share)) for group, share in shares)
    if needed > num_gpus:
        counts = ", ".join(f"{group.min_engines} of {group.name!r}" for group, _ in shares)
        raise ValueError(f"engines must fit on {there}, got {counts}, which need {needed} (device cpu takes none)")


def _engines_a_gpu(share: float) -> int:
    return math.floor(1 / share + 1e-9)
