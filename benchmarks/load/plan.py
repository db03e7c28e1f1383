"""A capacity plan: how many replicas of which kind hold a load within the SLO.

Two answers, since each knows what the other does not:

Measured. The share of requests within the SLO, over the load that was offered to the replicas that were measured, is
followed up to where it falls below the percentile (straight lines between the loads that were measured). That load, a
replica, is the capacity; `replicas = ceil(load * (1 + headroom) / capacity)`. It holds for whatever the server does
inside (batching, caches, scheduling), on the hardware, workload and arrival process that were measured, and supposes
that replicas do not share anything that runs out (database, proxy, network) and get their share of the arrivals at
random: a Poisson process that is split at random is one again, so each replica sees what the measured one saw. Replicas
that draw from one queue do better, so the number is an upper bound there. Bursts wider than the measured ones break it.

M/G/k. Replicas that work on one request at a time from one queue, with the service times of requests alone. The
probability of waiting is Erlang's C, the mean wait Allen and Cunneen's `C / (k mu - lambda) * (1 + cs^2) / 2`, the wait
of who waits exponential (exact for M/M/k, within some percent of simulations for service times that vary less; the
tests have one). It knows of no batching, so for a server that batches well it asks for too many; where it asks for
fewer than the measured answer, replicas interfere with something that a queue does not know, and the measured answer
counts. With service times that vary much more than an exponential's (cs^2 > 2) its tail is too short.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..record import SuiteReport, read
from .slo import Slo, parse_slo

MOST_REPLICAS = 100_000
RATE = re.compile(r"(\d+(?:\.\d+)?)/(s|min|h)")
PER_S = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Kind:
    """One kind of replica as it was measured.

    attained: SLO -> (load a replica in requests/s, share of the requests within the limit); service_s: class -> the
    latencies of requests (nearly) alone; weights: class -> its share of the requests.
    """

    name: str
    attained: Mapping[str, Sequence[tuple[float, float]]]
    service_s: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Capacity:
    """Of one replica, requests/s within all SLOs; is_floor: no load that was measured was too much."""

    per_s: float
    is_floor: bool
    bound_by: str


@dataclass(frozen=True)
class Plan:
    kind: str
    replicas: int | None
    capacity: Capacity | None
    queue_replicas: int | None  # M/G/k's
    cost_per_hour: float | None
    words: tuple[str, ...]


def parse_rate(text: str) -> float:
    """`2.5/s`, `30/min`, `1000/h` as requests a second."""
    match = RATE.fullmatch(text.strip())
    if match is None or not float(match[1]) > 0:
        raise ValueError(f"plan-for must be a rate above 0 like 2.5/s, 30/min or 1000/h, got {text!r}")
    return float(match[1]) / PER_S[match[2]]


def capacity_of(kind: Kind, slos: Sequence[Slo]) -> Capacity | None:
    """The highest load at which all SLOs hold; None where they did not hold at the lowest one that was measured."""
    found: list[Capacity] = []
    for slo in slos:
        if slo.share is None:
            raise ValueError(f"a plan needs percentiles, and {slo.name} is a mean")
        points = sorted(kind.attained.get(slo.name, ()))
        if not points:
            raise ValueError(f"{kind.name} must have been measured against {slo.name} over several loads")
        if points[0][1] < slo.share:
            return None
        per_s, is_floor = points[-1][0], True
        for (x0, y0), (x1, y1) in pairwise(points):
            if y1 < slo.share:
                per_s, is_floor = x0 + (x1 - x0) * (y0 - slo.share) / (y0 - y1), False
                break
        found.append(Capacity(per_s, is_floor, slo.name))
    return min(found, key=lambda capacity: capacity.per_s)


def plan(kind: Kind, load_per_s: float, slos: Sequence[Slo], headroom: float = 0.2) -> Plan:
    """For one kind; `headroom` is kept free for what the assumptions leave out."""
    wanted = load_per_s * (1 + headroom)
    words = [f"{load_per_s:g} requests/s and {100 * headroom:g} % of headroom, split over replicas at random"]
    capacity = capacity_of(kind, slos)
    replicas = None
    if capacity is None:
        words.append("no number of replicas: a single one misses the SLO at the lowest load that was measured")
    else:
        replicas = math.ceil(wanted / capacity.per_s - 1e-9)
        least = "at least " if capacity.is_floor else ""
        words.append(f"one replica holds {least}{capacity.per_s:.4g} requests/s, bound by {capacity.bound_by}")
        if capacity.is_floor:
            words.append("no load that was measured was too much for one: fewer replicas may do")
    queue = queue_replicas(kind, wanted, slos) if kind.service_s else None
    if queue is not None:
        words.append(f"M/G/k with the service times of requests alone: {queue}, were there no batching and one queue")
    cost = None if replicas is None or kind.price_per_hour is None else replicas * kind.price_per_hour
    return Plan(kind.name, replicas, capacity, queue, cost, tuple(words))


def plans(kinds: Sequence[Kind], load_per_s: float, slos: Sequence[Slo], headroom: float = 0.2) -> list[Plan]:
    """The cheapest first; those without a price behind them, those that cannot at the end."""
    made = [plan(kind, load_per_s, slos, headroom) for kind in kinds]
    return sorted(
        made,
        key=lambda p: (p.replicas is None, p.cost_per_hour is None, p.cost_per_hour or 0.0, p.replicas or 0),
    )


# --- M/G/k ------------------------------------------------------------------------------------------------------------


def erlang_c(servers: int, offered: float) -> float:
    """The probability of waiting in M/M/k; offered = lambda / mu < servers. By the recursion of Erlang's B."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def within(
    servers: int,
    per_s: float,
    service_s: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    kind: str | None,
    limit_s: float,
) -> float:
    """The share of requests (of a class; None: of all) that are done within the limit; 0 where the queue grows."""
    total = sum(weights[name] for name in service_s)
    first = sum(weights[n] / total * sum(s) / len(s) for n, s in service_s.items())
    second = sum(weights[n] / total * sum(x * x for x in s) / len(s) for n, s in service_s.items())
    offered = per_s * first
    if offered >= servers:
        return 0.0
    waits = erlang_c(servers, offered)
    mean_of_waiting_s = first / (servers - offered) * (1 + second / first**2 - 1) / 2
    share = 0.0
    for name, samples in service_s.items():
        if kind is None or kind == name:
            weight = 1.0 if kind else weights[name] / total
            done = (1 - waits * math.exp(-(limit_s - s) / mean_of_waiting_s) for s in samples if s <= limit_s)
            share += weight * sum(done) / len(samples)
    return share


def queue_replicas(kind: Kind, per_s: float, slos: Sequence[Slo]) -> int | None:
    """The fewest servers of M/G/k that meet all SLOs; None where no number does, since work alone takes longer."""

    def holds(servers: int) -> bool:
        return all(
            within(servers, per_s, kind.service_s, kind.weights, slo.kind, slo.limit_s) >= (slo.share or 0.0)
            for slo in slos
        )

    mean_s = sum(kind.weights[n] * sum(s) / len(s) for n, s in kind.service_s.items()) / sum(
        kind.weights[n] for n in kind.service_s
    )
    low = max(1, math.floor(per_s * mean_s))
    high = low
    while not holds(high):  # more servers never do worse: doubled, then halved
        if high >= MOST_REPLICAS:
            return None
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


# --- files ------------------------------------------------------------------------------------------------------------


def read_kind(path: Path) -> tuple[Kind, list[Slo]]:
    """What a result of `bench serve --loads` says of the replicas that were behind it. ValueError names the file."""
    report = read(path, SuiteReport)
    settings = report.settings
    if report.benchmark != "serve" or "slo" not in settings or not report.curves:
        raise ValueError(f"{path.name} must be a result of `bench serve` with --loads and --slo")
    if report.partial is not None:
        raise ValueError(f"{path.name} must be a whole run to plan with, and is partial: {report.partial}")
    behind = int(settings.get("replicas", 1))
    attained = {
        str(curve.labels["slo"]): [(load / behind, share) for load, share in curve.points]
        for curve in report.curves
        if curve.labels.get("what") == "attained"
    }
    service_s = {str(m.labels["class"]): m.samples for m in report.measurements if m.labels.get("what") == "lightest"}
    weights = {str(name): float(weight) for name, weight in settings.get("weights", {}).items()}
    name = str(settings.get("kind") or path.stem)
    return Kind(name, attained, service_s, weights, settings.get("price_per_hour")), parse_slo(str(settings["slo"]))
