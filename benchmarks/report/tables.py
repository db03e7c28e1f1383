"""Results as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from ..record import Comparison, KernelReport, KernelResult, LeaseReport, Measurement, Spread, SuiteReport
from .load import AnyResult

OWN = {"quality": "suites.quality_table", "peers": "peers.table"}  # suites whose `markdown` knows them better
MOST_ROWS = 40
SHARE = {"bytes": (2**20, "MiB"), "bytes/s": (2**30, "GiB/s")}


def table(report: AnyResult, begins: str = "") -> str:
    """Of the figures whose names begin so. A whole run of a suite that has a table of its own is shown by it."""
    if isinstance(report, KernelReport):
        return _kernels(report, begins)
    if isinstance(report, LeaseReport) and any(row.op.startswith(begins) for row in report.rows):
        parts = [_kernels(report, begins)]
        if any(one.name.startswith(begins) for one in report.measurements):
            parts.append(_suite(report, begins))
        return "\n\n".join(parts)
    return _suite(report, begins)


def _suite(report: SuiteReport, begins: str) -> str:
    if report.benchmark in OWN and (report.benchmark == "quality" or not begins):
        markdown = import_module(f"..{OWN[report.benchmark]}", __package__).markdown
        with suppress(KeyError):  # a run that ended early, without a figure that every row of it has
            own: str = markdown(report, begins) if begins else markdown(report)
            return own
    ratios = [one for one in report.comparisons if one.name.startswith(begins) and not one.name.endswith("/cpu")]
    values = [one for one in report.measurements if one.name.startswith(begins) and not one.name.endswith("/cpu")]
    if not ratios and not values:
        raise ValueError(f"no figure of {report.benchmark} begins with {begins!r}")
    parts = [_ratios(ratios)] if ratios else []
    parts += [_values(values)] if values else []
    return "\n\n".join(parts)


def _ratios(ratios: list[Comparison]) -> str:
    rows = [(one.name, f"{one.of} / {one.to}", f"{one.spread.median:.3g}x", *_spread(one.spread)) for one in ratios]
    return _grid(("", "ratio of", "median", "quartiles", "interval of 95 %", "n"), rows)


def _values(values: list[Measurement]) -> str:
    rows = []
    for one in values:
        factor, unit = SHARE.get(one.unit, (1, one.unit))
        rows.append((one.name, f"{figure(one.spread.median / factor)} {unit}", *_spread(one.spread, factor)))
    return _grid(("", "median", "quartiles", "interval of 95 %", "n"), rows)


def _kernels(report: KernelResult, begins: str) -> str:
    """Ours, and the nearest of the others; how often it takes our time."""
    rows = []
    for row in report.rows:
        ours = row.contestants[row.ours].seconds if row.ours in row.contestants else None
        if not row.op.startswith(begins) or ours is None:
            continue
        others = {name: it.ratio for name, it in row.contestants.items() if it.ratio is not None and name != "copy"}
        nearest = min(others, key=lambda name: others[name].median, default=None)
        beside = "" if nearest is None else f"{nearest} {others[nearest].median:.2f}x"
        micro = (f"{figure(1e6 * ours.median)} µs", f"{figure(1e6 * ours.q1)} to {figure(1e6 * ours.q3)}")
        rows.append((row.op, row.case, *micro, beside, str(ours.n)))
    if not rows:
        raise ValueError(f"no operation begins with {begins!r}")
    return _grid(("operation", "case", "median", "quartiles", "quickest peer, of ours", "n"), rows)


def _spread(spread: Spread, factor: float = 1) -> tuple[str, str, str]:
    quartiles = f"{figure(spread.q1 / factor)} to {figure(spread.q3 / factor)}" if spread.n > 1 else ""
    if spread.low is None or spread.high is None:
        return quartiles, "", str(spread.n)
    return quartiles, f"{figure(spread.low / factor)} to {figure(spread.high / factor)}", str(spread.n)


def figure(value: float) -> str:
    """Three digits that count, without powers of ten: 1234.5 -> 1234, 0.01234 -> 0.0123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _grid(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    out = [_line(head), "|" + "---|" * len(head), *(_line(row) for row in rows[:MOST_ROWS])]
    if len(rows) > MOST_ROWS:
        out.append(_line((f"and {len(rows) - MOST_ROWS} more in the file", *[""] * (len(head) - 1))))
    return "\n".join(out)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
