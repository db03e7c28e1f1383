"""GPUs of a service: how many an engine asks Ray for, and whether there are as many as its engines need."""

from __future__ import annotations

import math

import ray

from .config import ServeConfig


def cluster_gpus() -> float:
    """GPUs that Ray knows of now, in use or not; a cluster that scales may have more later."""
    if not ray.is_initialized():
        return 0.0
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]


def gpus_per_engine(config: ServeConfig, num_gpus: float) -> float:
    """What Ray is asked for, so that it gives every engine a GPU of its own; 0 for engines on a CPU.

    num_gpus: what Ray knows of, which decides where no device is configured.
    """
    on_cuda = num_gpus > 0 if config.device is None else config.device == "cuda"
    return config.engine_gpus if on_cuda else 0.0


def check_gpus(config: ServeConfig, num_gpus: float, memory_bytes: int | None) -> None:
    """ValueError where these GPUs have no room for all engines: Ray would wait for more for ever.

    memory_bytes: what an engine may take at most (SKYLAPSE_MEMORY_MB), without which it takes nearly all of its GPU.
    """
    share = gpus_per_engine(config, num_gpus)
    if not share:
        return
    if share < 1 and memory_bytes is None:
        raise ValueError(
            "engine_gpus below 1 needs SKYLAPSE_MEMORY_MB: Ray counts shares of a GPU, it bounds no memory"
        )
    if num_gpus < 1:
        raise ValueError("device cuda was asked for, but Ray finds no GPU")
    room = int(num_gpus) * math.floor(1 / share + 1e-9)
    if config.engines > room:
        there = "1 GPU" if num_gpus == 1 else f"{num_gpus:g} GPUs"
        each = "one each" if share == 1 else f"{share:g} each"
        raise ValueError(
            f"engines must be at most {room} on {there}, {each}, got {config.engines} (--device cpu takes none)"
        )
