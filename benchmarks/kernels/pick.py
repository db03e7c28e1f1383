"""From a result file to `MEASURED` in kernels/backends.py: the attention that wins on that architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...kernels.backends import CHOICES
from ...runtime.options import Parser
from ..record import KernelReport, KernelResult, read_any
from .checks import LOSSY


def pick(arguments: Sequence[str]) -> int:
    """Print the entry of each file, and what it rests on."""
    parser = Parser(prog="skylapse bench pick", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="results of `bench kernels --suite gpu`, or of a lease"
    )
    for path in parser.parse_args(arguments).files:
        report = read_any(path)
        if not isinstance(report, KernelResult):
            raise ValueError(f"{path.name} must compare kernels, got a result of {report.benchmark}")
        capability, times = attention_times(report)
        ranked = sorted(times.items(), key=lambda item: item[1])
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ranked)
        print(f'MEASURED["attention"][{capability}] = "{ranked[0][0]}"')
        print(f"# {report.machine.get('device')}, commit {report.machine.get('commit')}; of triton's time: {told}")
    return 0


def attention_times(report: KernelResult) -> tuple[int, dict[str, float]]:
    """(compute capability, each exact backend's time in units of ours: the geometric mean over all comparisons).

    Only who took part in every comparison and has no wrong check counts. ValueError where the file cannot tell.
    """
    capability = report.machine.get("capability")
    if report.suite == "cpu" or not isinstance(capability, int):
        raise ValueError(f"the result must be of a GPU, got suite {report.suite!r}")
    if isinstance(report, KernelReport) and report.partial is not None:  # of a lease each call is whole by itself
        raise ValueError(f"the result must be whole, got a partial one ({report.partial})")
    rows = [row for row in report.rows if row.op in ("attention", "attention_ragged")]
    if not rows:
        raise ValueError("the result must have comparisons of attention, got none")
    checks = [check for check in report.checks if check.op.partition("=")[0] == "attention" and check.status != "ok"]
    wrong = {check.op.partition("=")[2] or "triton" for check in checks}
    times = {}
    for name in CHOICES["attention"]:
        ratios = []
        for row in rows:
            it = row.contestants.get(name)
            if it is not None and it.status == "ok":
                ratios.append(1.0 if name == row.ours else it.ratio.median if it.ratio is not None else math.nan)
        if len(ratios) == len(rows) and name not in wrong and name not in LOSSY and not math.isnan(sum(ratios)):
            times[name] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    if not times:
        raise ValueError("no backend of attention was right and took part in every comparison")
    return capability, times
