"""Warm-up: tiny clips through an engine's own way, so that no client waits for what is made at first use.

Triton compiles a kernel anew for each set of its constants, and for each class of its numbers: 1, a multiple of 16, any
other. So there are clips of every solver, with guidance and without, with previews and without, of a number of tokens
that 16 divides and of one that it does not, below and above 64 (where launches' rows change), alone and in packs of
several timesteps. They share the model with what comes later; queue, counters and texts are those of another engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from ..core.device import reset_peak
from ..core.events import Failed, RequestTooLarge
from ..core.request import SOLVERS, VideoRequest
from ..models.model import Model
from ..sampler.schedule import make_schedule
from .engine import Engine

logger = logging.getLogger(__name__)
Grid = tuple[int, int, int]  # latent frames, and patches high and wide
SHORT, SHORT_EVEN = (3, 3, 3), (2, 4, 4)  # 27 and 16 tokens: with both branches still at most MANY_TOKENS
MANY_TOKENS = 64
GUIDED, UNGUIDED = 4.0, 1.0
STRENGTH = 0.8
ALL_UPDATES = {1: 4, 2: 5, 3: 6}  # order of a solver -> steps in which all its kinds of update occur


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up came to."""

    num_clips: int
    seconds: float


@dataclass(frozen=True)
class Clip:
    """A request, and whether every step of it is previewed."""

    request: VideoRequest
    previews: bool = False


def warm_up(engine: Engine) -> WarmUp:
    """Make what first requests would wait for, before the engine's first request.

    Nothing of it is left in the engine's events, counters, peak memory or files. RuntimeError names what failed: a
    device that cannot do this serves nobody. Meant for CUDA: on a CPU nothing is compiled, and of the 0.07 s that the
    demo model's first request takes longer than its second, a clip of 0.12 s saved 0.02.
    """
    began_s, model, compiles = time.perf_counter(), engine.model, engine.settings.compile
    # Compiled coders are loaded by `Decoders`, which would measure them at these sizes too and write down the result.
    other = Engine(
        replace(model, codec=model.codec.eagerly()), replace(engine.settings, compile=False, max_queued=2**20)
    )
    other.memory, other.previewer = engine.memory, engine.previewer
    num_clips = sum(_make(other, clips) for clips in waves(model, one_by_one=compiles))
    if compiles:
        _take_a_step(other)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        torch.cuda.empty_cache()
    reset_peak(model.device)
    return WarmUp(num_clips, time.perf_counter() - began_s)


def waves(model: Model, one_by_one: bool = False) -> Iterator[Sequence[Clip]]:
    """Clips that are in the engine at once, wave after wave.

    one_by_one: no packs of several requests, for blocks that are compiled for each size of a pack.
    """
    frames = model.codec.chunk + 1  # so that a decoder sees its first chunk and a whole one
    for grid in (SHORT, SHORT_EVEN, _odd(frames), (frames, 8, 8)):
        yield [_clip(model, grid, num_inference_steps=2, guidance_scale=GUIDED)]
    kinds = product((SHORT, SHORT_EVEN), (False, True), SOLVERS, (GUIDED, UNGUIDED))
    together = [
        _clip(model, grid, previews, solver=solver, guidance_scale=scale) for grid, previews, solver, scale in kinds
    ]
    together.append(_clip(model, SHORT, strength=STRENGTH))
    if model.folder.gives_frames:
        together += [_clip(model, SHORT, previews, gives_image=True) for previews in (False, True)]
    if one_by_one:
        yield from ([clip] for clip in together)
    else:
        yield together
        # One is encoded while the other is under way, so packs of both have two timesteps.
        yield [_clip(model, SHORT, num_inference_steps=20, guidance_scale=GUIDED)] * 2


def _clip(model: Model, grid: Grid, previews: bool = False, gives_image: bool = False, **fields: Any) -> Clip:
    """A request of this grid, or of the largest below it that the model can make; grey pixels where it needs some."""
    limits, folder, (frames, high, wide) = model.limits, model.folder, grid
    while high * wide * limits.size_multiple**2 > limits.max_pixels and min(high, wide) > 2:
        high, wide = high - 2, wide - 2  # odd sides stay odd
    height, width = high * limits.size_multiple, wide * limits.size_multiple
    num_frames = min(limits.temporal_multiple * (frames - 1) + 1, limits.max_num_frames)
    clip = np.full((num_frames, height, width, 3), 128, np.uint8)
    if gives_image or folder.concatenates_image:
        fields["image"] = clip[0]
    if folder.requires_last_image:
        fields["last_image"] = clip[0]
    if "strength" in fields:
        fields["video"] = clip
    fields.setdefault("num_inference_steps", _num_steps(model))
    return Clip(VideoRequest(prompt="warm-up", width=width, height=height, num_frames=num_frames, **fields), previews)


def _odd(frames: int) -> Grid:
    """The smallest square grid of so many frames, or one more, whose tokens are above MANY_TOKENS and no 16th."""
    frames, side = frames + (frames % 16 == 0), 5
    while frames * side**2 <= MANY_TOKENS:
        side += 2
    return frames, side, side


def _num_steps(model: Model) -> int:
    """The fewest steps that take a solver through all its kinds of update, and a request through all experts."""
    num_steps = ALL_UPDATES[model.solver.solver_order]
    while num_steps < 50:
        timesteps = make_schedule(model.solver, num_steps).timesteps
        if len({model.expert_at(timestep) for timestep in timesteps}) == len(model.experts):
            break
        num_steps += 1
    return num_steps


def _make(engine: Engine, clips: Sequence[Clip]) -> int:
    """Make clips beside each other; returns how many there were."""
    num_clips = 0
    for clip in clips:
        try:
            engine.submit(clip.request, preview_every=int(clip.previews))
        except RequestTooLarge as error:  # clients are told the same of theirs
            logger.warning("no warm-up of a clip of %d x %d x %d: %s", *clip.request.size, error)
        else:
            num_clips += 1
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"the warm-up failed: {type(event.error).__name__}: {event.error}") from event.error
    return num_clips


def _take_a_step(engine: Engine) -> None:
    """Compile the blocks for a clip of the model's own size, where it can be made."""
    defaults = engine.defaults
    clip = _clip(engine.model, SHORT, num_inference_steps=1)
    size = {name: getattr(defaults, name) for name in ("width", "height", "num_frames")}
    request = replace(clip.request, **size)
    try:
        engine.memory.check(engine.prepare(request))
    except RequestTooLarge as error:
        logger.warning("blocks are not compiled for the model's own size: %s", error)
        return
    engine.generate_latents(request)
