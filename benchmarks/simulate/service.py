"""What a simulated service is set to, and what a run of it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...runtime.engine.scheduler import SchedulerConfig
from ..load.client import Outcome
from .replica import Job

# serve/deployment/dispatcher.py's and serve/deployment/replica.py's, which import Ray; a test holds them together
LOOK_S, MAX_CALLS, UNCHECKED_S = 0.1, 256, 5.0
POLL_S = 1.0  # between two looks of the autoscaler at the backlog


@dataclass(frozen=True, kw_only=True)
class Autoscaler:
    """`serve.autoscaling.BacklogPolicy` within Serve's bounds and delays; defaults are deploy/serve.yaml's."""

    clear_in_s: float = 120.0
    min_replicas: int = 1
    max_replicas: int = 8
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"replicas must scale from 0 or more to 1 or more, got {self.min_replicas} to {self.max_replicas}"
            )


@dataclass(frozen=True, kw_only=True)
class Service:
    """slots: of an engine, None: any number. dispatchers: None hands jobs to engines at once, as `bench engine` does.

    mtbf_s: mean time between deaths of one replica, exponential. detect_s: until its jobs are queued again; load_s:
    until a new replica works, after a death or when one is added.
    """

    replicas: int = 1
    slots: int | None = 8
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dispatchers: int | None = 1
    checkpoint_every: int = 5
    max_attempts: int = 3
    drain_s: float = 60.0
    mtbf_s: float = math.inf
    detect_s: float = 1.0
    load_s: float = 60.0
    autoscaler: Autoscaler | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "dispatchers", "replicas", "checkpoint_every", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.mtbf_s > 0:
            raise ValueError(f"mtbf_s must be above 0 seconds, got {self.mtbf_s}")


@dataclass(frozen=True)
class Ran:
    """replica_s: of all replicas, from when they were asked for; busy_s: of their ticks. span_s: to the last end."""

    jobs: Sequence[Job]
    span_s: float
    replica_s: float
    busy_s: float
    num_ticks: int
    num_deaths: int
    most_replicas: int

    @property
    def outcomes(self) -> list[Outcome]:
        return [Outcome(j.index, j.shape.name, j.due_s, j.shape.video_s, done_s=j.done_s, end=j.end) for j in self.jobs]
