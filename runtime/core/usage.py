"""Count what a request has used of its engine: its share of the seconds, model evaluations and steps."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Usage:
    """Work of an engine for one request; sums and differences are taken field by field.

    engine_seconds: this request's share of the time in which its engine worked.

    evaluations: of the model, one a guidance branch. steps_skipped: steps that a cache answered.
    """

    engine_seconds: float = 0.0
    evaluations: int = 0
    steps_computed: int = 0
    steps_skipped: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Usage)))

    @property
    def num_steps(self) -> int:
        return self.steps_computed + self.steps_skipped


class Account:
    """Sums up what one request has used in this engine; `usage` may be read from any thread, and is whole at any time.

    is_open: the engine may still add to it. A request that was aborted has its share of the step that was running.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self._lock = threading.Lock()
        self._is_in = False  # the engine has it
        self._unread = 0  # pieces of work whose time the device has not told yet

    @property
    def is_open(self) -> bool:
        return self._is_in or self._unread > 0

    def enter(self) -> None:
        self._is_in = True

    def leave(self) -> None:
        self._is_in = False

    def add(self, used: Usage) -> None:
        with self._lock:
            self.usage += used

    def stepped(self, num_evaluations: int) -> None:
        """Count one more denoising step; without an evaluation it was a cache's."""
        computed = num_evaluations > 0
        self.add(Usage(0.0, num_evaluations, int(computed), int(not computed)))

    def awaits(self, pieces: int) -> None:
        with self._lock:
            self._unread += pieces
