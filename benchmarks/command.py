"""`skylapse bench NAME ...`, which is `python -m skylapse.benchmarks NAME ...`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ..runtime.config import Settings
from ..runtime.options import Parser

# Name -> (the file whose function of this name runs it, what it does). Each has options of its own.
BENCHMARKS = {
    "kernels": ("kernels.command", "check every kernel against float64, then measure it beside its peers"),
    "pick": ("kernels.pick", "which backends a result file makes the default"),
}


def bench(arguments: Sequence[str], settings: Settings) -> int:
    """Hand over to one of them, with all that follows its name."""
    if arguments and arguments[0] in BENCHMARKS:
        name, *rest = arguments
        module = import_module(f".{BENCHMARKS[name][0]}", __package__)
        status: int = getattr(module, name)(rest)
        return status
    parser = Parser(prog="skylapse bench", description="Measure skylapse beside its peers.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for name, (_, what) in BENCHMARKS.items():
        commands.add_parser(name, help=what, add_help=False)
    parser.parse_args(arguments)
    return 0
