"""What an engine replica counts and times: for each node's exporter by way of Ray, and for all ingresses by way of the
store, where each replica leaves its newest facts."""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from ..runtime.events import Progress
from ..runtime.request import Video

SECONDS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
STAGES = ("encode", "denoise", "decode")


class Measures:
    """One replica's. Names as Prometheus shows them, with `ray_` in front."""

    def __init__(self) -> None:
        self._outcomes = Counter("skylapse_jobs", "Jobs by how they ended here", ("outcome",))
        self._steps = Counter("skylapse_denoising_steps", "Denoising steps, computed and answered by a cache", ("how",))
        self._stage_s = Histogram("skylapse_stage_seconds", "Seconds of a job's stage", SECONDS, ("stage",))
        self._first_s = Histogram("skylapse_first_preview_seconds", "Seconds to a job's first preview", SECONDS)
        self._step_s = Gauge("skylapse_step_seconds", "Seconds a denoising step of the job that ended last")
        self._lost_steps = Counter("skylapse_lost_steps", "Steps that a resumed job's dead engine had taken in vain")
        self._speeds: deque[float] = deque(maxlen=32)  # tokens x steps a second of the last jobs
        self.facts: dict[str, Any] = {"jobs": 0, "steps": 0, "steps_skipped": 0, "lost_steps": 0}

    def resumed(self, lost_steps: int) -> None:
        """A job goes on from its checkpoint; its client had been told of so many steps more."""
        self._lost_steps.inc(lost_steps) if lost_steps else None
        self.facts["lost_steps"] += lost_steps

    def previewed(self, seconds: float) -> None:
        self._first_s.observe(seconds)
        self.facts["first_preview_s"] = round(seconds, 4)

    def made(self, video: Video, last: Progress | None, tokens: float) -> None:
        """A clip came out of the engine; tokens: of all its steps and branches."""
        for stage in STAGES:
            if (seconds := video.metadata.timings_s.get(stage)) is not None:
                self._stage_s.observe(seconds, {"stage": stage})
        if last is None:
            return
        self._steps.inc(last.num_steps - last.num_skipped, {"how": "computed"})
        if last.num_skipped:
            self._steps.inc(last.num_skipped, {"how": "skipped"})
        self._step_s.set(last.step_s)
        self._speeds.append(tokens / max(1e-6, sum(video.metadata.timings_s.get(stage, 0.0) for stage in STAGES)))
        self.facts |= {
            "steps": self.facts["steps"] + last.num_steps,
            "steps_skipped": self.facts["steps_skipped"] + last.num_skipped,
            "step_s": round(last.step_s, 5),
            "tokens_per_s": round(median(self._speeds), 1),
        }

    def ended(self, outcome: str, stage_s: float | None = None) -> None:
        """outcome: completed, failed, lost, drained; stage_s: what finishing and storing took."""
        self._outcomes.inc(1, {"outcome": outcome})
        if stage_s is not None:
            self._stage_s.observe(stage_s, {"stage": "finish"})
        self.facts["jobs"] += 1
        self.facts[outcome] = self.facts.get(outcome, 0) + 1
        self.facts["at"] = round(time.time(), 3)
