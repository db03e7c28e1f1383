"""The gate on trial: a slowdown of 10 % that was put in, and no change at all, again and again.

    python -m skylapse.benchmarks.track.prove --runs 20 --out benchmarks/results/cpu/gate_proof.json

Each run is a gate with processes of its own, of this tree against itself; in every other one the new side burns another
10 % of the CPU time that its workload took. 0 where at most 1 of 20 is missed and at most 1 of 20 is flagged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..sheet import Sheet, note, suite_parser
from .gate import ROUNDS, Gated, chosen
from .percent import percent
from .rule import decide
from .trees import ROOT, trees


def prove(arguments: Sequence[str]) -> int:
    parser = suite_parser("prove", "the gate on trial")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="of each kind; default: 20")
    parser.add_argument("--slower", type=percent, default=0.10, metavar="P", help="default: 10%%")
    parser.add_argument("--threshold", type=percent, default=0.05, metavar="P", help="the gate's; default: 5%%")
    parser.add_argument("--suite", action="append", metavar="NAME", help="workloads; default: denoise/exact")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"the gate's; default: {ROUNDS}")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        raise ValueError(f"--runs must be at least 1, got {options.runs}")
    names = chosen(options.suite or ["denoise/exact"])
    settings = {"slower": options.slower, "threshold": options.threshold, "rounds": options.rounds, "workloads": names}
    sheet = Sheet("gate_proof", options, settings)
    flagged: dict[str, list[float]] = {"slower": [], "same": []}
    ratios: dict[str, list[float]] = {f"{kind}/{name}": [] for kind in flagged for name in names}
    with sheet.running(), trees(str(ROOT)) as both:
        try:
            for run in range(options.runs):
                for kind in flagged:
                    sheet.check_time(f"run {run + 1}, {kind}")
                    gated = Gated(both, options.model, names, options.slower if kind == "slower" else 0.0)
                    found = decide(gated.opened, gated.able, options.rounds, options.threshold)
                    flagged[kind].append(float(any(one.verdict == "worse" for one in found.values())))
                    for name, one in found.items():
                        ratios[f"{kind}/{name}"].append(one.decisive.change().ratio)
                    note(f"run {run + 1}, {kind}: " + ", ".join(f"{n} {f.verdict}" for n, f in found.items()))
        finally:
            if flagged["same"]:
                sheet.measured("gate_proof/caught", "share", flagged["slower"], "higher")
                sheet.measured("gate_proof/false_alarms", "share", flagged["same"], "lower")
                for name, values in ratios.items():
                    sheet.measured(f"gate_proof/ratio/{name}", "x", values, "neither")
    if sheet.status:
        return sheet.status
    caught, alarms = sum(flagged["slower"]), sum(flagged["same"])
    print(f"{caught:g} of {options.runs} slowdowns caught, {alarms:g} of {options.runs} times flagged without a change")
    return int(caught < 0.95 * options.runs or alarms > 0.05 * options.runs)


if __name__ == "__main__":
    sys.exit(prove(sys.argv[1:]))
