"""A trace of mixed requests played in real time through one engine, by each way of batching them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...runtime.core.events import Failed, Finished
from ...runtime.core.request import VideoRequest
from ...runtime.engine.engine import Engine
from .clips import Size, clip_request

SHAPES: dict[str, Size] = {"small": (64, 64, 9), "large": (128, 96, 29)}  # 48 and 384 tokens a branch of the demo model
LARGE_SHARE = 0.2  # of the requests
Admit = Callable[["Driver"], None]


@dataclass(frozen=True)
class Arrival:
    at_s: float
    kind: str
    request: VideoRequest


@dataclass(frozen=True)
class Played:
    """latencies_s: of each request, in the order of the trace; span_s: until the last was done."""

    trace: Sequence[Arrival]
    latencies_s: list[float]
    span_s: float

    def of(self, kind: str) -> list[float]:
        """Latencies of one kind, or of "all"."""
        pairs = zip(self.trace, self.latencies_s, strict=True)
        return [seconds for arrival, seconds in pairs if kind in (arrival.kind, "all")]


class Driver:
    """`admit` says who of the waiting goes into the engine before a step."""

    def __init__(
        self,
        engine: Engine,
        trace: Sequence[Arrival],
        admit: Admit,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.engine, self.trace, self.admit, self._now, self._sleep = engine, list(trace), admit, now, sleep
        self.waiting: list[int] = []  # places in the trace
        self.running: dict[int, int] = {}  # tickets -> places

    def submit(self, place: int) -> None:
        self.waiting.remove(place)
        self.running[self.engine.submit(self.trace[place].request)] = place

    def play(self) -> Played:
        """A request's latency begins when it is due, not when somebody gets round to it."""
        latencies, coming = [0.0] * len(self.trace), list(range(len(self.trace)))
        began = self._now()
        while coming or self.waiting or self.running:
            now = self._now() - began
            while coming and self.trace[coming[0]].at_s <= now:
                self.waiting.append(coming.pop(0))
            self.admit(self)
            if not self.running:
                self._sleep(max(0.0, self.trace[coming[0]].at_s - now))
                continue
            for event in self.engine.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    place = self.running.pop(event.ticket)
                    latencies[place] = self._now() - began - self.trace[place].at_s
        return Played(self.trace, latencies, self._now() - began)


def continuous(driver: Driver) -> None:
    """Everyone at once; the engine's scheduler does the rest."""
    for place in list(driver.waiting):
        driver.submit(place)


def one_at_a_time(driver: Driver) -> None:
    """The oldest, when nobody is there."""
    if driver.waiting and not driver.running:
        driver.submit(driver.waiting[0])


def static_batches(driver: Driver) -> None:
    """When nobody is there: the oldest, and whoever of its shape waits, up to the engine's own budget of tokens."""
    if not driver.waiting or driver.running:
        return
    oldest = driver.trace[driver.waiting[0]].request
    tokens = 2 * driver.engine.prepare(oldest).num_tokens
    fits = max(1, driver.engine.max_batch_tokens // tokens)
    for place in [p for p in driver.waiting if driver.trace[p].request.size == oldest.size][:fits]:
        driver.submit(place)


MODES: dict[str, Admit] = {
    "continuous": continuous,
    "one-at-a-time": one_at_a_time,
    "static-batches": static_batches,
}


def draw_trace(count: int, load: float, steps: int, service_s: dict[str, float], seed: int) -> list[Arrival]:
    """Poisson arrivals at `load` of what one request at a time can serve; LARGE_SHARE of them are large."""
    rng = random.Random(seed)
    num_large = round(LARGE_SHARE * count)
    kinds = ["large"] * num_large + ["small"] * (count - num_large)
    rng.shuffle(kinds)
    rate = load / statistics.mean(service_s[kind] for kind in kinds)
    at_s, trace = 0.0, []
    for index, kind in enumerate(kinds):
        trace.append(Arrival(at_s, kind, request_of(kind, steps, index)))
        at_s += rng.expovariate(rate)
    return trace


def request_of(kind: str, steps: int, seed: int) -> VideoRequest:
    return clip_request(SHAPES[kind], steps, seed)


def solo_seconds(engine: Engine, kind: str, steps: int, repeats: int) -> list[float]:
    """Of requests that have the engine to themselves, after one that warms up."""
    times = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        engine.generate(request_of(kind, steps, repeat))
        times.append(time.perf_counter() - began)
    return times[1:]
