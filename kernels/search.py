"""How a launch is chosen: candidates are compiled, checked against float64 and timed, and the fastest right one wins.

An operation brings `candidates(arch) -> list[Search]`; tune.py runs them. Nothing here happens at a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .inspect import Compiled, compile_for
from .launches import options
from .toolchain import Shipped

Launch = Mapping[str, Any]

# Greatest distance of an element from the formula's, in units of the result's root mean square, as in the tests.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
FLUSHED_BYTES = 512 * 2**20  # written before each timed call: more than any L2 cache holds
FLUSHES = 4  # times: at 8 TB/s a quarter of a millisecond, twice what a launch takes the host
ROUNDS, WARM_ROUNDS = 30, 3
BETTER = 0.98  # of the committed launch's time: what is closer is noise, and changes nothing
_known: dict[str, Compiled] = {}


@dataclass(frozen=True)
class Call:
    """Inputs of an operation, and what they give."""

    run: Callable[[Launch], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]  # float64, on the CPU


@dataclass(frozen=True)
class Search:
    """A row of a JSON that is to be found."""

    name: str  # of the JSON: adaln for adaln.json
    op: str
    row: Mapping[str, Any]  # the row without its launch: lists say whom it serves, numbers how wide and long, null: any
    launches: Sequence[Launch]
    compiled: Callable[[Launch], Sequence[Shipped]]  # everything that a launch makes of the kernel
    checked: Callable[[torch.device], Call]  # small and ragged
    timed: Callable[[torch.device], Call]  # as long as the row's calls are
    asked: tuple[str, ...] = ()  # entries of a launch that callers ask for: rows that differ in them stand side by side

    @property
    def words(self) -> str:
        return ", ".join(f"{name} {_word(value)}" for name, value in self.row.items() if name != "ops")


@dataclass(frozen=True)
class Result:
    """What became of a candidate."""

    launch: Launch
    registers: int
    spill_bytes: int
    shared_bytes: int
    faults: tuple[str, ...] = ()  # why it is out
    microseconds: float | None = None
    chosen: bool = field(default=False)


def compile_candidates(search: Search, arch: int) -> list[Result]:
    """Of all that a launch makes of the kernel, the worst; neither a GPU nor a driver is asked for anything."""
    results = []
    for launch in search.launches:
        try:
            rows = [_compiled(item, arch) for item in search.compiled(launch)]
        except Exception as error:  # a compiler's passes fail with whatever they like; the candidate is out, and told
            results.append(Result(launch, 0, 0, 0, (f"{type(error).__name__}: {' '.join(str(error).split())[:80]}",)))
            continue
        faults = dict.fromkeys(fault for row in rows for fault in row.faults)
        numbers = [max(getattr(row, name) for row in rows) for name in ("registers", "spill_bytes", "shared_bytes")]
        results.append(Result(launch, numbers[0], numbers[1], numbers[2], tuple(faults)))
    return results


def _compiled(item: Shipped, arch: int) -> Compiled:
    """Buckets of length share what they compile."""
    key = repr((arch, item.op, item.types, item.constants, options(vars(item))))
    if key not in _known:
        _known[key] = compile_for(item, arch)
    return _known[key]


def choose(search: Search, results: Sequence[Result], committed: Launch | None, device: torch.device) -> list[Result]:
    """With what was wrong and how long each took; the fastest is chosen, the committed one where it is as fast."""
    call, results = search.checked(device), [*results]
    expected = call.expected()
    for i, result in enumerate(results):
        if not result.faults and (fault := _fault(call, expected, result.launch)) is not None:
            results[i] = replace(result, faults=(fault,))
    right = [i for i, result in enumerate(results) if not result.faults]
    if not right:
        return results
    call = search.timed(device)
    times = timed([lambda launch=results[i].launch: call.run(launch) for i in right], device)  # type: ignore[misc]
    for i, seconds in zip(right, times, strict=True):
        results[i] = replace(results[i], microseconds=1e6 * seconds)
    best = min(right, key=lambda i: results[i].microseconds or 0)
    for i in right:
        if results[i].launch == committed and BETTER * (results[i].microseconds or 0) <= (
            results[best].microseconds or 0
        ):
            best = i
    results[best] = replace(results[best], chosen=True)
    return results


def timed(runs: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each on a GPU: warm, their turns interleaved, with nothing of the inputs in its L2 cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(WARM_ROUNDS + ROUNDS):
        events = []
        for run in runs:
            for _ in range(FLUSHES):  # the host is ahead by the time that this takes, so no launch is waited for
                flushed.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
        if number >= WARM_ROUNDS:
            for taken, (start, end) in zip(seconds, events, strict=True):
                taken.append(1e-3 * start.elapsed_time(end))
    return [median(taken) for taken in seconds]


def _fault(call: Call, expected: Sequence[Tensor], launch: Launch) -> str | None:
    """What a candidate computes wrongly, in three runs, since races do not show each time, into memory full of NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch fills what is not initialised
    try:
        for _ in range(3):
            for actual, right in zip(call.run(launch), expected, strict=True):
                size = right.square().mean().sqrt()
                worst = float((actual.cpu().double() - right).abs().max() / size)
                if not worst <= TOLERANCES[actual.dtype]:
                    return f"wrong by {worst:.2g}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return None


def _word(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else "any" if value is None else str(value)
