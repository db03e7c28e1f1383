"""Call 1: what serves each operation here, and every kernel against its formula in float64, plain and captured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain

import torch

from ...kernels.backends import Backends
from ...kernels.doctor import examine
from ..kernels.checks import Claim, claims, judge
from .case import Case, Context
from .claims import more_claims, replayed
from .drive import main
from .lines import Line, Note

REPEATS = 20  # a race gives other bits now and then


def cases(context: Context) -> Iterator[Case]:
    yield Case("doctor", lambda: _doctor(context))
    names: set[str] = set()
    ops: set[str] = set()
    for claim in chain(claims(context.suite, context.seed), more_claims(context.suite, context.seed)):
        if context.dry and claim.op in ops:
            continue
        yield _case(claim, names, 1 if context.dry else REPEATS)
        kind = f"{claim.op}, {claim.case.partition(',')[0]}"
        if kind not in ops:  # the first of each operation and dtype is captured too
            ops |= {kind, claim.op}
            yield _case(replayed(claim, context.device), names, 2)


def _case(claim: Claim, names: set[str], repeats: int) -> Case:
    """Shapes are drawn, so two claims may have the same words."""
    name = f"{claim.op}: {claim.case}"
    while name in names:
        name += " again"
    names.add(name)
    return Case(name, lambda: [judge(claim, repeats)], light=True)


def _doctor(context: Context) -> Iterator[Line]:
    yield Note(name="doctor", value=examine(Backends()).as_dict())
    if context.device.type == "cuda":
        found = torch.cuda.get_device_properties(context.device)
        free, total = torch.cuda.mem_get_info(context.device)
        facts = {"multiprocessors": found.multi_processor_count, "l2_bytes": found.L2_cache_size}
        facts |= {"free_bytes": free, "total_bytes": total, "cudnn": torch.backends.cudnn.version()}
        yield Note(name="device", value=facts)


if __name__ == "__main__":
    sys.exit(main("checks"))
