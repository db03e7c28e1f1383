"""`skylapse bench goodput`: our service and a plain Ray Serve + diffusers one under the same mixed Poisson traces.

The SLO of each class is three times the peer's own latency alone, measured before the run and fixed from then on. Loads
are shares of what the peer could serve one by one. Every trace is played against both, one right after the other, the
order changing from one to the next; meanwhile the other one idles. The peer's batch size is the one that serves it best
on a trace of its own. Goodput counts requests that were done within
their class's SLO, over the time in which they arrived; the trace's beginning, when queues are still empty, is played
but not counted. Polls tell the end of a clip late, and later the more there are: a request counts as good where it may
have been done in time, for both.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from ..record import Curve
from ..sheet import Sheet, note, suite_parser
from .play import Played, play, quantile
from .services import Service, idle_cores, ours, plain_ray_serve, tune
from .slo import Good, Slo
from .slo import goodput as goodput_of
from .target import Target, detected
from .traces import Arrival, poisson
from .workloads import Workload, mixed

FACTOR = 3.0  # of the peer's solo latency: the SLO
LOADS = (0.8, 1.3, 2.2, 3.2)
QUICK_LOADS = (0.8, 2.0)
BATCHES = (1, 4, 10)  # of which the peer gets what serves it best; 10 is what `@serve.batch` has of itself
TUNING_LOAD, TUNING_SEED = 1.0, 1000  # a trace that is not among those that count
PEER, OURS = "ray_serve", "skylapse"
SETTLE_S = 120.0


@dataclass
class Contest:
    """What is fixed before the first trace: targets, workload, SLO, the peer's capacity."""

    targets: dict[str, Target]
    workload: Workload
    solo_s: dict[str, dict[str, float]]
    slos: list[Slo] = field(default_factory=list)
    capacity: float = 0.0

    def __post_init__(self) -> None:
        peer = self.solo_s[PEER]
        self.slos = [Slo(kind.name, 0.95, FACTOR * peer[kind.name]) for kind in self.workload.kinds]
        weights = sum(kind.weight for kind in self.workload.kinds)
        self.capacity = weights / sum(kind.weight * peer[kind.name] for kind in self.workload.kinds)

    @property
    def longest_s(self) -> float:
        return max(slo.limit_s for slo in self.slos)


def goodput(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    workload = mixed(options.steps)
    settings = {
        "workload": workload.name,
        "classes": {kind.name: dict(kind.fields) | {"weight": kind.weight} for kind in workload.kinds},
        "loads_of_the_peers_solo_capacity": options.loads,
        "seeds": options.seeds,
        "window_s": options.window,
        "warm_up_share": options.warm_up,
        "slo": f"{FACTOR:g}x the peer's median solo latency of the class",
        "threads": options.threads or "as many as there are cores",
    }
    sheet = Sheet("goodput", options, settings)
    with sheet.running(), ExitStack() as services:
        peer = services.enter_context(plain_ray_serve(options.threads, options.model))
        mine = services.enter_context(ours(options.threads, options.model))
        sheet.settings["services"] = {
            one.name: {"command": one.command, "start_s": one.start_s} for one in (peer, mine)
        }
        note("waiting until both are at rest")
        sheet.settings["idle_cores"] = {name: round(cores, 3) for name, cores in idle_cores((peer, mine)).items()}
        contest = prepare(sheet, {PEER: peer, OURS: mine}, workload, options.solo)
        batch = options.max_batch or (BATCHES[-1] if options.quick else tuned(sheet, contest, peer, options))
        sheet.settings["max_batch_of_the_peer"] = batch
        tune(peer, batch)
        found: Found = {name: {} for name in contest.targets}
        try:
            rounds(sheet, contest, options, found)
        finally:
            summary(sheet, contest, both(found))
    return sheet.status


def prepare(sheet: Sheet, services: dict[str, Service], workload: Workload, repeats: int) -> Contest:
    """Warm both up, then measure each class alone, in turns; the peer's medians fix SLO and loads."""
    targets = {
        name: replace(detected(Target(one.url, one.key)), poll_share=0.04, poll_rate=50.0)
        for name, one in services.items()
    }
    solo: dict[str, dict[str, list[float]]] = {name: {k.name: [] for k in workload.kinds} for name in targets}
    for turn in range(repeats + 1):
        for kind in workload.kinds:
            for name in _order(turn):
                note(f"alone: {name}, {kind.name}, {turn} of {repeats}")
                fields = {"prompt": workload.prompts[turn], "seed": turn, **kind.fields}
                played = Played()
                asyncio.run(play([Arrival(0.0, kind.name, fields, kind.video_s)], targets[name], played))
                if played.outcomes[0].latency_s is None:
                    one = played.outcomes[0]
                    raise RuntimeError(f"{name} did not make a {kind.name} clip: {one.end}: {one.why}")
                if turn:
                    solo[name][kind.name].append(played.outcomes[0].latency_s)
    for kind in workload.kinds:
        for name in targets:
            sheet.measured(f"goodput/solo/{kind.name}/{name}", "s", solo[name][kind.name])
        ratios = [a / b for a, b in zip(solo[PEER][kind.name], solo[OURS][kind.name], strict=True)]
        sheet.compared(f"goodput/solo/{kind.name}", PEER, OURS, ratios)
    medians = {name: {kind: statistics.median(s) for kind, s in kinds.items()} for name, kinds in solo.items()}
    contest = Contest(targets, workload, medians)
    sheet.settings["slos"] = [slo.name for slo in contest.slos]
    sheet.settings["peers_solo_capacity_per_s"] = contest.capacity
    note(f"fixed: {', '.join(sheet.settings['slos'])}; the peer alone makes {contest.capacity:.3f} requests/s")
    return contest


def tuned(sheet: Sheet, contest: Contest, peer: Service, options: argparse.Namespace) -> int:
    """The peer's best batch size: most goodput at its own capacity, in a tie most done, then the lower mean latency."""
    trace = poisson(
        TUNING_LOAD * contest.capacity, contest.workload.ask(TUNING_SEED), TUNING_SEED, duration_s=options.window
    )
    scores: dict[int, tuple[int, int, float]] = {}
    for size in BATCHES if trace else ():
        sheet.check_time(f"tuning the peer, batches of {size}")
        tune(peer, size)
        good = one_run(sheet, contest, PEER, trace, f"tuning/batch{size}", options)
        scores[size] = (good.good, good.ok, -good.mean_s)
    best = max(scores, key=lambda size: scores[size]) if scores else BATCHES[-1]
    note(f"the peer's batches have up to {best}: the most goodput of {', '.join(map(str, BATCHES))}")
    return best


Found = dict[str, dict[int, dict[float, Good]]]  # contestant -> seed -> load -> what it came to


def rounds(sheet: Sheet, contest: Contest, options: argparse.Namespace, found: Found) -> None:
    """Fills `found`, so that a run that is out of time keeps what it had."""
    for turn, (seed, share) in enumerate((seed, share) for seed in options.seeds for share in options.loads):
        rate = share * contest.capacity
        ask = contest.workload.ask(seed)
        trace = poisson(rate, ask, seed, duration_s=options.window)
        if not any(arrival.at_s >= options.warm_up * options.window for arrival in trace):
            sheet.failed(f"goodput/seed{seed}/load{share:g}", "the trace has no request that counts")
            continue
        for name in _order(turn):
            sheet.check_time(f"seed {seed}, load {share:g}, {name}")
            good = one_run(sheet, contest, name, trace, f"seed{seed}/load{share:g}", options)
            found[name].setdefault(seed, {})[share] = good


def both(found: Found) -> Found:
    """Only the traces that both played."""
    return {
        name: {
            seed: kept
            for seed, loads in seeds.items()
            if (kept := {s: g for s, g in loads.items() if all(s in f.get(seed, {}) for f in found.values())})
        }
        for name, seeds in found.items()
    }


def one_run(
    sheet: Sheet, contest: Contest, name: str, trace: list[Arrival], case: str, options: argparse.Namespace
) -> Good:
    """One trace against one service, which is empty again afterwards."""
    target, played = contest.targets[name], Played()
    asyncio.run(play(trace, target, played, end_s=trace[-1].at_s + contest.longest_s))
    first_s = options.warm_up * options.window
    counted = [one for one in played.outcomes if one.due_s >= first_s]
    good = goodput_of(counted, contest.slos, options.window - first_s, first_s, doubt=True)
    labels: dict[str, str | int | float] = {
        "requests": good.requests,
        "good": good.good,
        "offered_per_s": good.requests / (options.window - first_s),
        "good_per_s": good.good_per_s,
        "good_video_s_per_s": good.good_video_s_per_s,
        "lag_p99_s": quantile(sorted(played.lags_s), 0.99),
        "resolution_p95_s": quantile(sorted(one.resolution_s for one in played.outcomes), 0.95),
        **{f"ended_{end}": number for end, number in played.ends().items()},
    }
    for kind in contest.workload.kinds:
        values = [one.latency_s for one in counted if one.kind == kind.name and one.latency_s is not None]
        if values:
            sheet.measured(f"goodput/{case}/{kind.name}/{name}", "s", values, labels=labels)
    sheet.measured(f"goodput/{case}/good/{name}", "req/s", [good.good_per_s], "higher", labels)
    if reason := played.distrust:
        sheet.failed(f"goodput/{case}/{name}/trusted", reason)
    bad = {end: why for end, why in played.reasons().items() if end not in ("late", "rejected")}
    if bad:
        sheet.failed(f"goodput/{case}/{name}/ends", f"{played.ends()}: {bad}")
    if not settled(contest, name):
        sheet.failed(f"goodput/{case}/{name}/rest", f"it did not come to rest within {SETTLE_S:g} s")
    return good


def settled(contest: Contest, name: str) -> bool:
    """Wait until a small clip is about as quick as alone: what was dropped has left."""
    kind = min(contest.workload.kinds, key=lambda kind: contest.solo_s[name][kind.name])
    probe = [Arrival(0.0, kind.name, {"prompt": "a star", "seed": 0, **kind.fields})]
    until_s = time.monotonic() + SETTLE_S
    while time.monotonic() < until_s:
        played = Played()
        asyncio.run(play(probe, contest.targets[name], played))
        latency_s = played.outcomes[0].latency_s
        if latency_s is not None and latency_s < 2 * contest.solo_s[name][kind.name]:
            return True
    return False


def summary(sheet: Sheet, contest: Contest, found: Found) -> None:
    """Curves by seed and over all, the maximum of each, and their ratio seed by seed."""
    if not all(found.values()):
        return
    for what, unit, pick in (("requests", "req/s", _good_per_s), ("video_s", "s/s", _good_video_s_per_s)):
        most: dict[str, list[float]] = {}
        for name, seeds in found.items():
            curves = {seed: {share: pick(good) for share, good in loads.items()} for seed, loads in seeds.items()}
            for seed, points in curves.items():
                _draw(sheet, contest, f"goodput/{what}/{name}/seed{seed}", unit, points, {"seed": seed})
            shares = sorted({share for points in curves.values() for share in points})
            means = {s: statistics.mean(points[s] for points in curves.values() if s in points) for s in shares}
            _draw(sheet, contest, f"goodput/{what}/{name}", unit, means, {"mean_of_seeds": len(curves)})
            most[name] = [max(points.values()) for points in curves.values()]
            sheet.measured(f"goodput/most/{what}/{name}", unit, most[name], "higher")
        if min(most[PEER]) > 0:
            ratios = [a / b for a, b in zip(most[OURS], most[PEER], strict=True)]
            sheet.compared(f"goodput/most/{what}", OURS, PEER, ratios, {"above_1": "ours is more"})
        else:
            sheet.failed(f"goodput/most/{what}", "the peer met its SLO at no load: there is no ratio")
    table(contest, found)


def _draw(
    sheet: Sheet, contest: Contest, name: str, unit: str, points: dict[float, float], labels: dict[str, int]
) -> None:
    sheet.drawn(
        Curve(
            name=name,
            x="offered load, req/s",
            y=f"goodput, {unit}",
            points=[(share * contest.capacity, value) for share, value in sorted(points.items())],
            labels={"contestant": name.split("/")[2], **labels},
        )
    )


def table(contest: Contest, found: Found) -> None:
    """Goodput, and how many of how many were good, of all seeds together."""
    print(f"\n{'offered req/s':>14}{'share':>7}" + "".join(f"{name + ', good req/s':>26}" for name in found))
    for share in sorted({share for seeds in found.values() for loads in seeds.values() for share in loads}):
        cells = []
        for seeds in found.values():
            goods = [loads[share] for loads in seeds.values() if share in loads]
            rate = statistics.mean(good.good_per_s for good in goods) if goods else math.nan
            cells.append(f"{rate:>14.3f} ({sum(g.good for g in goods):>4}/{sum(g.requests for g in goods):<4})")
        print(f"{share * contest.capacity:>14.3f}{share:>7.2f}" + "".join(cells))


def _good_per_s(good: Good) -> float:
    return good.good_per_s


def _good_video_s_per_s(good: Good) -> float:
    return good.good_video_s_per_s


def _order(turn: int) -> tuple[str, str]:
    return (PEER, OURS) if turn % 2 == 0 else (OURS, PEER)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    what = "our service and a plain Ray Serve + diffusers one under the same traces"
    parser = suite_parser("goodput", what)
    option = parser.add_argument
    option("--loads", metavar="A,B,...", help="shares of the peer's solo capacity")
    option("--seeds", metavar="A,B,...", help="of the traces; default: 0,1,2, quick: 0")
    option("--window", type=float, metavar="S", help="in which requests arrive; default: 30, quick: 20")
    option(
        "--warm-up", type=float, default=0.2, metavar="SHARE", help="of the window that is not counted; default: 0.2"
    )
    option("--solo", type=int, metavar="N", help="requests of a class alone; default: 6, quick: 3")
    option("--steps", type=int, metavar="N", help="denoising steps; default: the model's own")
    option("--max-batch", type=int, metavar="N", help="of the peer's @serve.batch; default: the best of 1, 4, 10")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.loads = _numbers("loads", options.loads, QUICK_LOADS if quick else LOADS)
    options.seeds = [int(seed) for seed in _numbers("seeds", options.seeds, (0,) if quick else (0, 1, 2), least=0.0)]
    options.window = options.window or (20.0 if quick else 30.0)
    options.solo = options.solo or (3 if quick else 6)
    if not 0 <= options.warm_up < 1:
        raise ValueError(f"warm-up must be from 0 to below 1, got {options.warm_up:g}")
    if options.window <= 0 or options.solo < 1 or (options.max_batch or 1) < 1:
        raise ValueError("window, solo and max-batch must be above 0")
    return options


def _numbers(name: str, text: str | None, otherwise: Sequence[float], least: float = 1e-6) -> list[float]:
    if text is None:
        return list(otherwise)
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(math.isfinite(n) and n >= least for n in found):
        raise ValueError(f"{name} must be different numbers with commas between them, got {text!r}")
    return found
