"""`skylapse bench NAME ...`, which is `python -m skylapse.benchmarks NAME ...`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ..runtime.commands.options import Parser
from ..runtime.core.config import Settings

# Name -> (the file whose function of this name runs it, what it does). Each has options of its own.
BENCHMARKS = {
    "kernels": ("kernels.command", "check every kernel against float64, then measure it beside its peers"),
    "denoise": ("suites.denoise", "a denoising step by shape and cache, eager and compiled; --profile"),
    "decode": ("suites.decode", "every decoder that is here, beside diffusers'"),
    "engine": ("suites.engine", "mixed traffic through one engine, by scheduling policy"),
    "quality": ("suites.quality", "how far caches, quantised weights and fewer steps move a clip"),
    "startup": ("suites.startup", "from a cold process to the first step"),
    "neighbours": ("suites.neighbours", "requests on a CPU that others use too, by number of threads"),
    "memory": ("suites.memory", "peak bytes by size and length, beside what was predicted"),
    "fits": ("fits.command", "which published model fits at which size on which card, from shapes alone; needs no GPU"),
    "peers": ("peers.command", "whole requests beside diffusers and its caches, pair by pair"),
    "serve": ("load.command", "load on a server of the OpenAI Videos API: goodput, latencies, a capacity plan"),
    "goodput": ("load.goodput", "our service and a plain Ray Serve + diffusers one under the same traces"),
    "all": ("suites.everything", "every suite that needs no server"),
    "compare": ("track.compare", "two result files, figure by figure"),
    "gate": ("track.gate", "this tree against another one, in turns; fails where it is slower"),
    "history": ("track.history", "put a result file into the history of its device"),
    "report": ("report.command", "a page of a folder of results, with plots"),
    "simulate": ("simulate.command", "a service of many GPUs, by the real scheduler and measured steps"),
    "pick": ("kernels.pick", "which backends a result file makes the default"),
}

ENTRIES = {"all": "everything"}  # where the function cannot have the command's name


def bench(arguments: Sequence[str], settings: Settings) -> int:
    """Hand over to one of them, with all that follows its name."""
    if arguments and arguments[0] in BENCHMARKS:
        name, *rest = arguments
        module = import_module(f".{BENCHMARKS[name][0]}", __package__)
        status: int = getattr(module, ENTRIES.get(name, name))(rest)
        return status
    parser = Parser(prog="skylapse bench", description="Measure skylapse beside its peers.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, (_, what) in BENCHMARKS.items():
        commands.add_parser(name, help=what, add_help=False)
    parser.parse_args(arguments)
    return 0
