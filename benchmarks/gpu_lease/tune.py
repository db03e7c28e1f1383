"""Call 7: search launches of this architecture's kernels, the most used first, as long as the time lasts.

python -m skylapse.benchmarks.gpu_lease --apply-tune FOLDER     # at home: write what was found into kernels/*.json
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import cache, partial
from multiprocessing import get_context

import torch

from ...kernels import launches, rows
from ...kernels.doctor import driver
from ...kernels.search import Result, Search, choose, compile_candidates
from ...kernels.toolchain import triton
from ...kernels.tune import searches, with_committed
from ..harness import Missing
from .case import Case, Context
from .drive import main
from .lines import Launch, Line, Note, measured

# The operations that take the most of a step first; those in fp32 or of another width than Wan's come last.
FIRST = ("attention", "qk_norm_rope", "linear_quantized", "gated_residual_adaln", "gated_residual", "adaln", "rms_norm")
DRY_ARCH = 90
COMPILERS = 12  # processes at most that compile beside each other: a candidate takes one some 5 s, and there are dozens
Prepare = Callable[[Search, int], Iterable[Result]]  # a search and how many of its candidates -> what was compiled


def cases(context: Context) -> Iterator[Case]:
    arch = DRY_ARCH if context.dry else launches.arch_of(context.device)
    if triton is None:
        yield Case("searches", _no_triton)
        return
    found = sorted(searches(arch), key=_rank)
    if context.dry:  # one of the smallest, and no more than its first candidate
        found = [search for search in found if search.op == "rms_norm"][:1]
    beside = Compilers(arch, context.device)
    try:
        for search in found:
            prepare = partial(_here, arch) if context.dry else beside.prepare
            run = partial(_search, context, arch, search, prepare)
            yield Case(f"{search.op}: {words(search)}", run, limit_s=400.0)
    finally:
        beside.close()


def _no_triton() -> list[Line]:
    raise Missing("Triton cannot be imported")


def _rank(search: Search) -> tuple[int, int, int]:
    """Rank Wan's head size, bf16 and long calls first, within the order of operations."""
    of_op = FIRST.index(search.op) if search.op in FIRST else len(FIRST)
    width, longest = search.row.get("width"), search.row.get("longest")
    unusual = "fp32" in search.row.get("dtypes", []) or (search.op == "attention" and width != 128)
    return int(unusual), of_op, 0 if longest is None else 1


def words(search: Search) -> str:
    asked = ", ".join(f"{name} {search.launches[0].get(name)}" for name in search.asked)
    return search.words + (f", {asked}" if asked else "")


def _search(context: Context, arch: int, search: Search, prepare: Prepare) -> Iterator[Line]:
    """Yield the candidates' registers and times, and the row that is to be written."""
    search, current = with_committed(search, arch)
    name = f"{search.op}, {words(search)}"
    results = list(prepare(search, 1 if context.dry else len(search.launches)))
    if not context.dry:  # what times has nothing to run there
        results = choose(search, results, current, context.device)
    yield Note(name=name, value=[asdict(result) for result in results])
    times = {str(dict(r.launch)): r.microseconds for r in results if r.microseconds is not None}
    for result in results:
        if result.chosen and result.microseconds is not None:
            facts = f"{torch.cuda.get_device_name(context.device)}, driver {driver()}"
            versions = f"torch {torch.__version__}, Triton {triton.__version__}"
            row = {**search.row, "launch": dict(result.launch), "measured": f"{facts}, {versions}"}
            yield Launch(name=search.name, arch=arch, row=row, asked=search.asked)
            yield measured(f"tune/{name}/chosen", "s", [result.microseconds / 1e6])
            if current is not None and (before := times.get(str(dict(current)))) is not None:
                yield measured(f"tune/{name}/committed", "s", [before / 1e6])


# --- compiling --------------------------------------------------------------------------------------------------------


def _here(arch: int, search: Search, count: int) -> list[Result]:
    return compile_candidates(replace(search, launches=search.launches[:count]), arch)


class Compilers:
    """Processes that compile candidates and run each once, so that Triton's cache on the disk has them."""

    def __init__(self, arch: int, device: torch.device) -> None:
        self.arch, self.device = arch, device
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, search: Search, count: int) -> list[Result]:
        if self._pool is None:
            workers = max(1, min(COMPILERS, (os.cpu_count() or 1) - 2))
            self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        asked = [(self.arch, search.op, words(search), str(self.device), number) for number in range(count)]
        try:
            return [*self._pool.map(prepared, *zip(*asked, strict=True))]
        except BrokenProcessPool:
            self.close()  # one of them died; the next search gets others
            raise

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def prepared(arch: int, op: str, name: str, device: str, number: int) -> Result:
    """Compile a candidate of a search, for its registers and then by a first run; in a process of its own."""
    search, _ = with_committed(_known(arch)[op, name], arch)
    launch = search.launches[number]
    result = compile_candidates(replace(search, launches=[launch]), arch)[0]
    if not result.faults:
        try:
            search.checked(torch.device(device)).run(launch)
        except Exception as error:  # as `choose` would find; it is told here, and the run is spared
            return replace(result, faults=(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}",))
    return result


@cache
def _known(arch: int) -> dict[tuple[str, str], Search]:
    return {(search.op, words(search)): search for search in searches(arch)}


def apply(found: Sequence[Launch]) -> int:
    """Write rows into the JSON files of this checkout."""
    for launch in found:
        rows.rewrite(launches.FOLDER / f"{launch.name}.json", launch.arch, [launch.row], launch.asked)
        print(f"{launch.name}.json, sm_{launch.arch}: {launch.row['launch']}")
    return int(not found)


if __name__ == "__main__":
    sys.exit(main("tune"))
