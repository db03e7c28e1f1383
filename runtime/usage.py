"""What requests use of their engine: its seconds, split between those who share a step, and model evaluations."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Usage:
    """engine_seconds: this request's share of the time in which its engine worked.

    evaluations: of the model, each guidance branch one. steps_skipped: steps that a cache answered.
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
    """What one request has used in this engine; `usage` may be read from any thread, and is whole at any time.

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
        """One denoising step more; without an evaluation it was a cache's."""
        computed = num_evaluations > 0
        self.add(Usage(0.0, num_evaluations, int(computed), int(not computed)))

    def awaits(self, pieces: int) -> None:
        with self._lock:
            self._unread += pieces


class Clock(Protocol):
    """A device's time: moments on it are marked now, and the seconds between two may be known later."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any, wait: bool) -> float | None:
        """None where the device has not come so far, and `wait` is not asked for."""


class HostClock:
    """A CPU has done its work when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.mark = now

    def seconds(self, begin: float, end: float, wait: bool) -> float:
        return end - begin


class CudaClock:
    """Events behind the work in its stream: the host runs ahead, and would charge whoever it happens to wait for."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event, wait: bool) -> float | None:
        if not end.query():
            if not wait:
                return None
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


@dataclass(frozen=True, slots=True)
class _Piece:
    """Work between two marks, and whose it is; shares add up to 1."""

    begin: Any
    end: Any
    shares: tuple[tuple[Account, float], ...]
    is_step: bool


class Meter:
    """An engine's busy time: the time of a tick, cut into pieces that each belong to the requests that shared it.

    So what all requests are charged with is what the engine has worked, whatever joins, leaves, fails or is skipped.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or (CudaClock() if device.type == "cuda" else HostClock())
        self.busy_s = 0.0  # since the start
        self._since: Any = None
        self._pieces: deque[_Piece] = deque()  # that the device has not told yet
        self._step_times: deque[float] = deque(maxlen=100_000)  # of steps that nobody has taken notice of

    def begin(self) -> None:
        """A tick begins; what was before it is nobody's."""
        self._since = self.clock.mark()

    def charge(self, owners: Sequence[tuple[Account, float]], is_step: bool = False) -> None:
        """The work since the last mark was these requests', by weight; equally where no weight is above 0.

        is_step: it was a denoising step.
        """
        if not owners:
            return
        total = sum(weight for _, weight in owners)
        shares = tuple((account, weight / total if total else 1 / len(owners)) for account, weight in owners)
        begin, self._since = self._since, self.clock.mark()
        for account, _ in shares:
            account.awaits(1)
        self._pieces.append(_Piece(begin, self._since, shares, is_step))
        self.read()

    def read(self, wait: bool = False) -> None:
        """Add what the device has told meanwhile; `wait`: all that was charged so far."""
        while self._pieces:
            piece = self._pieces[0]
            seconds = self.clock.seconds(piece.begin, piece.end, wait)
            if seconds is None:
                return
            self._pieces.popleft()
            self.busy_s += seconds
            if piece.is_step:
                self._step_times.append(seconds)
            for account, share in piece.shares:
                account.add(Usage(share * seconds))
                account.awaits(-1)

    def step_times(self) -> list[float]:
        """Seconds of each denoising step since the last call; for one caller."""
        return [self._step_times.popleft() for _ in range(len(self._step_times))]
