"""`bench denoise`: the model's part of a step by size, eager and compiled; packs; whole loops by cache; --profile.

A step is `evaluate` on a request that stands before its first step: it changes nothing, so it can be repeated. A loop
is `generate_latents`: every step with guidance, solver and cache, without text encoder and decoder.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...runtime.cache.spec import PRESETS
from ...runtime.core.request import VideoRequest
from ...runtime.engine.denoise import evaluate
from ...runtime.engine.engine import Engine
from ...runtime.engine.pack_cache import Layouts
from ...runtime.engine.trajectory import Trajectory
from ...runtime.families.wan.compiled import compile_trunk
from ...runtime.families.wan.denoiser import WanDenoiser
from ...runtime.models.model import Model
from ..harness import Budget, Clock, CudaClock, Missing, Run, Turns, WallClock, take_turns
from ..sheet import Labels, Sheet, suite_parser
from .clips import Size, clip_request, size_of, words_of

# Of the demo model; other models are measured at their own default size, a clip and a single frame of it.
DEMO_SIZES: tuple[Size, ...] = ((64, 64, 1), (64, 64, 17), (128, 96, 29))
MIXED: tuple[Size, ...] = ((64, 64, 1), (64, 64, 17), (96, 64, 9), (64, 96, 17))
SAME = 4  # requests of the default size in a pack


def denoise(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be 1 or more, got {options.steps}")
    if options.profile is not None:
        from .profile import profile

        return profile(options)
    suite = Denoising(options)
    with suite.sheet.running(cases=suite.num_cases):
        for size in suite.sizes:
            suite.step(size)
        for name, sizes in suite.packs.items():
            suite.pack(name, sizes)
        for size in suite.loops:
            suite.loop(size)
    return suite.sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("denoise", "A denoising step by size and cache, eager and compiled.")
    option = parser.add_argument
    option("--size", type=size_of, action="append", metavar="WxHxF", help="pixels and frames; may be given again")
    option("--steps", type=int, metavar="N", help="of a whole loop; default: the checkpoint's")
    option("--compile", action=argparse.BooleanOptionalAction, help="compiled blocks too; default: unless --quick")
    option("--profile", type=Path, metavar="DIR", help="write a trace and a table of operations there, and stop")
    return parser


class Denoising:
    def __init__(self, options: argparse.Namespace, engine: Engine | None = None) -> None:
        self.options = options
        quick = options.quick
        self.budget = Budget(seconds=1.0 if quick else 6.0, width=0.05 if quick else 0.01, most=40 if quick else 200)
        self.engine = engine or Engine.from_pretrained(options.model)
        d = self.engine.defaults
        self.default: Size = (d.width, d.height, d.num_frames)
        ours = options.model == "demo"
        self.sizes = options.size or (DEMO_SIZES if ours else ((d.width, d.height, 1), self.default))
        self.loops = options.size or ((self.default,) if quick or not ours else DEMO_SIZES[1:])
        self.packs = {f"same-{SAME}": (self.default,) * SAME} | ({"mixed": MIXED} if ours else {})
        self.num_cases = len(self.sizes) + len(self.packs) + len(self.loops)
        settings = {"steps": options.steps or d.num_inference_steps, "dtype": str(self.engine.dtype)}
        self.sheet = Sheet("denoise", options, settings)
        self.clock: Clock = CudaClock(self.engine.device) if self.engine.device.type == "cuda" else WallClock()
        self.compiled = Compiled(self.engine.model, not quick if options.compile is None else options.compile)

    # --- cases --------------------------------------------------------------------------------------------------------

    def step(self, size: Size) -> None:
        """One request alone, both guidance branches."""
        name = f"denoise/step/{words_of(size)}"
        self.sheet.check_time(name)
        t = self._ready(size)
        runs: dict[str, Run] = {"eager": self._evaluation(self.engine.model, [t])}
        try:
            runs["compiled"] = self._evaluation(self.compiled.model(), [t])
        except Missing as reason:
            self.sheet.missing(f"{name}/compiled", str(reason))
        self._measure(name, runs, "eager", self._labels(size, t))

    def pack(self, name: str, sizes: Sequence[Size]) -> None:
        """Several requests in one pack, beside the same requests one after another."""
        name = f"denoise/pack/{name}"
        self.sheet.check_time(name)
        members = [self._ready(size, ticket) for ticket, size in enumerate(sizes)]
        alone = [self._evaluation(self.engine.model, [t]) for t in members]
        runs: dict[str, Run] = {
            "packed": self._evaluation(self.engine.model, members),
            "apart": lambda: [run() for run in alone],
        }
        labels: Labels = {"requests": len(members), "tokens": sum(_tokens(t) for t in members)}
        self._measure(name, runs, "packed", labels)

    def loop(self, size: Size) -> None:
        """All steps, exact and by each cache preset."""
        name = f"denoise/loop/{words_of(size)}"
        self.sheet.check_time(name)
        runs: dict[str, Run] = {}
        for contestant, cache in {"exact": "none", **{preset: preset for preset in PRESETS}}.items():
            request = self._request(size, cache)
            choice = self.engine.prepare(request).cache.choice
            if cache != "none" and choice.policy.name == "none":
                self.sheet.missing(f"{name}/{contestant}", choice.reason or "the preset means no caching here")
                continue
            runs[contestant] = lambda request=request: self.engine.generate_latents(request)  # type: ignore[misc]
        self._measure(name, runs, "exact", self._labels(size, self.engine.prepare(self._request(size))))

    def _measure(self, name: str, runs: dict[str, Run], ours: str, labels: Labels) -> Turns:
        with torch.inference_mode():
            turns = take_turns(runs, self.clock, self.budget)
        self.sheet.turns(name, turns, ours, labels)
        return turns

    # --- requests -----------------------------------------------------------------------------------------------------

    def _request(self, size: Size, cache: str = "none") -> VideoRequest:
        return clip_request(size, self.options.steps, self.options.seed, cache)

    def _ready(self, size: Size, ticket: int = 0) -> Trajectory:
        """A request that stands before its first step. Tickets tell requests of one pack apart."""
        t = self.engine.prepare(self._request(size))
        t.ticket = ticket
        while t.stage == "encode":
            t.work()
        return t

    def _evaluation(self, model: Model, members: Sequence[Trajectory]) -> Run:
        layouts = Layouts(model)
        return lambda: evaluate(model, members, layouts)

    def _labels(self, size: Size, t: Trajectory) -> Labels:
        width, height, num_frames = size
        return {"width": width, "height": height, "num_frames": num_frames, "tokens": _tokens(t)}


class Compiled:
    """The model with compiled blocks, made when it is first asked for; it shares the other's weights."""

    def __init__(self, model: Model, wanted: bool, which: Callable[[str], str | None] = shutil.which) -> None:
        self._eager, self._wanted, self._which = model, wanted, which
        self._model: Model | None = None

    def model(self) -> Model:
        """Missing where it cannot be had, or is not wanted."""
        if not self._wanted:
            raise Missing("only with --compile: it takes most of a minute a size")
        if self._eager.device.type == "cpu" and not (self._which("g++") or self._which("clang++")):
            raise Missing("torch.compile needs a C++ compiler: install g++")
        if self._model is None:
            experts = tuple(_sharing_weights(expert) for expert in self._eager.experts)
            for expert in experts:
                compile_trunk(expert)
            self._model = dataclasses.replace(self._eager, experts=experts)
        return self._model


def _sharing_weights(denoiser: WanDenoiser) -> WanDenoiser:
    """A copy of the modules over the same tensors."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})


def _tokens(t: Trajectory) -> int:
    """Of all branches."""
    return math.prod(t.grid) * t.num_branches
