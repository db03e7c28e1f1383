"""From results to charts: which numbers stand on which axis. Knows no library that draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..machine import in_words
from ..record import Curve, HistoryLine, KernelResult, SuiteReport
from .load import Found

MOST_SERIES = 8  # as many colours and marks as can be told apart
LEAST_OF_CDF = 20  # samples, fewer are no distribution
REQUESTS = ("engine", "serve", "goodput")  # suites whose seconds are latencies of requests
OF_THE_GENERATOR = ("lag", "resolution")  # but these, by which a run of load is trusted
DISTRIBUTION = "share of requests"  # the y of curves that are distributions already
QUALITY = "psnr_pooled"


@dataclass(frozen=True)
class Series:
    """errors: how far the interval reaches below and above each point."""

    name: str
    points: list[tuple[float, float]]
    line: Literal["steps", "line", "none"] = "line"
    errors: list[tuple[float, float]] | None = None
    words: list[str] | None = None  # beside each point
    parts: list[list[tuple[float, float]]] | None = None  # what it is made of, such as each seed's own


@dataclass
class Chart:
    """guide: a line that the points are read against, such as a roofline."""

    title: str
    x: str
    y: str
    series: list[Series]
    source: str
    log_x: bool = False
    log_y: bool = False
    guide: list[tuple[float, float]] | None = None
    ticks: dict[float, str] | None = None  # of x, in place of numbers
    left_out: int = 0
    key: str = ""

    def __post_init__(self) -> None:
        self.left_out = max(0, len(self.series) - MOST_SERIES)
        self.series = self.series[:MOST_SERIES]


@dataclass
class Section:
    key: str
    title: str
    text: str
    charts: list[Chart] = field(default_factory=list)


def sections(found: Found) -> list[Section]:
    """Those that there are results for."""
    every = [
        Section(
            "latency",
            "Latency",
            "The share of requests, or of rounds, that took no longer than so many seconds: every sample of the run.",
            list(_latencies(found)),
        ),
        Section(
            "load",
            "Load",
            "What arrives in time as more is offered; requests arrive whether or not the service keeps up. Faint lines "
            "are of one trace each.",
            [chart for path, report in found.suites.items() for chart in _curves(path, report)],
        ),
        Section(
            "quality",
            "Quality over speed",
            "Distance from the exact clip against speed-up. Further up and to the right is better; fewer steps are the "
            "control that a cache has to beat.",
            list(_qualities(found)),
        ),
        Section(
            "roofline",
            "Roofline",
            "Arithmetic rate over arithmetic intensity. The line is what this device reached on a copy and on a large "
            "product; on a CPU with its caches, small operations may lie above it.",
            [chart for path, report in found.kernels.items() for chart in _rooflines(path, report)],
        ),
        Section(
            "memory",
            "Memory",
            "Peak bytes that were measured against those that admission predicts; on the line they agree.",
            list(_memories(found)),
        ),
        Section(
            "history",
            "History",
            "Medians over commits with their intervals of 95 %, relative to the first commit shown.",
            [chart for path, lines in found.histories.items() for chart in _histories(path, lines)],
        ),
    ]
    kept = [section for section in every if section.charts]
    for section in kept:
        for number, chart in enumerate(section.charts):
            chart.key = section.key if len(section.charts) == 1 else f"{section.key}-{number + 1}"
    return kept


def _latencies(found: Found) -> Iterator[Chart]:
    for path, report in found.suites.items():
        groups: dict[str, list[Series]] = {}
        for one in report.measurements:
            group, _, name = one.name.rpartition("/")
            if group.rpartition("/")[2] in OF_THE_GENERATOR or report.benchmark not in REQUESTS:
                continue
            if one.unit == "s" and len(one.samples) >= LEAST_OF_CDF:
                groups.setdefault(group, []).append(cdf(name, one.samples))
        for group, series in groups.items():
            yield Chart(group, "seconds", DISTRIBUTION, series, path)
        yield from _curves(path, report, of_distributions=True)


def cdf(name: str, samples: Sequence[float]) -> Series:
    """A step upwards at each sample."""
    ordered = sorted(samples)
    points = [(value, (rank + 1) / len(ordered)) for rank, value in enumerate(ordered)]
    return Series(name, [(ordered[0], 0.0), *points], "steps")


def _curves(path: str, report: SuiteReport, of_distributions: bool = False) -> Iterator[Chart]:
    """Curves of the same axes and of one group, the name up to its last part, share a chart.

    A curve whose name goes on from another one's is a part of it: a seed's own beside the mean over seeds.
    """
    curves = {curve.name: curve for curve in report.curves if (curve.y == DISTRIBUTION) == of_distributions}
    groups: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in curves.values():
        group = curve.name.rpartition("/")[0]
        if curve.points and group not in curves:
            groups.setdefault((group, curve.x, curve.y), []).append(curve)
    for (group, x, y), whole in groups.items():
        series = []
        for curve in whole:
            parts = [sorted(one.points) for one in curves.values() if one.name.startswith(f"{curve.name}/")]
            line: Literal["steps", "line"] = "steps" if of_distributions else "line"
            series.append(Series(curve.name.rpartition("/")[2], sorted(curve.points), line, parts=parts))
        yield Chart(group or report.benchmark, x, y, series, path)


def _qualities(found: Found) -> Iterator[Chart]:
    """Of each way that has both a speed-up and a distance; caches, weights and fewer steps are series of their own."""
    for path, report in found.suites.items():
        quality = {
            one.name.rpartition("/")[2]: one.spread.median
            for one in report.measurements
            if f"/{QUALITY}/" in one.name or one.name.endswith(f"/{QUALITY}")
        }
        kinds: dict[str, list[tuple[float, float, str]]] = {}
        for ratio in report.comparisons:
            way = ratio.name.rpartition("/")[2]
            if way in quality and "/cpu" not in ratio.name and report.benchmark == "quality":
                kind, _, value = way.partition("=")
                kinds.setdefault(kind, []).append((ratio.spread.median, quality[way], value))
        series = [
            Series(
                kind,
                [(x, y) for x, y, _ in sorted(points)],
                "line" if kind == "steps" else "none",
                words=[value for _, _, value in sorted(points)],
            )
            for kind, points in kinds.items()
        ]
        if series:
            yield Chart(f"{report.model}", "speed-up of denoising", "PSNR of the whole clip, dB", series, path)


def _rooflines(path: str, report: KernelResult) -> Iterator[Chart]:
    limits = {name: spread.median for name, spread in report.limits.items()}
    if not {"bytes_per_s", "operations_per_s"} <= limits.keys():
        return
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        seconds = row.contestants[row.ours].seconds if row.ours in row.contestants else None
        if seconds is not None and row.operations > 0 and row.num_bytes > 0 and seconds.median > 0:
            at = (row.operations / row.num_bytes, row.operations / seconds.median / 1e9)
            points.setdefault(row.op, []).append(at)
    if not points:
        return
    peak = limits["operations_per_s"] / 1e9
    knee = limits["operations_per_s"] / limits["bytes_per_s"]
    across = [knee, *(x for some in points.values() for x, _ in some)]
    low, high = min(across) / 2, max(across) * 2
    roof = [(low, low * limits["bytes_per_s"] / 1e9), (knee, peak), (high, peak)]
    ops = list(points)
    for begin in range(0, len(ops), MOST_SERIES):
        series = [Series(op, sorted(points[op]), "none") for op in ops[begin : begin + MOST_SERIES]]
        yield Chart(in_words(report.machine), "operations a byte", "10⁹ operations/s", series, path, True, True, roof)


def _memories(found: Found) -> Iterator[Chart]:
    """Figures in bytes beside those of the same name with `/predicted` behind it; a series for each kind."""
    for path, report in found.suites.items():
        bytes_of = {one.name: one.spread.median / 2**20 for one in report.measurements if one.unit == "bytes"}
        groups: dict[str, list[tuple[float, float]]] = {}
        for name, measured in bytes_of.items():
            if f"{name}/predicted" in bytes_of:
                group = name.rpartition("/")[2] if name.count("/") > 1 else report.benchmark
                groups.setdefault(group, []).append((bytes_of[f"{name}/predicted"], measured))
        if groups:
            series = [Series(group, sorted(points), "none") for group, points in groups.items()]
            values = [value for points in groups.values() for point in points for value in point]
            guide = [(end, end) for end in (min(values), max(values))]
            yield Chart(report.model, "predicted, MiB", "measured, MiB", series, path, guide=guide)


def _histories(path: str, lines: list[HistoryLine]) -> Iterator[Chart]:
    """A chart for each case, over the runs that are publishable; one run alone is no history."""
    lines = [line for line in lines if line.unpublishable is None]
    ticks = {float(at): line.commit[:7] for at, line in enumerate(lines)}
    groups: dict[str, list[Series]] = {}
    for name in dict.fromkeys(name for line in lines for name in line.figures):
        held = [(at, line.figures[name]) for at, line in enumerate(lines) if name in line.figures]
        base = held[0][1].median
        if len(held) < 2 or base <= 0:
            continue
        points = [(float(at), figure.median / base) for at, figure in held]
        errors = [((f.median - (f.low or f.median)) / base, ((f.high or f.median) - f.median) / base) for _, f in held]
        case, _, last = name.rpartition("/")
        groups.setdefault(case, []).append(Series(last, points, "line", errors))
    for case, series in groups.items():
        yield Chart(case, "commit", "over the first", series, path, ticks=ticks)
