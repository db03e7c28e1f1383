"""`bench history`: a result file's medians become a line of its device's history, benchmarks/results/<device>/*.jsonl.

    skylapse bench history bench-results/denoise.json

Only a whole run of a clean commit that this repository has goes in; --anyway takes others, and marks them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ...runtime.commands.options import Parser
from ...runtime.media.writer import replaced_when_complete
from ..record import HISTORY_SCHEMA, HistoryLine, Point, Report, read_any, read_history, to_json
from .compare import figures
from .trees import ROOT, commit_of, git

RESULTS = ROOT / "benchmarks" / "results"


def history(arguments: Sequence[str]) -> int:
    parser = Parser(prog="skylapse bench history", description="put result files into the history of their device")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--anyway", action="store_true", help="also what is not publishable, marked so")
    options = parser.parse_args(arguments)
    lines = [(path, line_of(read_any(path), path.name, options.anyway)) for path in options.files]
    for path, line in lines:  # once all of them were found good
        where = options.results / slug(line.device) / f"{line.benchmark}.jsonl"
        append(where, line)
        marked = "" if line.unpublishable is None else f", not publishable: {line.unpublishable}"
        print(f"{path.name}: {len(line.figures)} figures of {line.commit or 'no commit'} into {where}{marked}")
    return 0


def line_of(report: Report, name: str, anyway: bool = False, root: Path = ROOT) -> HistoryLine:
    """ValueError where it is not publishable and nobody asked for it anyway."""
    why = why_unpublishable(report, root)
    if why is not None and not anyway:
        raise ValueError(f"{name} must be a whole run of a clean commit, got {why} (--anyway takes it, marked)")
    commit = str(report.machine.get("commit") or "")
    return HistoryLine(
        schema=HISTORY_SCHEMA,
        benchmark=report.benchmark,
        commit=commit,
        date=(git("show", "-s", "--format=%cI", commit, root=root) if commit else None) or "",
        device=str(report.machine.get("device") or report.suite),
        threads=int(report.machine.get("threads") or 0),
        quick=report.quick,
        unpublishable=why,
        figures={
            key: Point(
                unit=it.unit,
                better=it.better,
                median=it.spread.median,
                low=it.spread.low,
                high=it.spread.high,
                n=it.spread.n,
            )
            for key, it in figures(report).items()
        },
    )


def why_unpublishable(report: Report, root: Path = ROOT) -> str | None:
    """None where others can have the tree that was measured, and all of the run."""
    if report.partial is not None:
        return f"a partial run ({report.partial})"
    if not report.machine.get("commit"):
        return "no commit"
    if report.machine.get("dirty") is not False:
        return "a tree with changes that no commit has"
    if commit_of(str(report.machine["commit"]), root) is None:
        return f"commit {report.machine['commit']}, which this repository has not"
    return None


def append(path: Path, line: HistoryLine) -> None:
    """The whole file is replaced, so that no reader finds half a line; the same run is not taken twice."""
    held = read_history(path) if path.exists() else []
    if line in held:
        raise ValueError(f"{path.name} must not have the same run twice, got one of {line.commit or 'no commit'} again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as unfinished:
        unfinished.write_text("".join(to_json(one) + "\n" for one in [*held, line]))


def slug(device: str) -> str:
    """A folder's name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"
