"""Engines of tiny checkpoints, stepped and watched: what the tests of continuous batching share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import relative_l2

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.events import Event
from skylapse.runtime.engine.trajectory import Trajectory

SIZES = [(64, 64, 5), (64, 64, 1), (32, 64, 9), (96, 64, 5), (64, 32, 13)]
# Thresholds under which a random network's steps are skipped and computed in turns.
CACHES = [
    "none",
    "easy:threshold=2,warmup=1",
    "first_block:threshold=1.1,warmup=1",
    "first_block:threshold=1.2,order=1,warmup=1",
    "taylorseer:3",
    "budget:0.5",
    "teacache:0.3",
    "magcache:threshold=0.3,warmup=1",
]
CALIBRATED_STEPS = 12
PROMPTS = ["a red circle", "a large blue star moving left at night", "small box", "a green ring moving up"]


def engine_of(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), device="cpu", dtype="fp32")


def small_request(cache: str = "none", seed: int = 0, **changes: Any) -> VideoRequest:
    """Return a request of as many steps as the tiny checkpoints are calibrated for."""
    asked = dict(prompt="a star", width=64, height=64, num_frames=5, num_inference_steps=CALIBRATED_STEPS)
    return VideoRequest(**(asked | changes), cache=cache, seed=seed)


def draw_request(rng: random.Random, multiple: int = 16) -> VideoRequest:
    cache = rng.choice(CACHES)
    is_calibrated = cache.startswith("magcache")
    width, height, num_frames = rng.choice(
        [size for size in SIZES if not size[0] % multiple and not size[1] % multiple]
    )
    source = {}
    if rng.random() < 0.25:
        pixels = np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
        source = dict(video=pixels, strength=rng.choice([0.3, 0.6, 0.8]))
    return VideoRequest(
        **source,
        prompt=rng.choice(PROMPTS),
        negative_prompt=rng.choice(["", "a box"]),
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=CALIBRATED_STEPS if is_calibrated else rng.randint(3, 14),
        guidance_scale=rng.choice([1.0, 3.0]),
        guidance_interval=rng.choice([None, None, (0.3, 0.9)]),
        solver="unipc" if is_calibrated else rng.choice(["unipc", "euler", "dpmpp"]),
        seed=rng.randrange(100),
        cache=cache,
    )


class Recorder:
    """Steps an engine and keeps its events, and the trajectories that it would drop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[Event] = []
        self.trajectories: dict[int, Trajectory] = {}

    def step(self) -> list[Event]:
        events = self.engine.step()
        self.trajectories |= self.engine._batch.active
        self.events += events
        return events

    def run(self) -> None:
        while self.engine.has_work():
            self.step()

    def trace(self, ticket: int) -> str:
        return self.trajectories[ticket].cache.trace

    def latents(self, ticket: int) -> torch.Tensor:
        return self.trajectories[ticket].final_latents()


def solo(
    folder: Path, request: VideoRequest, checkpoint_every: int = 0, folder_of_state: Path | None = None
) -> Recorder:
    alone = Recorder(engine_of(folder))
    alone.engine.submit(request, checkpoint_every=checkpoint_every, checkpoint_dir=folder_of_state)
    alone.run()
    return alone


def assert_same(batched: Recorder, ticket: int, alone: Recorder) -> None:
    """Assert the same latents and decisions, unless an indicator lay within 1e-4 of its threshold."""
    cache = alone.trajectories[1].cache
    if cache.close_calls and batched.trace(ticket) != cache.trace:
        return
    assert batched.trace(ticket) == cache.trace
    assert relative_l2(batched.latents(ticket), alone.latents(1)) < 1e-5
