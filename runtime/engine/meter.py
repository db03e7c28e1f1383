"""Measure an engine's working time, and split it between the requests that share a step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.usage import Account, Usage


class Clock(Protocol):
    """A device's clock: moments are marked now, and the seconds between two of them may be known later."""

    def mark(self) -> Any: ...

    def seconds(self, begin: Any, end: Any, wait: bool) -> float | None:
        """Return the seconds between two marks; None if the device has not come so far, unless `wait` is asked for."""


class HostClock:
    """A CPU's clock: its work is done when the call returns."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.mark = now

    def seconds(self, begin: float, end: float, wait: bool) -> float:
        return end - begin


class CudaClock:
    """A GPU's clock: events in its stream, since the host runs ahead and would charge whoever it waits for."""

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
    """Work between two marks, and its owners' shares, which add up to 1."""

    begin: Any
    end: Any
    shares: tuple[tuple[Account, float], ...]
    is_step: bool


class Meter:
    """Cuts the time of a tick into pieces, each of which is charged to the requests that shared it.

    All requests together are charged with the engine's working time, whatever joins, leaves, fails or is skipped.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or (CudaClock() if device.type == "cuda" else HostClock())
        self.busy_s = 0.0  # since the start
        self._lock = threading.Lock()
        self._since: Any = None
        self._pieces: deque[_Piece] = deque()  # that the device has not told yet
        self.num_steps = 0  # denoising steps since the start
        self._step_times: deque[float] = deque(maxlen=100_000)  # seconds of the last ones

    def begin(self) -> None:
        """Begin a tick; the time before it is charged to nobody."""
        self._since = self.clock.mark()

    def charge(self, owners: Sequence[tuple[Account, float]], is_step: bool = False) -> None:
        """Charge the work since the last mark to these requests, by weight; equally where no weight is above 0.

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
        """Add the times that the device has told meanwhile; `wait`: all that were charged so far. From any thread."""
        with self._lock:
            while self._pieces:
                piece = self._pieces[0]
                seconds = self.clock.seconds(piece.begin, piece.end, wait)
                if seconds is None:
                    return
                self._pieces.popleft()
                self.busy_s += seconds
                if piece.is_step:
                    self._step_times.append(seconds)
                    self.num_steps += 1
                for account, share in piece.shares:
                    account.add(Usage(share * seconds))
                    account.awaits(-1)

    def add_beside(self, account: Account, seconds: float) -> None:
        """Add work for one request that no tick has done, from any thread."""
        account.add(Usage(seconds))
        with self._lock:
            self.busy_s += seconds

    def step_times(self, since: int) -> list[float]:
        """Return the seconds of each denoising step after the first `since` ones, as far as they are kept."""
        with self._lock:
            num_new = min(self.num_steps - since, len(self._step_times))
            return list(self._step_times)[len(self._step_times) - num_new :]
