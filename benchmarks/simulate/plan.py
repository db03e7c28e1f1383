"""What a service of so many replicas would do under a load, and how many replicas would hold one.

Requests due in the first tenth of a trace are not counted: engines begin empty. Every figure has the label `assumed`
or `fitted`, which says where its step times are from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ...runtime.engine.scheduler import SchedulerConfig
from ..load.client import Outcome
from ..load.play import quantile
from ..load.slo import Slo, goodput
from ..load.traces import Arrival, draw
from ..load.workloads import Kind, Workload, our_prompts
from ..record import Curve
from ..sheet import Labels, Sheet
from .assume import Assumptions
from .check import fit_to, read_measured
from .cost import Shape, StepCost
from .model import simulate
from .service import Autoscaler, Ran, Service

WARM_UP = 0.1  # of a trace
MOST_REPLICAS = 100_000
SHARES = (0.5, 0.95)


@dataclass(frozen=True)
class World:
    """What is the same at every size and load. labels: of every figure, where step times are from."""

    cost: StepCost
    shapes: Mapping[str, Shape]
    workload: Workload
    serving: Callable[[int], Service]
    labels: Labels

    @property
    def alone_s(self) -> float:
        """Mean work of a request, in seconds of one engine that takes one at a time."""
        weights = {kind.name: kind.weight for kind in self.workload.kinds}
        total = sum(weights.values())
        return sum(weight * self.shapes[name].alone_s(self.cost) for name, weight in weights.items()) / total


def assumed_world(assumptions: Assumptions) -> World:
    name = f"{assumptions.device.name}, {assumptions.model.name}, by arithmetic: not measured"
    return World(
        assumptions.cost(), assumptions.shapes(), assumptions.workload(), assumptions.serving, {"assumed": name}
    )


def measured_world(path: Path, assumptions: Assumptions) -> World:
    """Step times of a `bench engine`, its two classes and its scheduler; the service around them as it is assumed."""
    measured = read_measured(path)
    fitted, shapes = fit_to(measured)
    trace = measured.traces[measured.report.seed]
    counts = {kind: sum(arrival.kind == kind for arrival in trace) for kind in shapes}
    least = math.gcd(*counts.values())
    kinds = tuple(Kind(kind, count // least, {}, shapes[kind].video_s) for kind, count in counts.items())
    scheduler: SchedulerConfig = measured.scheduler

    def serving(replicas: int) -> Service:
        return replace(assumptions.serving(replicas), scheduler=scheduler)

    return World(fitted.cost, shapes, Workload("fitted", kinds, our_prompts(8)), serving, {"fitted": path.name})


def write_times(sheet: Sheet, world: World) -> None:
    """The step times that all else follows from, each with its label."""
    for name, shape in world.shapes.items():
        times = {
            "step": world.cost.seconds(shape.tokens, 1, shape.pairs),
            "encode": sum(shape.encode_s),
            "decode": sum(shape.decode_s),
            "finish": shape.finish_s,
            "alone": shape.alone_s(world.cost),
        }
        for what, seconds in times.items():
            labels: Labels = {**world.labels, "tokens": shape.tokens, "steps": shape.num_steps}
            sheet.measured(f"simulate/times/{name}/{what}", "s", [seconds], "neither", labels)


@dataclass(frozen=True)
class Case:
    """load: of what the replicas serve one request at a time; 1 is where that queue would grow for ever."""

    replicas: int
    load: float
    process: str
    duration_s: float
    seed: int
    autoscale: bool = False


def rate_of(world: World, case: Case) -> float:
    return case.load * case.replicas / world.alone_s


def play(world: World, case: Case, rate: float | None = None) -> tuple[Ran, list[Outcome]]:
    """The run, and the outcomes that count. rate: requests/s instead of the case's load."""
    per_s = rate_of(world, case) if rate is None else rate
    trace = draw(case.process, per_s, world.workload.ask(case.seed), case.seed, None, case.duration_s)
    service = world.serving(case.replicas)
    if case.autoscale:
        service = replace(service, autoscaler=Autoscaler(min_replicas=1, max_replicas=case.replicas))
    ran = simulate(service, world.cost, _shaped(trace, world.shapes), case.seed)
    first_s = WARM_UP * case.duration_s
    return ran, [one for one in ran.outcomes if one.due_s >= first_s]


def _shaped(trace: Sequence[Arrival], shapes: Mapping[str, Shape]) -> list[tuple[float, Shape]]:
    return [(arrival.at_s, shapes[arrival.kind]) for arrival in trace]


def curves(
    sheet: Sheet, world: World, sizes: Sequence[int], loads: Sequence[float], slos: list[Slo], like: Case
) -> None:
    """Latency, goodput and attainment over the load, a curve a size."""
    for replicas in sizes:
        points: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for load in loads:
            case = replace(like, replicas=replicas, load=load)
            name = f"simulate/plan/{replicas}/load-{load:g}"
            sheet.check_time(name)
            ran, outcomes = play(world, case)
            if not outcomes:
                raise ValueError(f"duration must be longer: no request of {name} comes behind its first tenth")
            for (what, y), value in _figures(sheet, name, world, case, ran, outcomes, slos).items():
                points.setdefault((what, y), []).append((load, value))
        for (what, y), found in points.items():
            x = "load, of what the replicas serve one request at a time"
            labels: Labels = {**world.labels, "what": what, "replicas": replicas}
            sheet.drawn(Curve(name=f"simulate/{what}/{replicas} replicas", x=x, y=y, points=found, labels=labels))


def _figures(
    sheet: Sheet, name: str, world: World, case: Case, ran: Ran, outcomes: list[Outcome], slos: list[Slo]
) -> dict[tuple[str, str], float]:
    """Written down; those that make curves are returned, by (what, y)."""
    labels: Labels = {**world.labels, "rate": rate_of(world, case), "requests": len(outcomes)}
    drawn: dict[tuple[str, str], float] = {}
    for kind in (*world.shapes, "all"):
        values = sorted(o.latency_s for o in outcomes if o.latency_s is not None and kind in (o.kind, "all"))
        for share in SHARES if values else ():
            what, reached = f"p{100 * share:g}", quantile(values, share)
            sheet.measured(f"{name}/{kind}/{what}", "s", [reached], labels=labels, shown=kind == "all")
            if kind == "all":
                drawn[what, "latency, s"] = reached
    good = goodput(outcomes, slos, case.duration_s * (1 - WARM_UP), case.duration_s * WARM_UP)
    sheet.measured(f"{name}/goodput", "requests/s", [good.good_per_s], "higher", labels, shown=bool(slos))
    drawn["goodput", "requests/s and replica"] = good.good_per_s / case.replicas
    for slo in slos:
        asked = [one for one in outcomes if slo.kind in (None, one.kind)]
        if asked:
            within = sum(o.latency_s is not None and o.latency_s <= slo.limit_s for o in asked) / len(asked)
            sheet.measured(f"{name}/within/{slo.name}", "share", [within], "higher", labels, shown=False)
            drawn[f"within {slo.name}", "share within the SLO"] = within
    busy = ran.busy_s / ran.replica_s
    sheet.measured(f"{name}/busy", "share", [busy], "neither", {**labels, "deaths": ran.num_deaths}, shown=False)
    sheet.measured(f"{name}/replica-hours", "h", [ran.replica_s / 3600], labels=labels, shown=case.autoscale)
    return drawn


def fewest(world: World, rate: float, slos: Sequence[Slo], like: Case) -> int | None:
    """The fewest replicas that meet all SLOs at so many requests a second, of those tried: doubled, then halved.

    None where no number does, since a request alone takes longer. More replicas are taken never to do worse.
    """

    @cache
    def holds(replicas: int) -> bool:
        _, outcomes = play(world, replace(like, replicas=replicas), rate)
        return all(slo.is_met(outcomes) for slo in slos if any(slo.kind in (None, one.kind) for one in outcomes))

    low = max(1, math.floor(0.5 * rate * world.alone_s))
    high = max(low, math.ceil(rate * world.alone_s))
    if holds(low):
        high, low = low, 1
    while not holds(high):
        if high > 16 * rate * world.alone_s + 16 or high >= MOST_REPLICAS:
            return None
        low, high = high + 1, math.ceil(1.3 * high) + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high
