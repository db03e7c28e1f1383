"""`bench gate`: this tree against another one on the same machine, in turns, by CPU time; 1 where it is slower.

    skylapse bench gate                                 # against where this branch left main
    skylapse bench gate --baseline v0.1 --suite decode
    skylapse bench gate --baseline ../other-checkout --threshold 3%

A workload is slower where the interval of its ratio lies above 1 and its median above 1 + threshold, twice: fresh
processes have to find the same.
Exit status: 0 nothing is slower, 1 something is, 2 a mistake in what was asked, 3 there is nothing to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...runtime.commands.options import Parser
from .percent import percent
from .rule import Block, Finding, decide
from .statistics import LEAST
from .trees import Broken, Tree, merge_base, processes, trees

WORKLOADS = ("denoise/exact", "denoise/high", "engine/mixed", "decode/eager", "text/encode", "kernels/attention")
NOTHING_TO_COMPARE = 3
ROUNDS = 8
LIMIT_S = 60.0  # of rounds; the processes' start comes on top


def gate(arguments: Sequence[str]) -> int:
    from ..sheet import Sheet, note

    options = _parser().parse_args(arguments)
    names = chosen(options.suite)
    if options.rounds < LEAST:
        raise ValueError(f"--rounds must be at least {LEAST}, got {options.rounds}")
    baseline = options.baseline or merge_base()
    if baseline is None:
        note("not gated: there is no commit to compare with; a shallow history, or no repository")
        return NOTHING_TO_COMPARE
    settings = {"baseline": baseline, "threshold": options.threshold, "rounds": options.rounds}
    sheet = Sheet("gate", options, settings)
    found: dict[str, Finding] = {}
    try:
        with sheet.running(), trees(baseline) as (base, ours):
            gated = Gated((base, ours), options.model, names)
            found = decide(gated.opened, gated.able, options.rounds, options.threshold, options.limit)
            for name, reason in gated.missing.items():
                if reason.startswith(base.name):
                    sheet.missing(f"gate/{name}", reason)
                else:
                    sheet.failed(f"gate/{name}", reason)
            for name, finding in found.items():
                samples = finding.decisive
                sheet.measured(f"gate/{name}", "cpu_s", samples.new, shown=False)
                ratios = [new / old for old, new in zip(samples.old, samples.new, strict=True)]
                sheet.compared(f"gate/{name}", "tree", "base", ratios, shown=False)
            print(table(found, base))
    except Broken as error:
        if error.tree is None or error.tree == ours.name:
            raise ValueError(f"baseline and tree must both run, got: {error}") from error
        note(f"not gated: {error}")
        return NOTHING_TO_COMPARE
    if sheet.status:
        return sheet.status
    return int(any(finding.verdict == "worse" for finding in found.values()))


class Gated:
    """Both trees, and fresh processes of them as often as they are asked for; slower: for who tests the gate."""

    def __init__(self, both: tuple[Tree, Tree], model: str, names: Sequence[str], slower: float = 0.0) -> None:
        self.both, self.model, self.slower = both, model, slower
        self.names: list[str] = list(names)
        self.missing: dict[str, str] = {}  # what one of the trees cannot do, known once they were opened

    @contextmanager
    def opened(self) -> Iterator[Block]:
        with processes(self.both, self.model, self.names) as pair:
            self.missing |= pair.ready()
            self.names = [name for name in self.names if name not in self.missing]
            if not self.names:
                raise Broken(self.both[0].name, f"no workload runs on both trees: {self.missing}")

            def block(name: str, backwards: bool) -> tuple[float, float]:
                spent = [0.0, 0.0]
                for side in (1, 0, 0, 1) if backwards else (0, 1, 1, 0):
                    spent[side] += pair.run(side, name, self.slower if side else 0.0)
                return spent[0] / 2, spent[1] / 2

            yield block

    def able(self) -> list[str]:
        return self.names


def chosen(asked: Sequence[str] | None) -> list[str]:
    """Workloads by their names or by the words before the stroke."""
    for word in asked or []:
        if not any(word in (name, name.partition("/")[0]) for name in WORKLOADS):
            suites = dict.fromkeys(name.partition("/")[0] for name in WORKLOADS)
            raise ValueError(f"--suite must be one of {', '.join((*suites, *WORKLOADS))}, got {word!r}")
    return [name for name in WORKLOADS if not asked or {name, name.partition("/")[0]} & set(asked)]


def table(found: dict[str, Finding], base: Tree) -> str:
    words = {"worse": "slower", "better": "faster"}
    lines = [f"{'CPU time of this tree over ' + base.name:<44}{'ratio':>7}   interval of 95 %   rounds"]
    for name, finding in found.items():
        change = finding.decisive.change()
        interval = f"{change.low:.3f} to {change.high:.3f}" if change.low is not None else "none"
        looks = "" if finding.second is None else f" (a second look; the first one: {finding.first.change().ratio:.3f})"
        verdict = words.get(finding.verdict, finding.verdict) + looks
        lines.append(f"{name:<44}{change.ratio:>7.3f}   {interval:<17}{len(finding.decisive.old):>6}   {verdict}")
    return "\n".join(lines)


def _parser() -> Parser:
    from ..sheet import suite_parser

    parser = suite_parser("gate", (__doc__ or "").partition(": ")[2].partition("\n")[0], limit=LIMIT_S)
    option = parser.add_argument
    option("--baseline", metavar="REV|FOLDER", help="default: where this branch left main, or the commit before")
    option("--suite", action="append", metavar="NAME", help="some of the workloads; may be given again")
    option("--threshold", type=percent, default=0.05, metavar="P", help="the least change that counts; default: 5%%")
    option("--rounds", type=int, default=ROUNDS, metavar="N", help=f"A B B A each; default: {ROUNDS}, more if unclear")
    return parser


if __name__ == "__main__":
    sys.exit(gate(sys.argv[1:]))
