"""`skylapse bench simulate`: a service of many replicas by the real scheduler, checked against real runs, then planned.

--check FILE... holds the model against `bench engine`'s results. Without it, latencies, goodput and the number of
replicas of a plan are simulated, with step times that are assumed (--assume, or the default) or fitted (--measured).
A result's settings hold all that was assumed, which is what a file for --assume looks like.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from ..load.plan import parse_rate
from ..load.slo import Slo, check_kinds, parse_slo
from ..load.traces import PROCESSES
from ..sheet import Sheet, suite_parser
from .assume import read_assumptions
from .check import GOAL, check, read_all
from .plan import Case, World, assumed_world, curves, fewest, measured_world, write_times

SIZES, QUICK_SIZES = (8, 64, 1000), (8, 64)
LOADS, QUICK_LOADS = (0.5, 0.7, 0.9), (0.5, 0.9)
HOUR_S, QUICK_S = 3600.0, 600.0
SIMULATED = "simulated"  # no model runs: what it would be is in the labels


def simulate(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    if options.check:
        measured = read_all(options.check)
        sheet = Sheet("simulate", options, {"check": [path.name for path in options.check], "goal": options.goal})
        with sheet.running():
            check(sheet, measured, options.goal)
        return sheet.status
    assumptions = read_assumptions(options.assume)
    world = assumed_world(assumptions) if options.measured is None else measured_world(options.measured, assumptions)
    slos = [slo for text in options.slo for slo in parse_slo(text)]
    check_kinds(slos, list(world.shapes))
    if options.plan_for and not slos:
        raise ValueError("plan-for needs a --slo that is to be met")
    sheet = Sheet("simulate", options, _settings(options, slos) | {"assumptions": assumptions.model_dump()})
    with sheet.running(cases=len(options.replicas) * len(options.load) + len(options.plan_for)):
        write_times(sheet, world)
        like = Case(1, 1.0, options.trace, options.duration, options.seed, options.autoscale)
        curves(sheet, world, options.replicas, options.load, slos, like)
        for text in options.plan_for:
            _plan(sheet, world, text, slos, like)
    return sheet.status


def _plan(sheet: Sheet, world: World, text: str, slos: list[Slo], like: Case) -> None:
    name = f"simulate/holds/{text}"
    sheet.check_time(name)
    found = fewest(world, parse_rate(text), slos, like)
    if found is None:
        sheet.missing(name, f"no number of replicas meets {', '.join(slo.name for slo in slos)}")
    else:
        sheet.measured(name, "replicas", [found], labels={**world.labels, "slo": ",".join(slo.name for slo in slos)})


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = suite_parser("simulate", "A service of many replicas around the real scheduler.", model=SIMULATED)
    option = parser.add_argument
    option(
        "--check", type=Path, nargs="+", metavar="FILE", help="results of bench engine: fit to one trace, predict all"
    )
    option("--goal", type=float, default=GOAL, metavar="X", help=f"of the median error of p95; default: {GOAL}")
    option(
        "--assume",
        type=Path,
        metavar="FILE",
        help="JSON like `assumptions` in a result; what it leaves out is the default's",
    )
    option("--measured", type=Path, metavar="FILE", help="a result of bench engine, whose steps are used instead")
    option("--replicas", type=_sizes, metavar="N,...", help="default: 8,64,1000; quick: 8,64")
    option(
        "--load", type=_loads, metavar="X,...", help="of one request at a time; default: 0.5,0.7,0.9; quick: 0.5,0.9"
    )
    option("--trace", choices=tuple(PROCESSES), default="poisson", help="default: poisson")
    option("--duration", type=float, metavar="S", help="simulated; default: 3600, quick 600")
    option("--slo", action="append", default=[], metavar="SLO", help="p95=60s, long:p99=2m; may be given again")
    option("--plan-for", action="append", default=[], metavar="R", help="how many replicas hold 2.5/s; may be repeated")
    option("--autoscale", action="store_true", help="from 1 to N replicas by the backlog, as deploy/serve.yaml has it")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.replicas = options.replicas or list(QUICK_SIZES if quick else SIZES)
    options.load = options.load or list(QUICK_LOADS if quick else LOADS)
    options.duration = (QUICK_S if quick else HOUR_S) if options.duration is None else options.duration
    if not (math.isfinite(options.duration) and options.duration > 0):
        raise ValueError(f"duration must be above 0 seconds, got {options.duration:g}")
    if not 0 < options.goal < math.inf:
        raise ValueError(f"goal must be above 0, got {options.goal:g}")
    for text in options.plan_for:
        parse_rate(text)
    return options


def _settings(options: argparse.Namespace, slos: list[Slo]) -> dict[str, object]:
    names = ("replicas", "load", "trace", "duration", "plan_for", "autoscale")
    measured = None if options.measured is None else options.measured.name
    return {n: getattr(options, n) for n in names} | {"slo": ",".join(s.name for s in slos), "measured": measured}


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers above 0 with commas, got {text!r}")
    return [int(part) for part in parts]


def _loads(text: str) -> list[float]:
    try:
        found = sorted(float(part) for part in text.split(","))
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(0 < load <= 10 for load in found):
        raise argparse.ArgumentTypeError(f"must be different shares above 0 and up to 10 with commas, got {text!r}")
    return found
