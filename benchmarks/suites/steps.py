"""What each tick of a played trace did: its time, its pack, and the encoding and decoding beside it.

`bench simulate` fits its step times to these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ...runtime.core.events import Event, Progress, Ticket
from ...runtime.engine.engine import Engine
from ...runtime.engine.trajectory import Trajectory
from ..sheet import Labels, Sheet
from .traffic import SHAPES, request_of

STAGES = ("encode", "decode")


class StepWatch:
    """While it is entered, looks on at every tick of an idle engine, whose requests have one of SHAPES and no cache.

    tick_s: of each, without its items of encoding and decoding, and with what was submitted since the one before.
    tokens and requests: of its pack, all branches; 0 of a tick without one. items_s: (stage, kind) -> of each item.
    """

    def __init__(self, engine: Engine, now: Callable[[], float] = time.perf_counter) -> None:
        self.engine, self._now = engine, now
        self.tick_s: list[float] = []
        self.requests: list[int] = []
        self.tokens: list[int] = []
        self.items_s: dict[tuple[str, str], list[float]] = {(stage, kind): [] for stage in STAGES for kind in SHAPES}
        self._kinds = {size: kind for kind, size in SHAPES.items()}
        self._submit_s = self._items_s = 0.0

    def __enter__(self) -> StepWatch:
        self._step, self._submit, self._work = self.engine.step, self.engine.submit, Trajectory.work
        vars(self.engine).update(step=self.step, submit=self.submit)
        setattr(Trajectory, "work", lambda trajectory: self.work(trajectory))  # noqa: B010  a method
        return self

    def __exit__(self, *_: object) -> None:
        del self.engine.__dict__["step"], self.engine.__dict__["submit"]
        setattr(Trajectory, "work", self._work)  # noqa: B010

    def step(self) -> list[Event]:
        self._items_s, tokens = 0.0, self.engine.pack_stats[1]
        began = self._now()
        events = self._step()
        self.tick_s.append(self._now() - began - self._items_s + self._submit_s)
        self.tokens.append(self.engine.pack_stats[1] - tokens)
        self.requests.append(sum(isinstance(event, Progress) for event in events))
        self._submit_s = 0.0
        return events

    def submit(self, *arguments: Any, **terms: Any) -> Ticket:
        began = self._now()
        try:
            return self._submit(*arguments, **terms)
        finally:
            self._submit_s += self._now() - began

    def work(self, trajectory: Trajectory) -> None:
        size, stage = trajectory.request.size, trajectory.stage
        began = self._now()
        try:
            self._work(trajectory)
        finally:
            item_s = self._now() - began
            self._items_s += item_s
            self.items_s[stage, self._kinds[size]].append(item_s)


def write_steps(sheet: Sheet, watch: StepWatch, steps: int) -> None:
    """Lists of one length over the ticks, and each kind's items; units of their own, since none is a latency."""
    for what, values in (("tick_s", watch.tick_s), ("tokens", watch.tokens), ("requests", watch.requests)):
        sheet.measured(f"engine/ticks/{what}", what, values, "neither", shown=False)
    for (stage, kind), values in watch.items_s.items():
        labels: Labels = {"kind": kind, "stage": stage}
        labels["tokens"] = 2 * watch.engine.prepare(request_of(kind, steps, 0)).num_tokens  # of both branches
        if values:
            sheet.measured(f"engine/items/{stage}/{kind}", "item_s", values, "neither", labels=labels, shown=False)
