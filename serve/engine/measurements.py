"""Measurements of an engine replica: facts sent with its heartbeat, and busy time and steps as counters."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

from ...runtime.core.events import Progress
from ...runtime.core.request import Video
from ...runtime.engine.meter import Meter
from ..core.metric_definitions import BUSY_SECONDS, SICK_ENGINES, STEP_SECONDS
from ..store.counters import Counters, Tally
from ..store.database import Database

STAGES = ("encode", "denoise", "decode")


class Measures:
    """The measurements of one replica."""

    def __init__(self, meter: Meter, model: str) -> None:
        self.meter, self.model = meter, model
        self._told_s = meter.busy_s  # of the busy time; a warm-up is nobody's
        self._told_steps = meter.num_steps
        self._untold = Tally()
        self._speeds: deque[float] = deque(maxlen=32)  # tokens x steps a second of the last jobs
        self.facts: dict[str, Any] = {"jobs": 0}

    def previewed(self, seconds: float) -> None:
        self.facts["first_preview_s"] = round(seconds, 4)

    def made(self, video: Video, last: Progress | None, tokens: float) -> None:
        """Note that a clip was made; tokens: of all its steps and branches."""
        if last is None:
            return
        self._speeds.append(tokens / max(1e-6, sum(video.metadata.timings_s.get(stage, 0.0) for stage in STAGES)))
        self.facts |= {"step_s": round(last.step_s, 5), "tokens_per_s": round(median(self._speeds), 1)}

    def ended(self, outcome: str) -> None:
        """Note that a job ended. outcome: completed, failed, lost, drained, stalled or stopped."""
        self.facts["jobs"] += 1
        self.facts[outcome] = self.facts.get(outcome, 0) + 1
        self.facts["at"] = round(time.time(), 3)

    def sick(self) -> None:
        """Count that the engine drains because of its GPU."""
        self._untold.add(SICK_ENGINES, self.model)

    def tell(self, database: Database, counters: Counters) -> None:
        """Add busy time and steps since the last call to the store; the next call adds what could not be written."""
        busy_s = self.meter.busy_s
        self._untold.add(BUSY_SECONDS, self.model, by=busy_s - self._told_s)
        self._told_s = busy_s
        step_times = self.meter.step_times(self._told_steps)
        self._told_steps += len(step_times)
        for seconds in step_times:
            self._untold.observe(STEP_SECONDS, self.model, seconds=seconds)
        if self._untold:
            with database.write() as connection:
                counters.add(connection, self._untold)
            self._untold = Tally()
        self.facts["busy_s"] = round(busy_s, 3)
