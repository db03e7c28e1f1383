"""`bench engine`: continuous batching of steps against one request at a time and static batches of one shape; overhead.

Seeded Poisson traces, 80 % small requests and 20 % with 8 times the tokens, at a share of what one request at a time
can serve; each trace is played by all three ways in turns. Then requests of one shape that arrive together, which
static batches are made for, and what a tick costs beside the model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np

from ...runtime.engine.engine import Engine
from ..harness import ratios
from ..record import Curve
from ..sheet import Labels, Sheet, suite_parser
from .overhead import measure_preview, measure_ticks
from .steps import StepWatch, write_steps
from .traffic import MODES, SHAPES, Arrival, Driver, Played, draw_trace, request_of, solo_seconds

OURS = "continuous"
PERCENTILES = (50, 95, 99)
CACHES = ("none", "easy:0.05")
COUNTS = (1, 2, 4)  # requests whose ticks are looked at


def engine(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    quick = options.quick
    for name, quickly, whole in (("requests", 12, 60), ("steps", 8, 20), ("seeds", 2, 3), ("rounds", 3, 6)):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name} must be 1 or more, got {given}")
        setattr(options, name, given or (quickly if quick else whole))
    if not 0 < options.load <= 10:
        raise ValueError(f"--load must be above 0 and 10 at most, got {options.load:g}")
    suite = Traffic(options)
    with suite.sheet.running(cases=1 + options.seeds * len(MODES) + 1 + len(CACHES) * len(COUNTS) + 1):
        suite.solo()
        suite.poisson()
        suite.lockstep()
        suite.overhead()
    return suite.sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("engine", "Mixed traffic through one engine, by way of batching; what a tick costs.")
    option = parser.add_argument
    option("--requests", type=int, metavar="N", help="of a trace; default: 60, quick 12")
    option("--seeds", type=int, metavar="N", help="traces, from --seed on; default: 3, quick 2")
    option("--load", type=float, default=0.8, metavar="X", help="of what one request at a time can serve; default: 0.8")
    option("--steps", type=int, metavar="N", help="of a request; default: 20, quick 8")
    option("--lockstep", type=int, default=8, metavar="N", help="requests that arrive together; default: 8")
    option("--rounds", type=int, metavar="N", help="of the lockstep comparison; default: 6, quick 3")
    return parser


class Traffic:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = Engine.from_pretrained(options.model)
        asked = {name: getattr(options, name) for name in ("requests", "seeds", "load", "steps", "lockstep", "rounds")}
        scheduler = {
            "scheduler": self.engine.settings.scheduler,
            "max_batch_tokens": self.engine.max_batch_tokens,
        }
        self.sheet = Sheet("engine", options, asked | scheduler)
        self.service_s: dict[str, float] = {}

    def solo(self) -> None:
        """What a request takes that is alone, from which the offered load follows."""
        self.sheet.check_time("engine/solo")
        for kind in SHAPES:
            times = solo_seconds(self.engine, kind, self.options.steps, repeats=3 if self.options.quick else 6)
            self.sheet.measured(f"engine/solo/{kind}", "s", times, labels=self._shape(kind))
            self.service_s[kind] = statistics.median(times)

    def poisson(self) -> None:
        """Each seed's trace by every way; the order turns round from seed to seed."""
        played: dict[str, list[Played]] = {mode: [] for mode in MODES}
        for turn in range(self.options.seeds):
            seed = self.options.seed + turn
            trace = draw_trace(self.options.requests, self.options.load, self.options.steps, self.service_s, seed)
            for mode in reversed(MODES) if turn % 2 else MODES:
                name = f"engine/poisson/seed-{seed}/{mode}"
                self.sheet.check_time(name)
                watch = StepWatch(self.engine) if (turn, mode) == (0, OURS) else None
                with watch or nullcontext():
                    found = Driver(self.engine, trace, MODES[mode]).play()
                if watch:
                    write_steps(self.sheet, watch, self.options.steps)
                played[mode].append(found)
                for kind in SHAPES:
                    self.sheet.measured(f"{name}/{kind}", "s", found.of(kind), labels=self._shape(kind), shown=False)
        self._percentiles(played)
        for mode, runs in played.items():
            self.sheet.drawn(_cdf(f"engine/poisson/{mode}", [s for run in runs for s in run.of("all")]))

    def _percentiles(self, played: dict[str, list[Played]]) -> None:
        """A value a seed, and the other ways' over ours seed by seed."""
        rates = {mode: [len(run.trace) / run.span_s for run in runs] for mode, runs in played.items()}
        for mode, values in rates.items():
            self.sheet.measured(f"engine/poisson/{mode}/throughput", "requests/s", values, "higher")
        for kind in (*SHAPES, "all"):
            for percentile in PERCENTILES:
                at = {m: [float(np.percentile(run.of(kind), percentile)) for run in runs] for m, runs in played.items()}
                for mode, values in at.items():
                    labels: Labels = {"percentile": percentile, "kind": kind, "mode": mode}
                    name = f"engine/poisson/{mode}/{kind}/p{percentile}"
                    self.sheet.measured(name, "s", values, labels=labels, shown=percentile != 99)
                    if mode != OURS and percentile == 95:
                        self.sheet.compared(name, mode, OURS, ratios(values, at[OURS]), labels)

    def lockstep(self) -> None:
        """Small requests that arrive together: ours over static batches, in turns."""
        name, seconds = "engine/lockstep", {"continuous": list[float](), "static-batches": list[float]()}
        self.sheet.check_time(name)
        for turn in range(self.options.rounds):
            trace = [
                Arrival(0.0, "small", request_of("small", self.options.steps, 100 * turn + k))
                for k in range(self.options.lockstep)
            ]
            for mode in sorted(seconds, reverse=bool(turn % 2)):
                seconds[mode].append(Driver(self.engine, trace, MODES[mode]).play().span_s)
        labels: Labels = {"requests": self.options.lockstep}
        for mode, values in seconds.items():
            self.sheet.measured(f"{name}/{mode}", "s", values, labels=labels)
        over = ratios(seconds[OURS], seconds["static-batches"])
        self.sheet.compared(f"{name}/continuous", OURS, "static-batches", over, labels)

    def overhead(self) -> None:
        """Shares of a tick's time that are not the model's, of every tick that does nothing but denoise."""
        steps = self.options.steps if self.options.quick else None
        for cache in CACHES:
            for count in COUNTS:
                name = f"engine/overhead/{cache.replace(':', '-')}/{count}"
                self.sheet.check_time(name)
                found = measure_ticks(self.engine, count, cache, steps)
                labels: Labels = {"requests": count, "cache": cache, "steps_a_tick": found.steps_a_tick}
                self.sheet.measured(f"{name}/tick", "s", found.seconds, labels=labels, shown=False)
                self.sheet.measured(f"{name}/share", "of a tick", found.shares, labels=labels)
                self.sheet.measured(f"{name}/solver", "of a tick", found.solver_shares, labels=labels, shown=False)
        self.sheet.check_time("engine/overhead/preview")
        previews, ticks = measure_preview(self.engine, 20 if self.options.quick else 50)
        self.sheet.measured("engine/overhead/preview", "s", previews)
        tick_s = statistics.median(ticks)
        self.sheet.measured("engine/overhead/preview/share", "of a tick", [p / tick_s for p in previews])

    def _shape(self, kind: str) -> Labels:
        width, height, num_frames = SHAPES[kind]
        return {"width": width, "height": height, "num_frames": num_frames, "kind": kind}


def _cdf(name: str, values: Sequence[float]) -> Curve:
    """The share of requests that took no longer."""
    ordered = sorted(values)
    points = [(value, (index + 1) / len(ordered)) for index, value in enumerate(ordered)]
    return Curve(name=name, x="latency, s", y="share of requests", points=points, labels={"kind": "cdf"})
