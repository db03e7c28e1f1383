"""One run of a trace, put down in figures: latencies by class, throughput, goodput, lag, how requests ended, cost."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..harness import spread_of
from ..record import Label
from ..sheet import Sheet
from .play import Played, play, quantile
from .slo import Good, Slo, cost_per_video_s, goodput
from .target import Target
from .traces import Arrival

EXPECTED = ("ok", "late", "rejected", "unfinished")  # a loaded server may be, and an interrupted run has the last


@dataclass
class Run:
    """What one load came to; offered_per_s: requests a second that were due."""

    offered_per_s: float
    good: Good
    attained: dict[str, float]
    latencies_s: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """name: of all its figures; contestant: the server, at the end of each name."""

    name: str
    contestant: str
    slos: Sequence[Slo]
    labels: dict[str, Label]
    price_per_hour: float | None = None


def play_case(
    sheet: Sheet, case: Case, trace: Sequence[Arrival], target: Target, concurrency: int | None, window_s: float | None
) -> Run:
    """Play it and write it down, also what there is of a run that is interrupted or that the server's end ends."""
    played, is_whole = Played(), False
    try:
        asyncio.run(play(trace, target, played, concurrency=concurrency))
        is_whole = True
    finally:
        run = written(sheet, case, played, window_s if is_whole else None)
    return run


def written(sheet: Sheet, case: Case, played: Played, window_s: float | None) -> Run:
    outcomes = played.outcomes
    span_s = window_s or max([played.span_s, 1e-9])
    good = goodput(outcomes, case.slos, span_s)
    ends = {f"ended_{re.sub(r'[^a-z0-9]+', '_', end)}": number for end, number in played.ends().items()}
    labels: dict[str, Label] = {**case.labels, **ends}

    def name(what: str) -> str:
        return f"serve/{case.name}/{what}/{case.contestant}"

    run = Run(len(outcomes) / span_s, good, {})
    for kind in dict.fromkeys(one.kind for one in outcomes):
        values = [one.latency_s for one in outcomes if one.kind == kind and one.latency_s is not None]
        run.latencies_s[kind] = values
        if values:
            sheet.measured(name(f"latency/{kind}"), "s", values, labels={**labels, "class": kind})
    previews = [one.first_preview_s - one.due_s for one in outcomes if one.first_preview_s is not None]
    if previews:
        sheet.measured(name("first_preview"), "s", previews, labels=labels)
    if outcomes:
        sheet.measured(name("throughput"), "req/s", [good.requests_per_s], "higher", labels)
        sheet.measured(name("throughput_video"), "s/s", [good.video_s_per_s], "higher", labels)
        sheet.measured(name("lag"), "s", played.lags_s, "neither", labels)
        resolutions = [one.resolution_s for one in outcomes if one.latency_s is not None and one.polls]
        if resolutions:
            sheet.measured(name("resolution"), "s", resolutions, "neither", labels)
    if case.slos and outcomes:
        sheet.measured(name("goodput"), "req/s", [good.good_per_s], "higher", {**labels, "good_share": good.share})
        sheet.measured(name("goodput_video"), "s/s", [good.good_video_s_per_s], "higher", labels)
    if case.price_per_hour is not None and (cost := cost_per_video_s(case.price_per_hour, good.video_s_per_s)):
        sheet.measured(name("cost_per_video_s"), "currency", [cost], labels=labels)
    for slo in case.slos:
        _verdict(sheet, name(f"slo/{slo.name}"), slo, played, run, labels)
    if reason := played.distrust:
        sheet.failed(name("trusted"), f"not trustworthy: {reason}")
    for end, number in played.ends().items():
        if end not in EXPECTED:
            sheet.failed(name(f"ended/{end}"), f"{number} of {len(outcomes)} requests: {played.reasons().get(end, '')}")
    return run


def _verdict(sheet: Sheet, name: str, slo: Slo, played: Played, run: Run, labels: dict[str, Label]) -> None:
    of = [one for one in played.outcomes if slo.kind in (None, one.kind)]
    if not of:
        return
    within = sum(one.latency_s is not None and one.latency_s <= slo.limit_s for one in of) / len(of)
    run.attained[slo.name] = within
    reached_s = slo.reached_s(played.outcomes)
    met = int(reached_s <= slo.limit_s)
    if math.isfinite(reached_s):
        sheet.measured(name, "s", [reached_s], labels={**labels, "limit_s": slo.limit_s, "met": met, "within": within})
    took = f"{reached_s:.4g} s" if math.isfinite(reached_s) else "too many never ended well"
    print(f"  {slo.name}: {'met' if met else 'MISSED'} ({took}; {100 * within:.1f} % within)", flush=True)


def show(run: Run) -> None:
    """A line a class, as people compare them."""
    for kind, values in run.latencies_s.items():
        if values:
            ordered = sorted(values)
            cells = "".join(f"{f'p{100 * s:g}':>8} {quantile(ordered, s):.3f}" for s in (0.5, 0.9, 0.95, 0.99))
            print(f"  {kind:<12}n {len(values):<6}median {spread_of(values).median:.3f} s{cells}", flush=True)
