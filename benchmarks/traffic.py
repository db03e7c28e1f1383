"""Mixed traffic: step-level continuous batching against one request at a time and static batches of one shape.

A seeded Poisson trace, 80 % small requests and 20 % with 8 times the tokens, at a share of what one request at a time
can serve; the same trace for all three, in one run. Then requests of one shape that arrive together, which static
batches are made for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.engine import Engine
from ..runtime.events import Failed, Finished
from ..runtime.request import VideoRequest
from .machine import describe

SHAPES = {"small": (64, 64, 9), "large": (128, 96, 29)}  # 48 and 384 tokens a branch of the demo model
Admit = Callable[["Driver"], None]


@dataclass(frozen=True)
class Arrival:
    at_s: float
    kind: str
    request: VideoRequest

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.request.size


class Driver:
    """Plays a trace in real time; `admit` says who of the waiting goes into the engine before a step."""

    def __init__(self, engine: Engine, trace: list[Arrival], admit: Admit) -> None:
        self.engine, self.trace, self.admit = engine, trace, admit
        self.waiting: list[Arrival] = []
        self.running: dict[int, Arrival] = {}

    def submit(self, arrival: Arrival) -> None:
        self.waiting.remove(arrival)
        self.running[self.engine.submit(arrival.request)] = arrival

    def play(self) -> tuple[list[tuple[str, float]], float]:
        """((kind, latency in s) of every request, seconds until the last was done)."""
        latencies, coming = [], list(self.trace)
        began = time.perf_counter()
        while coming or self.waiting or self.running:
            now = time.perf_counter() - began
            while coming and coming[0].at_s <= now:
                self.waiting.append(coming.pop(0))
            self.admit(self)
            if not self.running:
                time.sleep(max(0.0, coming[0].at_s - now))
                continue
            for event in self.engine.step():
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    arrival = self.running.pop(event.ticket)
                    latencies.append((arrival.kind, time.perf_counter() - began - arrival.at_s))
        return latencies, time.perf_counter() - began


def continuous(driver: Driver) -> None:
    """Everyone at once; the engine's scheduler does the rest."""
    for arrival in list(driver.waiting):
        driver.submit(arrival)


def one_at_a_time(driver: Driver) -> None:
    """The oldest, when nobody is there."""
    if driver.waiting and not driver.running:
        driver.submit(driver.waiting[0])


def static_batches(driver: Driver) -> None:
    """When nobody is there: the oldest, and whoever of its shape waits, up to the engine's own budget of tokens."""
    if not driver.waiting or driver.running:
        return
    oldest = driver.waiting[0]
    tokens = 2 * driver.engine.prepare(oldest.request).num_tokens
    fits = max(1, driver.engine.max_batch_tokens // tokens)
    for arrival in [a for a in driver.waiting if a.shape == oldest.shape][:fits]:
        driver.submit(arrival)


MODES: dict[str, Admit] = {
    "continuous": continuous,
    "one_at_a_time": one_at_a_time,
    "static_batches": static_batches,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--load", type=float, default=0.8, help="of the capacity of one request at a time")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lockstep", type=int, default=8, help="requests of one shape that arrive together")
    parser.add_argument("--rounds", type=int, default=5, help="of the lockstep comparison")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    machine = describe()
    service_s = {kind: solo_seconds(engine, kind, args.steps) for kind in SHAPES}
    trace = draw_trace(engine, args.requests, args.load, args.steps, service_s, args.seed)
    played = {name: Driver(engine, trace, admit).play() for name, admit in MODES.items()}
    result = {
        "benchmark": "traffic",
        "machine": machine,
        "model": args.model,
        "requests": args.requests,
        "load": args.load,
        "steps": args.steps,
        "seed": args.seed,
        "scheduler": engine.settings.scheduler,
        "max_batch_tokens": engine.max_batch_tokens,
        "solo_s": {kind: round(seconds, 4) for kind, seconds in service_s.items()},
        "modes": {name: summarise(latencies, span) for name, (latencies, span) in played.items()},
        "lockstep": lockstep(engine, args.lockstep, args.steps, args.rounds),
    }
    print_table(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def draw_trace(
    engine: Engine, count: int, load: float, steps: int, service_s: dict[str, float], seed: int
) -> list[Arrival]:
    rng = random.Random(seed)
    kinds = ["large"] * round(0.2 * count) + ["small"] * (count - round(0.2 * count))
    rng.shuffle(kinds)
    rate = load / statistics.mean(service_s[kind] for kind in kinds)
    at_s, trace = 0.0, []
    for index, kind in enumerate(kinds):
        trace.append(Arrival(at_s, kind, request_of(engine, kind, steps, index)))
        at_s += rng.expovariate(rate)
    return trace


def request_of(engine: Engine, kind: str, steps: int, seed: int) -> VideoRequest:
    width, height, num_frames = SHAPES[kind]
    return VideoRequest(
        prompt=f"a red circle moving {('left', 'right', 'up', 'down')[seed % 4]}",
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=steps,
        seed=seed,
    )


def solo_seconds(engine: Engine, kind: str, steps: int, repeats: int = 5) -> float:
    """Median seconds of a request that has the engine to itself."""
    times = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        engine.generate(request_of(engine, kind, steps, repeat))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def lockstep(engine: Engine, count: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds for requests of one shape that arrive together, in turns; the ratio round by round."""
    seconds: dict[str, list[float]] = {"continuous": [], "static_batches": []}
    for turn in range(rounds):
        trace = [Arrival(0.0, "small", request_of(engine, "small", steps, 100 * turn + k)) for k in range(count)]
        for name in sorted(seconds, reverse=bool(turn % 2)):
            seconds[name].append(Driver(engine, trace, MODES[name]).play()[1])
    ratios = [a / b for a, b in zip(seconds["continuous"], seconds["static_batches"], strict=True)]
    return {
        "requests": count,
        "continuous_over_static": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def summarise(latencies: list[tuple[str, float]], span_s: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"requests_per_s": round(len(latencies) / span_s, 4), "span_s": round(span_s, 2)}
    for kind in (*SHAPES, "all"):
        values = [seconds for k, seconds in latencies if kind in (k, "all")]
        p50, p95 = np.percentile(values, (50, 95))
        summary[kind] = {"p50_s": round(float(p50), 3), "p95_s": round(float(p95), 3)}
    return summary


def print_table(result: dict[str, Any]) -> None:
    print(f"{'':<16}{'requests/s':>11}{'small p50':>11}{'p95':>8}{'large p50':>11}{'p95':>8}{'all p95':>9}")
    for name, mode in result["modes"].items():
        small, large = mode["small"], mode["large"]
        print(
            f"{name:<16}{mode['requests_per_s']:>11.3f}{small['p50_s']:>11.2f}{small['p95_s']:>8.2f}"
            f"{large['p50_s']:>11.2f}{large['p95_s']:>8.2f}{mode['all']['p95_s']:>9.2f}"
        )
    print(f"lockstep, continuous over static: {result['lockstep']}")


if __name__ == "__main__":
    main()
