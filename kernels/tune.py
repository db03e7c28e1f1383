"""Finds the launches of this machine's GPU and writes them into the JSON files beside the kernels.

    python -m skylapse.kernels.tune [--op adaln ...] [--shape 5120x32760] [--out FILE]
    python -m skylapse.kernels.tune --dry-run [--arch 90 ...] [--op adaln ...]

For each operation, dtype, width and length the candidates are compiled (what spills or exceeds the shared memory is
out), checked against float64, and timed in turns with a cold L2 cache. The rows of this architecture alone are written,
each with the device and versions that it was measured on. --dry-run compiles and prints; it needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import launches, rows
from .doctor import driver
from .search import Launch, Result, Search, choose, compile_candidates
from .toolchain import ARCHITECTURES, MISSING, triton


def searches(arch: int, ops: Iterable[str] = (), shape: Sequence[int] = ()) -> list[Search]:
    """What there is to find on an architecture; of these operations, and of the rows that serve this shape, alone."""
    found: list[Search] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if "\ndef candidates(arch: int) -> list[Search]:" in path.read_text():
            found += import_module(f".{path.stem}", __package__).candidates(arch)
    ops = {*ops}
    unknown = ops - {search.op for search in found}
    if unknown:
        raise ValueError(f"no such operation: {', '.join(sorted(unknown))}")
    return _serving([search for search in found if not ops or search.op in ops], shape)


def with_committed(search: Search, arch: int) -> tuple[Search, Launch | None]:
    """The search, with the launch that serves its calls now among the candidates, and that launch."""
    table = json.loads((launches.FOLDER / f"{search.name}.json").read_text()).get(str(arch), [])
    row = rows.serving(table, {**search.row, "launch": search.launches[0]}, search.asked)
    if row is None or row["launch"] in search.launches:
        return search, row and row["launch"]
    return replace(search, launches=[row["launch"], *search.launches]), row["launch"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m skylapse.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", default=[], help="these operations alone")
    parser.add_argument("--shape", type=_shape, default=(), help="WIDTH or WIDTHxLENGTH: the rows that serve it alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="every candidate and its time, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates and print them")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, help="with --dry-run: these architectures"
    )
    options = parser.parse_args(arguments)
    if triton is None:
        parser.error(f"Triton cannot be imported: {MISSING}")
    if options.arch and not options.dry_run:
        parser.error("--arch is of --dry-run: what is measured is this machine's GPU")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("launches are measured on a GPU, and torch finds none here; --dry-run compiles without one")
    device = None if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    architectures = options.arch or [ARCHITECTURES[0] if device is None else launches.arch_of(device)]
    try:
        found = [(arch, search) for arch in architectures for search in searches(arch, options.op, options.shape)]
    except ValueError as error:
        parser.error(str(error))
    facts = {"triton": triton.__version__, "torch": torch.__version__} | (_facts(device) if device else {})
    told, left = [], []
    for arch, search in found:
        search, current = with_committed(search, arch)
        results = compile_candidates(search, arch)
        if device is not None:
            results = choose(search, results, current, device)
            chosen = [result for result in results if result.chosen]
            left += (
                [] if chosen else [f"{search.op} sm_{arch}, {search.words}: no candidate is right, and the row stays"]
            )
            for result in chosen:
                _write(search, arch, result, facts)
        print(f"{search.op} sm_{arch}, {search.words}", *_lines(results), sep="\n", flush=True)
        told.append({"op": search.op, "arch": arch, "row": search.row, "candidates": [*map(asdict, results)]})
    if options.out is not None:
        options.out.write_text(json.dumps(facts | {"searches": told}, indent=1) + "\n")
    print(*left, sep="\n", end="\n" if left else "", file=sys.stderr)
    return 1 if left else 0


def _write(search: Search, arch: int, result: Result, facts: dict[str, Any]) -> None:
    """After each search, so that one that is broken off leaves what it has found."""
    measured = f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, Triton {facts['triton']}"
    row = {**search.row, "launch": dict(result.launch), "measured": measured}
    rows.rewrite(launches.FOLDER / f"{search.name}.json", arch, [row], search.asked)
    launches.table.cache_clear()


def _serving(found: list[Search], shape: Sequence[int]) -> list[Search]:
    """Of each kind of call the first row that is wide and long enough; all where no shape is given."""
    if not shape:
        return found
    least: dict[str, tuple[list[float], Search]] = {}
    for search in found:
        bounds = rows.bounds(search.row)
        kind = json.dumps([search.op, [v for v in search.row.values() if isinstance(v, list)]])
        kind += json.dumps([search.launches[0].get(name) for name in search.asked])
        if all(side <= bound for side, bound in zip(shape, bounds, strict=False)):
            least[kind] = min(least.get(kind, (bounds, search)), (bounds, search), key=lambda item: item[0])
    if not least:
        raise ValueError(f"no row serves the shape {'x'.join(map(str, shape))}")
    return [search for _, search in least.values()]


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split("x"))
    if len(numbers) > 2 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be WIDTH or WIDTHxLENGTH, got {text!r}")
    return numbers


def _lines(results: Iterable[Result]) -> Iterator[str]:
    for result in results:
        words = " ".join(f"{name} {value}" for name, value in result.launch.items())
        numbers = f"{result.registers:4d} registers {result.spill_bytes:5d} spilt {result.shared_bytes:7d} shared"
        time = "" if result.microseconds is None else f"{result.microseconds:10.1f} us"
        end = "  chosen" if result.chosen else f"  {', '.join(result.faults)}"
        yield f"  {words:80s}{numbers}{time}{end}".rstrip()


def _facts(device: torch.device) -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name(device), "driver": driver()}


if __name__ == "__main__":
    sys.exit(main())
