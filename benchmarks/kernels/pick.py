"""From results to kernels/measured/attention.json: the attention that wins each kind of call on an architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...kernels.attention_backends import MEASURED
from ...kernels.backends import CHOICES
from ...runtime.commands.options import Parser
from ..record import KernelReport, KernelResult, Row, read_any
from .attention import call_in
from .checks import LOSSY

Kind = tuple[int, str]  # (head size, one of attention_backends.KINDS)


def pick(arguments: Sequence[str]) -> int:
    """Print each file's winners, and what they rest on; `--write` makes them the runtime's defaults."""
    parser = Parser(prog="skylapse bench pick", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="results of `bench kernels --suite gpu`, or of a lease"
    )
    parser.add_argument(
        "--write", action="store_true", help="put them into the package, in place of that architecture's"
    )
    options = parser.parse_args(arguments)
    for path in options.files:
        report = read_any(path)
        if not isinstance(report, KernelResult):
            raise ValueError(f"{path.name} must compare kernels, got a result of {report.benchmark}")
        capability, times = attention_times(report)
        print(
            f"sm_{capability}: {report.machine.get('device')}, commit {report.machine.get('commit')}; of triton's time:"
        )
        for (head_size, kind), found in sorted(times.items()):
            told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ranked(found))
            print(f"  head size {head_size}, {kind}: {told}")
        if options.write:
            write_measured(report, capability, times)
    return 0


def attention_times(report: KernelResult) -> tuple[int, dict[Kind, dict[str, float]]]:
    """(compute capability, each exact backend's time in units of ours, by kind: the geometric mean of its comparisons).

    Only who took part in every comparison of a kind and has no wrong check counts. ValueError where the file cannot
    tell.
    """
    capability = report.machine.get("capability")
    if report.suite == "cpu" or not isinstance(capability, int):
        raise ValueError(f"the result must be of a GPU, got suite {report.suite!r}")
    if isinstance(report, KernelReport) and report.partial is not None:  # of a lease each call is whole by itself
        raise ValueError(f"the result must be whole, got a partial one ({report.partial})")
    kinds: dict[Kind, list[Row]] = {}
    for row in report.rows:
        if row.op in ("attention", "attention_ragged"):
            call = call_in(row.case)
            kinds.setdefault((call.head_size, call.kind), []).append(row)
    if not kinds:
        raise ValueError("the result must have comparisons of attention, got none")
    checks = [check for check in report.checks if check.op.partition("=")[0] == "attention" and check.status != "ok"]
    wrong = {check.op.partition("=")[2] or "triton" for check in checks}
    names = [name for name in CHOICES["attention"] if name not in wrong and name not in LOSSY]
    times = {kind: _times(rows, names) for kind, rows in kinds.items()}
    if empty := [kind for kind, found in times.items() if not found]:
        raise ValueError(f"no backend of attention was right and took part in every comparison of {empty[0]}")
    return capability, times


def _times(rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    times = {}
    for name in names:
        ratios = []
        for row in rows:
            it = row.contestants.get(name)
            if it is not None and it.status == "ok":
                ratios.append(1.0 if name == row.ours else it.ratio.median if it.ratio is not None else math.nan)
        if len(ratios) == len(rows) and not math.isnan(sum(ratios)):
            times[name] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return times


def ranked(times: dict[str, float]) -> list[tuple[str, float]]:
    """The fastest first."""
    return sorted(times.items(), key=lambda item: item[1])


def write_measured(report: KernelResult, capability: int, times: dict[Kind, dict[str, float]]) -> None:
    """Into measured/attention.json, a line an entry; what was measured on this architecture before leaves it."""
    kept = [entry for entry in json.loads(MEASURED.read_text()) if entry["capability"] != capability]
    made: list[dict[str, Any]] = [
        {
            "capability": capability,
            "head_size": head_size,
            "kind": kind,
            "fastest": [name for name, _ in ranked(found)],
            "of_triton": {name: round(ratio, 3) for name, ratio in ranked(found)},
            "device": report.machine.get("device"),
            "commit": report.machine.get("commit"),
        }
        for (head_size, kind), found in times.items()
    ]
    entries = sorted([*kept, *made], key=lambda entry: (entry["capability"], entry["head_size"], entry["kind"]))
    MEASURED.write_text("[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in entries) + "\n]\n")
