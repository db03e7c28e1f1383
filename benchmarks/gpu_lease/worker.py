"""The process that measures: it runs the cases of one or more calls and tells another process, line by line.

    echo '{"calls": ["checks"], ...}' | python -m skylapse.benchmarks.gpu_lease.worker

A case that raises has failed, and the next one follows. If the device is lost, this process ends; the one that waits
starts another with the next case, or with the same case without the contestant that lost the device.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...kernels.backends import Backends
from ..gpu import watch
from ..harness import Missing, reason_of
from ..kernels.case import Suite
from ..machine import describe
from ..record import Check, Row
from .case import Case, Context
from .lines import Absent, Failed, Line, encode

MARK = "skylapse lease: "  # before a message, among whatever libraries print
LOST_TO = "the device was lost to "  # how `harness.take_turns` begins the others' reasons
LOST = 70  # the exit status of who has lost the device


@dataclass(frozen=True)
class Order:
    """The order to this process. done: device -> [call, case] to skip there; tried: [call, case] to skip as well."""

    calls: list[str]
    done: dict[str, list[list[str]]]
    tried: list[list[str]]
    avoid: list[list[str]]
    dry: bool
    seed: int
    out: str
    left_s: float
    commit: str | None = None


def main() -> int:
    order = Order(**json.loads(sys.stdin.read()))
    deadline = time.monotonic() + order.left_s
    if not (order.dry or torch.cuda.is_available()):
        tell(stop="torch finds no CUDA device; --dry-run runs every line on a CPU")
        return 2
    context = context_of(order)
    facts = describe() | watch(context.device)[0]
    if order.commit is not None and not facts["commit"]:
        facts |= {"commit": order.commit, "dirty": False}
    device = f"{facts['device']}{' (dry run)' if order.dry else ''}"
    tell(facts=facts, device=device)
    skipped = {tuple(pair) for pair in [*order.done.get(device, []), *order.tried]}
    backends = Backends()
    backends.prepare(context.device)  # as an engine does at its start
    with backends.active():
        for name in order.calls:
            for case in import_module(f".{name}", __package__).cases(context):
                if (name, case.name) in skipped:
                    continue
                if time.monotonic() > deadline:
                    tell(stop=f"out of time before {name}: {case.name}")
                    return 0
                if not run(name, case):
                    return LOST
    tell(stop=None)
    return 0


def context_of(order: Order) -> Context:
    if order.dry:
        torch.set_num_threads(1)
        suite = Suite(torch.device("cpu"), torch.float32, quick=True)
    else:
        suite = Suite(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, quick=False)
    return Context(
        suite=suite,
        dry=order.dry,
        seed=order.seed,
        out=Path(order.out),
        avoid=frozenset((op, case, name) for op, case, name in order.avoid),
        at=lambda contest: tell(at=contest),
        without=("torch.compile", "torch in 8 bits, compiled") if order.dry else (),
    )


def run(call: str, case: Case) -> bool:
    """Run a case and tell of it; False if the device was lost in it."""
    tell(call=call, begin=case.name, limit_s=case.limit_s)
    began, how = time.monotonic(), "ok"
    try:
        for line in case.run():
            if isinstance(line, Row) and (culprit := culprit_of(line)) is not None:
                tell(avoid=[line.op, line.case, culprit])
                return False
            how = how if is_good(line) else "failed"
            tell(line=encode(line))
    except Missing as error:
        tell(line=encode(Absent(name=f"{call}/{case.name}", reason=reason_of(error))))
    except Exception as error:  # whatever it raises is the case's own result
        how = "failed"
        tell(line=encode(Failed(name=f"{call}/{case.name}", reason=reason_of(error))))
    alive = release(case.light)
    if not alive:
        tell(lost=True)
    tell(end=case.name, how=how if alive else "failed", seconds=round(time.monotonic() - began, 2))
    return alive


def is_good(line: Line) -> bool:
    """Return whether a check is right, or ours has not failed in a comparison."""
    if isinstance(line, Row):
        return line.ours not in line.contestants or line.contestants[line.ours].status != "failed"
    return not isinstance(line, Check) or line.status == "ok"


def culprit_of(row: Row) -> str | None:
    """Return the contestant that lost the device for everyone in a comparison, or None."""
    reasons = [it.reason or "" for it in row.contestants.values()]
    return next((words.removeprefix(LOST_TO) for words in reasons if words.startswith(LOST_TO)), None)


def release(light: bool) -> bool:
    """Give back the memory of the case, unless it is light; False where the device is lost."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        if not light:
            gc.collect()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def tell(**message: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(message, allow_nan=False)}\n")  # whole: other processes print here too
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
