"""Simulated latencies beside measured ones: fitted to one trace of `bench engine`, held against all others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...runtime.engine.scheduler import SchedulerConfig
from ..record import Curve, Measurement, SuiteReport, read
from ..sheet import Labels, Sheet
from ..suites.traffic import SHAPES, Arrival, draw_trace
from .cost import Fit, Shape, StepCost, Ticks, fit, trimmed_mean
from .model import simulate
from .service import Service

GOAL = 0.2  # the median error of p95, issue 7
SLOTS = {"continuous": None, "one-at-a-time": 1}  # ways of `bench engine` that are a number of slots
CHECKED = "continuous"  # what the service does, and what the goal is about
PERCENTILES = (50, 95)


@dataclass(frozen=True)
class Measured:
    """A result of `bench engine`. latencies_s: (seed, way) -> kind -> seconds, in the order of the trace."""

    name: str
    report: SuiteReport
    traces: Mapping[int, Sequence[Arrival]]
    latencies_s: Mapping[tuple[int, str], Mapping[str, Sequence[float]]]
    scheduler: SchedulerConfig

    @property
    def load(self) -> float:
        return float(self.report.settings["load"])

    def samples(self, name: str) -> Measurement:
        for one in self.report.measurements:
            if one.name == name:
                return one
        raise ValueError(f"{self.name} must have {name}: it is of an older `bench engine`, or of one that did not end")


def read_measured(path: Path) -> Measured:
    """Arrivals are drawn again from the seed and the measured solo times. ValueError names the file."""
    report = read(path, SuiteReport)
    if report.benchmark != "engine":
        raise ValueError(f"{path.name} must be a result of `bench engine`, got one of {report.benchmark!r}")
    if report.partial is not None:
        raise ValueError(f"{path.name} must be a whole run, and is partial: {report.partial}")
    asked, named = report.settings, {one.name: one for one in report.measurements}
    try:
        scheduler = SchedulerConfig(policy=asked["scheduler"], max_batch_tokens=asked["max_batch_tokens"])
        solo = {name.rpartition("/")[2]: m.samples for name, m in named.items() if name.startswith("engine/solo/")}
        if missing := set(SHAPES) - set(solo):
            raise KeyError(f"engine/solo/{min(missing)}")
        service_s = {kind: statistics.median(values) for kind, values in solo.items()}
        traces, latencies = {}, {}
        for seed in range(report.seed, report.seed + int(asked["seeds"])):
            traces[seed] = draw_trace(asked["requests"], asked["load"], asked["steps"], service_s, seed)
            for way in SLOTS:
                stem = f"engine/poisson/seed-{seed}/{way}"
                latencies[seed, way] = {kind: named[f"{stem}/{kind}"].samples for kind in solo}
    except KeyError as error:
        raise ValueError(f"{path.name} must have {error.args[0]}, which `bench engine` writes") from None
    return Measured(path.stem, report, traces, latencies, scheduler)


def fit_to(measured: Measured) -> tuple[Fit, dict[str, Shape]]:
    """Step times and shapes from the ticks of the first trace."""
    lists = [measured.samples(f"engine/ticks/{what}").samples for what in ("tick_s", "tokens", "requests")]
    first = measured.traces[measured.report.seed]
    shapes = {}
    for kind in sorted({arrival.kind for arrival in first}):
        count = sum(arrival.kind == kind for arrival in first)
        request = next(arrival.request for arrival in first if arrival.kind == kind)
        items = {stage: measured.samples(f"engine/items/{stage}/{kind}") for stage in ("encode", "decode")}
        shapes[kind] = Shape(
            name=kind,
            tokens=int(items["decode"].labels["tokens"]),
            num_steps=int(measured.report.settings["steps"]),
            encode_s=_each(items["encode"].samples, count),
            decode_s=_each(items["decode"].samples, count),
            video_s=(request.num_frames or 0) / (request.fps or 8),
        )
    return fit(Ticks(*lists)), shapes


def predict(
    measured: Measured, seed: int, way: str, cost: StepCost, shapes: Mapping[str, Shape]
) -> dict[str, list[float]]:
    """Kind -> latencies of the same arrivals."""
    service = Service(slots=SLOTS[way], dispatchers=None, scheduler=measured.scheduler)
    ran = simulate(service, cost, [(arrival.at_s, shapes[arrival.kind]) for arrival in measured.traces[seed]], seed)
    found: dict[str, list[float]] = {kind: [] for kind in shapes}
    for outcome in ran.outcomes:
        assert outcome.latency_s is not None
        found[outcome.kind].append(outcome.latency_s)
    return found


def read_all(files: Sequence[Path]) -> list[Measured]:
    """For `check`: ValueError where there would be nothing to check the fit against, or two files of one name."""
    every = [read_measured(path) for path in files]
    names = [measured.name for measured in every]
    if len(set(names)) < len(names):
        raise ValueError(f"files must have different names, got {', '.join(names)}")
    if sum(len(measured.traces) for measured in every) < 2:
        raise ValueError(f"{names[0]} has one trace: nothing is left to check the fit to it against")
    return every


def check(sheet: Sheet, every: Sequence[Measured], goal: float = GOAL) -> None:
    """The first file's first trace is fitted to; each other trace, of any file, is predicted and compared."""
    fitted = every[0]
    model, shapes = fit_to(fitted)
    _write_fit(sheet, model, shapes, fitted.name)
    errors: dict[tuple[str, int], list[float]] = {(way, p): [] for way in SLOTS for p in PERCENTILES}
    for number, measured in enumerate(every):
        stem = measured.name if len(every) > 1 else f"load-{measured.load:g}"
        for seed in measured.traces:
            held_out = (number, seed) != (0, fitted.report.seed)
            for way in SLOTS:
                sheet.check_time(f"simulate/check/{stem}/seed-{seed}/{way}")
                steps = int(measured.report.settings["steps"])
                predicted = predict(measured, seed, way, model.cost, _with_steps(shapes, steps))
                labels: Labels = {"load": measured.load, "seed": seed, "way": way, "held_out": int(held_out)}
                ratios = _compare(sheet, f"simulate/check/{stem}/seed-{seed}/{way}", measured, predicted, labels)
                if held_out:
                    for percentile, ratio in ratios.items():
                        errors[way, percentile].append(abs(ratio - 1))
    for (way, percentile), values in errors.items():
        found: Labels = {"way": way, "percentile": percentile, "goal": goal}
        sheet.measured(f"simulate/check/{way}/p{percentile}-error", "of measured", values, labels=found)
    reached = statistics.median(errors[CHECKED, 95])
    if reached > goal:
        sheet.failed("simulate/check", f"the median error of p95 is {reached:.3f}, and must be {goal:g} at most")


def _compare(
    sheet: Sheet, name: str, measured: Measured, predicted: Mapping[str, Sequence[float]], labels: Labels
) -> dict[int, float]:
    """Figures of each kind and of all, and both distributions; the ratios of all are returned."""
    seed, way = int(labels["seed"]), str(labels["way"])
    real = measured.latencies_s[seed, way]
    if {kind: len(values) for kind, values in real.items()} != {kind: len(v) for kind, v in predicted.items()}:
        raise ValueError(f"{measured.name} must have one latency for each request of seed {seed}'s trace")
    ratios = {}
    for kind in (*real, "all"):
        both = {
            "predicted": [s for k, values in predicted.items() for s in values if kind in (k, "all")],
            "measured": [s for k, values in real.items() for s in values if kind in (k, "all")],
        }
        for percentile in PERCENTILES:
            at = {what: float(np.percentile(values, percentile)) for what, values in both.items()}
            for what, value in at.items():
                sheet.measured(f"{name}/{kind}/p{percentile}/{what}", "s", [value], labels=labels, shown=False)
            ratio = at["predicted"] / at["measured"]
            told = kind == "all" and percentile == 95
            sheet.compared(f"{name}/{kind}/p{percentile}", "predicted", "measured", [ratio], labels, shown=told)
            if kind == "all":
                ratios[percentile] = ratio
        if kind == "all":
            for what, values in both.items():
                points = [(value, (rank + 1) / len(values)) for rank, value in enumerate(sorted(values))]
                curve = Curve(name=f"{name}/{what}", x="latency, s", y="share of requests", points=points)
                sheet.drawn(replace(curve, labels={"kind": "cdf", **labels}))
    return ratios


def _write_fit(sheet: Sheet, model: Fit, shapes: Mapping[str, Shape], source: str) -> None:
    for what in ("fixed_s", "request_s", "token_s", "idle_s"):
        label: Labels = {"fitted": source}
        sheet.measured(f"simulate/fit/{what}", "s", [getattr(model.cost, what)], "neither", label)
    sheet.measured("simulate/fit/error", "of a step", [model.error], labels={"fitted": source})
    for kind, shape in shapes.items():
        label = {"fitted": source, "tokens": shape.tokens, "encode_s": sum(shape.encode_s)}
        sheet.measured(f"simulate/fit/{kind}/alone", "s", [shape.alone_s(model.cost)], "neither", label)


def _with_steps(shapes: Mapping[str, Shape], steps: int) -> dict[str, Shape]:
    return {kind: replace(shape, num_steps=steps) for kind, shape in shapes.items()}


def _each(samples: Sequence[float], requests: int) -> tuple[float, ...]:
    """The mean of each item of a request, of which all requests of a kind have as many."""
    count = max(1, round(len(samples) / requests))
    return tuple(trimmed_mean(samples[item::count]) for item in range(count))
