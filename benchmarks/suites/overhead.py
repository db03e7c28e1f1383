"""What a tick costs beside the model: scheduling, packing, caches, guidance, solvers, events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...runtime.core.events import Progress
from ...runtime.core.request import VideoRequest
from ...runtime.engine import batch
from ...runtime.engine.denoise import take
from ...runtime.engine.engine import Engine
from .clips import prompt_of

OF_MODEL = ("embed", "trunk", "head")


class Stopwatch:
    """Seconds spent inside the functions that it has wrapped."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._now = 0.0, now

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = self._now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += self._now() - began

        return timed


@dataclass(frozen=True)
class Ticks:
    """Of each tick: seconds, the share that is not the denoiser's, and the solver's and guidance's part of that.

    steps_a_tick: of a request; above 1 caches carried it over several.
    """

    seconds: list[float]
    shares: list[float]
    solver_shares: list[float]
    steps_a_tick: float


def measure_ticks(engine: Engine, count: int, cache: str, num_steps: int | None = None) -> Ticks:
    """Ticks of `count` requests in which all of them denoise before and after. The engine must be idle.

    On a GPU a tick's time is the host's: how long it takes to launch, not to compute.
    """
    model, solver = Stopwatch(), Stopwatch()
    seconds, shares, solver_shares, steps = [], [], [], 0
    for seed in range(count):
        request = VideoRequest(prompt=prompt_of(seed), seed=seed, cache=cache, num_inference_steps=num_steps)
        engine.submit(request)
    with _watched(engine, model, solver):
        while engine.has_work():
            before = _stages(engine)
            model.seconds = solver.seconds = 0.0
            began = time.perf_counter()
            events = engine.step()
            tick_s = time.perf_counter() - began
            if model.seconds and before == _stages(engine) and set(before) == {"denoise"}:
                seconds.append(tick_s)
                shares.append(1 - model.seconds / tick_s)
                solver_shares.append(solver.seconds / tick_s)
                steps += sum(isinstance(event, Progress) for event in events)
    return Ticks(seconds, shares, solver_shares, round(steps / count / max(1, len(seconds)), 3))


def measure_preview(engine: Engine, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of a preview behind each step of the default request alone, and of the ticks between them."""
    engine.submit(VideoRequest(prompt=prompt_of(0), num_inference_steps=num_steps))
    previews: list[float] = []
    ticks: list[float] = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        ticks.append(time.perf_counter() - began)
        for t in engine._batch.active.values():
            if t.stage == "denoise":
                began = time.perf_counter()
                engine.previewer(t.current)
                previews.append(time.perf_counter() - began)
    return previews[1:], ticks


def _stages(engine: Engine) -> list[str]:
    return [t.stage for t in engine._batch.active.values()]


@contextmanager
def _watched(engine: Engine, model: Stopwatch, solver: Stopwatch) -> Iterator[None]:
    """The denoiser's functions and the solver's under stopwatches; all is as before behind it."""
    held: list[tuple[Any, str]] = []
    for expert in engine.model.experts:
        held += [(expert, name) for name in OF_MODEL] + [(expert.condition_embedder, "embed_time")]
    own = [vars(owner).get(name) for owner, name in held]
    for owner, name in held:
        object.__setattr__(owner, name, model.wrap(getattr(owner, name)))
    setattr(batch, "take", solver.wrap(take))  # noqa: B010  a name that batch.py imports
    try:
        yield
    finally:
        setattr(batch, "take", take)  # noqa: B010
        for (owner, name), before in zip(held, own, strict=True):
            object.__delattr__(owner, name)
            if before is not None:  # a compiled trunk
                object.__setattr__(owner, name, before)
