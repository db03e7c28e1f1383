"""Runs the checks and the comparisons of one suite, and keeps what each came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

import torch

from ..gpu import Reading
from ..harness import Budget, Clock, CudaClock, Missing, Run, WallClock, reason_of, spread_of, take_turns
from ..record import Check, Contestant, Row, Spread
from .case import Case, Make, Suite, copy_of
from .checks import claims, judge

# What can be asked for, and the file that has its cases.
OPS = {
    "attention": "attention",
    "attention_ragged": "attention",
    "patch_embed": "memory_bound",
    "unpatchify": "memory_bound",
    "adaln": "memory_bound",
    "gated_residual": "memory_bound",
    "gated_residual_adaln": "memory_bound",
    "rms_norm": "memory_bound",
    "qk_norm_rope": "memory_bound",
    "solver_step": "memory_bound",
    "linear": "linear",
    "block": "block",
}
# By whether it is a GPU: bytes of the copy that shows the bandwidth (on a CPU within its caches, as the shapes there
# are), and the side of the square product that shows the arithmetic rate.
LIMIT_BYTES = {True: 2**31, False: 2**20}
LIMIT_SIDE = {True: 8192, False: 512}


def suite_of(name: str, quick: bool) -> Suite:
    """ValueError where its device is not here."""
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("suite must be cpu where torch finds no CUDA device, got 'gpu'")
    if name == "gpu":
        device = torch.device("cuda", torch.cuda.current_device())
        return Suite(device, torch.bfloat16, quick)
    return Suite(torch.device("cpu"), torch.float32, quick)


def clock_of(suite: Suite) -> Clock:
    return CudaClock(suite.device) if suite.on_gpu else WallClock()


def check(suite: Suite, ops: list[str], seed: int) -> Iterator[Check]:
    """Those of these operations, "attention=cudnn" among attention's."""
    for claim in claims(suite, seed):
        if claim.op.partition("=")[0] in ops:
            yield judge(claim, repeats=5 if suite.quick else 20)


def cases(suite: Suite, ops: list[str]) -> Iterator[Case]:
    for name in dict.fromkeys(OPS[op] for op in ops):
        module = import_module(f".{name}", __package__)
        yield from (case for case in module.cases(suite) if case.op in ops)


def measure_limits(suite: Suite, clock: Clock) -> dict[str, Spread]:
    """The device's, as they are reached here and now: bytes copied a second, operations of a product a second."""
    budget = Budget(seconds=0.5, width=0.0)
    copy, side = copy_of(LIMIT_BYTES[suite.on_gpu], suite.device), LIMIT_SIDE[suite.on_gpu]
    square = suite.draw(side, side)
    turns = take_turns({"copy": copy, "product": lambda: square @ square}, clock, budget)
    rates = {"bytes_per_s": ("copy", LIMIT_BYTES[suite.on_gpu]), "operations_per_s": ("product", 2 * side**3)}
    return {name: spread_of([amount / s for s in turns.samples[run]]) for name, (run, amount) in rates.items()}


def measure(case: Case, suite: Suite, clock: Clock, budget: Budget, limits: dict[str, Spread], reading: Reading) -> Row:
    """Everyone who can take part, in turns; the others by the reason why not."""
    contestants: dict[str, Contestant] = {}
    with torch.inference_mode():
        makes, runs = _made(case, contestants)
        turns = take_turns(runs, clock, budget)
    for name, reason in turns.failed.items():
        contestants[name] = Contestant(status="failed", reason=reason)
    ours = next(iter(makes))
    least_s = case.cost.seconds(limits["bytes_per_s"].median, limits["operations_per_s"].median)
    for name, samples in turns.samples.items():
        seconds, ratio = spread_of(samples), turns.ratio(name, ours) if name != ours else None
        # A copy computes nothing, and products in 8 bits have another limit than the one that was measured.
        bounded = case.dtype == suite.dtype and not name.endswith(("copy", "int8", "fp8"))
        share = least_s / seconds.median if bounded else None
        contestants[name] = Contestant(status="ok", seconds=seconds, ratio=ratio, roofline_share=share)
    return Row(
        op=case.op,
        case=case.name,
        ours=ours,
        num_bytes=case.cost.num_bytes,
        operations=case.cost.operations,
        contestants={name: contestants[name] for name in makes},
        gpu=reading(),
    )


def _made(case: Case, contestants: dict[str, Contestant]) -> tuple[Mapping[str, Make], dict[str, Run]]:
    """Who can take part; who cannot is put down among the contestants with the reason."""
    try:
        makes = case.build()
    except Exception as error:  # out of memory, most likely: nobody's turn comes
        contestants["skylapse"] = Contestant(status="failed", reason=reason_of(error))
        return dict.fromkeys(contestants, _nobody), {}
    runs: dict[str, Run] = {}
    for name, make in makes.items():
        try:
            runs[name] = make()
        except Missing as error:
            contestants[name] = Contestant(status="missing", reason=reason_of(error))
        except Exception as error:  # a peer that cannot be made is that peer's result
            contestants[name] = Contestant(status="failed", reason=reason_of(error))
    return makes, runs


def _nobody() -> Run:
    raise Missing("its inputs could not be made")


def lost(line: object) -> bool:
    """Whether what this line tells of took the device with it, as a fault in a kernel does."""
    told = line.contestants.values() if isinstance(line, Row) else [line]
    if not torch.cuda.is_available() or all(getattr(one, "status", "ok") != "failed" for one in told):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
