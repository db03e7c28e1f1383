"""How far a backend is from eager, and how long it takes: one tiny clip, and a few of a size."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from . import footprint
from .footprint import watch
from .stream import FIRST, NEXT, Coder, Plan, Run

TINY = (4, 6)  # latents; of an artifact for any size


@torch.inference_mode()
def compare(coder: Coder, eager: Run, run: Run, plan: Plan, device: torch.device) -> float:
    """Greatest difference of a tiny clip of two chunks from eager; nan where it is not finite. NoRoom: see `_ask`."""
    _ask(coder, plan.size or TINY, plan, device)
    chunks = _clip(coder, plan.size or TINY, plan, device)
    pairs = zip(_run(run, chunks), _run(eager, chunks), strict=True)
    difference = torch.cat([(ours.float() - theirs.float()).abs().flatten() for ours, theirs in pairs])
    return float(difference.max()) if torch.isfinite(difference).all() else float("nan")


@torch.inference_mode()
def measure(
    coder: Coder, runs: dict[str, Run], size: tuple[int, int], plan: Plan, device: torch.device, repeats: int
) -> dict[str, float]:
    """Least seconds of a clip of two chunks by each, in turns, after one that warms it up.

    On a CPU the process's own: by the clock, others on the same cores made eager ten times slower than it is.
    NoRoom: see `_ask`.
    """
    _ask(coder, size, plan, device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = dict.fromkeys(runs, float("inf"))
    chunks = _clip(coder, size, plan, device)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began_s = clock()
            _run(run, chunks)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                times[name] = min(times[name], clock() - began_s)
    return times


@torch.inference_mode()
def weigh(coder: Coder, run: Run, size: tuple[int, int], plan: Plan, device: torch.device) -> int:
    """Bytes that a clip of two chunks takes at most, beside what is held before."""
    chunks = _clip(coder, size, plan, device)
    with watch(device) as grown:
        _run(run, chunks)
    return grown.num_bytes


def _ask(coder: Coder, size: tuple[int, int], plan: Plan, device: torch.device) -> None:
    """NoRoom rather than running out in the middle, perhaps at the cost of who else works on the device.

    Asked for is what the clip takes by eager in fp32, which is more than by any backend.
    """
    if footprint.free_bytes(device) is not None:
        needed = footprint.clip_bytes(coder, size, plan.chunk or 4, torch.float32)
        footprint.require_room(device, needed, f"to compare with eager at {size[0]} x {size[1]} latents")


def _clip(coder: Coder, size: tuple[int, int], plan: Plan, device: torch.device) -> list[Tensor]:
    """Inputs of `first`, and of a `next` of four latent frames, or as many as the plan says."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(coder.module.parameters()).dtype
    shapes = [coder.input_shape(plan.chunk or 4, *size, graph) for graph in (FIRST, NEXT)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _run(run: Run, chunks: Sequence[Tensor]) -> list[Tensor]:
    results, states = [], None
    for chunk in chunks:
        y, states = run(chunk, states)
        results.append(y)
    return results
