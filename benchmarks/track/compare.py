"""`bench compare`: two result files, figure by figure; 1 where a figure is surely worse by more than the threshold.

    skylapse bench compare old.json new.json --threshold 5%

Runs of different devices, models or threads are refused. Two runs are no pairs in time: what a slow hour did to one
of them is in the verdict. `bench gate` is free of that, and compares trees where this compares files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.commands.options import Parser
from ..record import Better, Check, KernelResult, Report, Spread, SuiteReport, read_any
from .percent import percent
from .statistics import Change, Verdict, change, change_of_spreads, judge

SAME = ("device", "processor", "threads")  # of the machines
TOLD = ("commit", "torch", "python", "cpus")  # that may differ, and then it is said


@dataclass(frozen=True)
class Figure:
    """What both kinds of files have: samples are None where the file has the spread alone."""

    unit: str
    better: Better
    spread: Spread
    samples: list[float] | None


@dataclass(frozen=True)
class Line:
    name: str
    unit: str
    old: float
    new: float
    change: Change | None  # None where the old figure is 0 and the new one is not
    verdict: Verdict


def compare(arguments: Sequence[str]) -> int:
    parser = Parser(prog="skylapse bench compare", description="two result files, figure by figure")
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--threshold", type=percent, default=0.05, metavar="P", help="default: 5%%")
    parser.add_argument("--force", action="store_true", help="also runs of another device, model or settings")
    options = parser.parse_args(arguments)
    old, new = read_any(options.old), read_any(options.new)
    notes = notes_on(old, new, options.force)
    found = lines(figures(old), figures(new), options.threshold)
    if not found:
        raise ValueError(f"{options.old.name} and {options.new.name} must have a figure in common, got none")
    lost = {name: why for name, why in reasons(new).items() if name in figures(old)}
    print(table(found, figures(old), figures(new), lost, notes))
    return int(bool(lost) or any(line.verdict == "worse" for line in found))


def notes_on(old: Report, new: Report, force: bool = False) -> list[str]:
    """What a reader must know of two files; ValueError where they cannot be compared, `force` lets most of it pass."""
    if old.benchmark != new.benchmark:
        raise ValueError(f"both files must be of one benchmark, got {old.benchmark!r} and {new.benchmark!r}")
    different = {name: (old.machine.get(name), new.machine.get(name)) for name in SAME}
    different["quick"] = (old.quick, new.quick)
    if isinstance(old, SuiteReport) and isinstance(new, SuiteReport):
        different |= {"model": (old.model, new.model), "seed": (old.seed, new.seed)}
        for name in sorted({*old.settings, *new.settings}):
            different[f"setting {name}"] = (old.settings.get(name), new.settings.get(name))
    different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
    words = [f"{name} {before!r} and {after!r}" for name, (before, after) in different.items()]
    if words and not force:
        raise ValueError(
            f"both runs must have the same {', '.join(different)}, got {'; '.join(words)} (--force compares)"
        )
    notes = [f"different, and compared by force: {word}" for word in words]
    for which, report in (("old", old), ("new", new)):
        if report.partial is not None:
            notes.append(f"the {which} run is partial: {report.partial}")
        elif not report.is_publishable:
            notes.append(f"the {which} run is of no clean commit")
    for name in TOLD:
        if (before := old.machine.get(name)) != (after := new.machine.get(name)):
            notes.append(f"{name}: {before} and {after}")
    return notes


def figures(report: Report) -> dict[str, Figure]:
    """By name; of a file of kernels by operation, case and contestant."""
    found: dict[str, Figure] = {}
    if isinstance(report, KernelResult):
        for row in report.rows:
            for name, it in row.contestants.items():
                if it.seconds is not None:
                    found[f"{row.op}, {row.case}/{name}"] = Figure("s", "lower", it.seconds, None)
    if isinstance(report, SuiteReport):
        for one in report.measurements:
            found[one.name] = Figure(one.unit, one.better, one.spread, one.samples)
        for ratio in report.comparisons:  # who of the two is ours is not said, so no direction is a fault
            found[f"{ratio.name}: {ratio.of} / {ratio.to}"] = Figure("x", "neither", ratio.spread, ratio.samples)
    return found


def reasons(report: Report) -> dict[str, str]:
    """Of what failed in a run, by the names of `figures`."""
    found = dict(report.failures) if isinstance(report, SuiteReport) else {}
    if isinstance(report, KernelResult):
        found |= {
            f"{row.op}, {row.case}/{name}": it.reason or "no reason given"
            for row in report.rows
            for name, it in row.contestants.items()
            if it.status == "failed"
        }
        found |= {f"check of {c.op}, {c.case}": _wrong(c) for c in report.checks if c.status != "ok"}
    return found


def _wrong(check: Check) -> str:
    return check.reason or f"off by {check.worst}, where {check.tolerance} is rounding"


def lines(old: dict[str, Figure], new: dict[str, Figure], threshold: float) -> list[Line]:
    """Of figures that both have, in the old file's order."""
    found = []
    for name in old:
        if name not in new:
            continue
        before, after = old[name], new[name]
        if before.unit != after.unit:
            raise ValueError(f"{name} must have one unit in both files, got {before.unit!r} and {after.unit!r}")
        it = changed(before, after)
        verdict = judge(it, threshold, after.better) if it is not None else "unclear"
        found.append(Line(name, after.unit, before.spread.median, after.spread.median, it, verdict))
    return found


def changed(old: Figure, new: Figure) -> Change | None:
    if old.samples and new.samples:
        return change(old.samples, new.samples)
    if old.spread.median == new.spread.median:
        return Change(1.0, 1.0, 1.0, "intervals")
    return change_of_spreads(old.spread, new.spread) if old.spread.median > 0 else None


def table(
    found: list[Line], old: dict[str, Figure], new: dict[str, Figure], lost: dict[str, str], notes: Sequence[str]
) -> str:
    width = max(len(line.name) for line in found) + 2
    out = [
        *(f"note: {note}" for note in notes),
        f"{'':<{width}}{'old':>11}{'new':>11} {'unit':<8}  new/old  interval of 95 %",
    ]
    for line in found:
        out.append(f"{line.name:<{width}}{line.old:>11.4g}{line.new:>11.4g} {line.unit:<8}  {_told(line)}")
    out += [f"{name}: failed in the new run: {why}" for name, why in lost.items()]
    out += [f"{name}: in the old file alone" for name in old if name not in new and name not in lost]
    out += [f"{name}: in the new file alone" for name in new if name not in old]
    counts = {
        verdict: sum(line.verdict == verdict for line in found) for verdict in ("worse", "better", "same", "unclear")
    }
    out.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f" of {len(found)} figures")
    return "\n".join(out)


def _told(line: Line) -> str:
    timed = {"worse": "slower", "better": "faster"} if line.unit in ("s", "cpu_s", "ms") else {}
    verdict = timed.get(line.verdict, line.verdict)
    if line.change is None:
        return f"{'':>7}  {'the old one is 0':<16} {verdict}"
    if line.change.low is None:
        return f"{line.change.ratio:>7.3f}  {'too few samples':<16} {verdict}"
    return f"{line.change.ratio:>7.3f}  {f'{line.change.low:.3f} to {line.change.high:.3f}':<16} {verdict}"
