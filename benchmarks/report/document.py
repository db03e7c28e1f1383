"""docs/benchmarks.md out of the committed results, and the figures that other documents take from them.

    python -m skylapse.benchmarks.report.document            # writes docs/benchmarks.md, fills README.md, docs/*.md
    python -m skylapse.benchmarks.report.document --check    # writes nothing; 1 where a document would change

How a document takes a figure is told in blocks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...runtime.commands.options import Parser
from ..command import BENCHMARKS
from ..record import SuiteReport
from ..track.compare import figures, reasons
from ..track.trees import ROOT
from .blocks import Blocks
from .load import AnyResult, Found, collect
from .tables import table

PAGE = Path("docs/benchmarks.md")
FILLED = ("README.md", "CONTRIBUTING.md", "docs/*.md")  # but the page itself, which is written as a whole
TITLE = {
    "gate_proof": "The gate on trial",
    "memory_real_width": "How a process grows by a pixel or a token at published widths",
    "goodput": "Our service and a plain Ray Serve + diffusers one",
    "peers": "Whole requests beside diffusers",
}
NOT_COMPARED = (
    ("SGLang (multimodal generation)", "CUDA alone; by `bench serve --url` where a user has it"),
    ("vLLM-Omni", "CUDA alone; its server speaks the Videos API, so `bench serve --url` measures it"),
    ("FastVideo", "CUDA alone; no server of the Videos API was at hand"),
    ("TensorRT-LLM VisualGen", "CUDA alone, with an engine build; by `bench serve --url`"),
    ("xDiT", "spreads one request over several GPUs, of which there was none"),
    ("LightX2V", "CUDA alone, and its fast modes are of checkpoints distilled to few steps, which make other clips"),
    ("flash-attn, xformers", "CUDA alone; contestants of `bench kernels --suite gpu` where they are installed"),
)
HOW = """\
Every figure is a median with its spread, out of a JSON file with every sample, the versions, the commit and whether the
tree was clean. Contestants take turns in one process or on one machine, and ratios are taken round by round, so that a
machine that grows slow for a while does not decide. Peers are run, never quoted.

    skylapse bench all --quick                  # every local suite in under 10 minutes on two cores
    skylapse bench denoise --help               # a suite's own options
    skylapse bench denoise --profile out        # a trace, and a step's time by our own nouns
    skylapse bench serve --url http://127.0.0.1:8000 --loads 0.2,0.4,0.8 --slo p95=30s --plan-for 2.5/s
    skylapse bench goodput                      # our service and a plain Ray Serve + diffusers one, the same traces
    skylapse bench simulate --replicas 8,64,1000
    skylapse bench report bench-results -o page.html --png plots
    skylapse bench compare old.json new.json    # figure by figure; 1 where one is surely worse by more than 5 %
    skylapse bench gate                         # this tree against where its branch left main; 1 where it is slower
    skylapse bench history bench-results/denoise.json
    python -m skylapse.benchmarks.report.document   # this page, and the figures in README.md and docs/

"""
JUDGED = """\
`compare` and `gate` resample pairs (10,000 times, bootstrap of the median, seeded) and take the interval of 95 %.
*Slower* or *worse*: the whole interval lies beyond the threshold. *Same*: all of it lies within. *Unclear*: anything
else, and it is no failure. Where two files have as many samples of a figure these are pairs; otherwise each side is
resampled by itself. Fewer than 6 samples give no interval and so no verdict, unless they are equal to the bit.

The gate counts CPU time of one thread (of the CPU's path, on any machine), in two forked processes that take turns (A
B B A) on one core, and adds rounds to what is unclear. It fails where the whole interval is above 1 and the median
above 1 + threshold, and fresh processes say the same once more: of one and the same tree, two processes can differ by
a percent or two as long as they live. CI runs it where runtime/, kernels/ or compile/ have changed since the branch
left main. `python -m skylapse.benchmarks.track.prove` puts it on trial: 20 gates with a slowdown of 10 % put in, and
20 without a change.
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m skylapse.benchmarks.report.document", description="documents out of results")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="FOLDER", help="of the repository")
    options = parser.parse_args(arguments)
    results = options.root / "benchmarks" / "results"
    blocks, stale = Blocks(results), []
    for path, text in wanted(options.root, blocks):
        if not path.exists() or path.read_text() != text:
            stale.append(path.relative_to(options.root))
            if not options.check:
                path.write_text(text)
    for words in blocks.wrong:
        print(f"cannot be filled: {words}", file=sys.stderr)
    for path in stale:
        print(f"{path}: {'is not what the results say' if options.check else 'written'}")
    return int(bool(blocks.wrong) or (options.check and bool(stale)))


def wanted(root: Path, blocks: Blocks) -> Iterator[tuple[Path, str]]:
    """Each document, and what it should be."""
    yield root / PAGE, document(collect(blocks.results))
    for pattern in FILLED:
        for path in sorted(root.glob(pattern)):
            if path != root / PAGE:
                yield path, blocks.filled(path.read_text(), path.relative_to(root).as_posix())


def document(found: Found) -> str:
    return "\n".join(_parts(found)).rstrip("\n") + "\n"


def _parts(found: Found) -> Iterator[str]:
    yield "# Benchmarks\n"
    yield "<!-- Written by `python -m skylapse.benchmarks.report.document` from benchmarks/results. -->\n"
    yield HOW
    yield "| `skylapse bench` | |\n|---|---|"
    yield from (f"| `{name}` | {what.replace('|', chr(92) + '|')} |" for name, (_, what) in BENCHMARKS.items())
    yield "\n## How a change is judged\n"
    yield JUDGED
    yield "## What was measured\n"
    if found.reports:
        yield "| file | benchmark | device | threads | commit | publishable |\n|---|---|---|---|---|---|"
        yield from (_run(path, report) for path, report in found.reports.items())
    else:
        yield "Nothing yet."
    if not any(report.machine.get("device") != "cpu" for report in found.reports.values()):
        yield "\nNothing was measured on a GPU yet, and nothing is claimed for one."
    if found.fits:
        yield "\nWhat fits on which card, by arithmetic: [memory](../benchmarks/results/memory/README.md)."
    if found.refused:
        yield "\nOlder files are not of this schema, and so not on this page: "
        yield ", ".join(_link(path) for path in found.refused) + "."
    for path, report in found.reports.items():
        yield from _suite(path, report)
    yield "\n## What was not compared\n"
    yield "No published figure stands beside ours: other hardware, checkpoints and clips make it no ratio.\n"
    yield "| engine | why |\n|---|---|"
    yield from (f"| {name} | {why} |" for name, why in NOT_COMPARED)


def _run(path: str, report: AnyResult) -> str:
    machine = report.machine
    verdict = (
        "yes"
        if report.is_publishable
        else "no: " + (f"partial, {report.partial}" if report.partial is not None else "of no clean commit")
    )
    quick = ", quick" if report.quick else ""
    return (
        f"| {_link(path)} | {report.benchmark}{quick} | {machine.get('device')} ({machine.get('processor')}) "
        f"| {machine.get('threads')} | {machine.get('commit')} | {verdict} |"
    )


def _suite(path: str, report: AnyResult) -> Iterator[str]:
    title = TITLE.get(report.benchmark, BENCHMARKS.get(report.benchmark, ("", ""))[1].partition("; ")[0])
    yield f"\n## {report.benchmark}: {title}\n"
    yield f"From {_link(path)}.{'' if report.is_publishable else ' **Not publishable**, for the reason above.'}\n"
    if report.benchmark == "gate_proof":
        yield f"{_counted(report)}\n"
    try:
        yield table(report)
    except ValueError:
        yield "It has no figures."
    lost = reasons(report) | (report.missing if isinstance(report, SuiteReport) else {})
    if lost and report.benchmark != "peers":  # whose table says so itself
        yield "\nNot measured:\n"
        yield from (f"- {name}: {why}" for name, why in list(lost.items())[:20])
        if len(lost) > 20:
            yield f"- and {len(lost) - 20} more in the file"


def _counted(report: AnyResult) -> str:
    """Shares of runs as their numbers."""
    held = {name.rpartition("/")[2]: figure.samples or [] for name, figure in figures(report).items()}
    caught, alarms = held.get("caught", []), held.get("false_alarms", [])
    return (
        f"Slowdowns caught: {sum(caught):.0f} of {len(caught)}. "
        f"Flagged without a change: {sum(alarms):.0f} of {len(alarms)}."
    )


def _link(path: str) -> str:
    return f"[{path}](../benchmarks/results/{path})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
