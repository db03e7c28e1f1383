"""Call 2: attention at Wan's shapes by every backend that can be had; `bench pick` reads the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate, repeat

import torch

from ...kernels import roofline
from ...kernels.attention import attention_by
from ..harness import Missing, Run
from ..kernels import case as kernels_case
from ..kernels.attention import RAGGED, RAGGED_SHORT, by, case_of
from ..kernels.case import Make, Suite
from .case import Case, Context
from .drive import main

LONG = (32760, 75600)  # 81 frames at 832 x 480 and at 1280 x 720
SHORT = (1024, 4096, 8192)
HEADS = (40, 12, 24)  # Wan's 14B, 1.3B and 5B, of 128 each
PACKS = {
    "four clips of other sizes": (32760, 14040, 3600, 7056),
    "eight sequences": RAGGED,
    "eight short sequences": RAGGED_SHORT,
}
TEXT_ROWS = 40  # of a prompt, the last of which stands for 473 empty ones by its bias
TINY = 64


def cases(context: Context) -> Iterator[Case]:
    yield context.limits_case()
    for case in shapes(context):
        yield Case(f"{case.op}: {case.name}", lambda case=case: [context.compare(case)])  # type: ignore[misc]


def shapes(context: Context) -> Iterator[kernels_case.Case]:
    """Yield the cases, those that decide the most first, since the call may be cut."""
    suite, dry = context.suite, context.dry
    if dry:
        yield case_of(suite, "attention", f"{TINY} tokens", (TINY,), 2, 64)
        yield case_of(suite, "attention_ragged", "three sequences", (16, TINY, 33), 2, 64)
        yield _biased(suite, TINY, 1, 2, 64)
        return
    for heads in HEADS:
        for length in LONG:
            yield case_of(suite, "attention", f"{length} tokens", (length,), heads, 128)
        yield _biased(suite, LONG[0], 2, heads, 128)
    yield case_of(suite, "attention", "a guided pair", (32760, 32760), 12, 128)
    for words, lengths in PACKS.items():
        yield case_of(suite, "attention_ragged", words, lengths, 12, 128)
    for length in SHORT:
        yield case_of(suite, "attention", f"{length} tokens", (length,), 12, 128)
    for length in (4096, LONG[0]):
        yield case_of(suite, "attention", f"{length} tokens", (length,), 24, 64)


def _biased(suite: Suite, length: int, sequences: int, heads: int, size: int) -> kernels_case.Case:
    """Compare cross-attention to a prompt: ours with a bias, others over the rows that it stands for, and a mask."""
    cu_q = tuple(accumulate(repeat(length, sequences), initial=0))
    cost = roofline.attention([length] * sequences, [TEXT_ROWS] * sequences, heads, size, suite.dtype.itemsize)

    def build() -> Mapping[str, Make]:
        cu_k = tuple(accumulate(repeat(TEXT_ROWS, sequences), initial=0))
        cu_padded = tuple(accumulate(repeat(512, sequences), initial=0))
        q = suite.draw(cu_q[-1], heads, size)
        k, v = (suite.draw(cu_k[-1], heads, size) for _ in range(2))
        keys, values = (suite.draw(cu_padded[-1], heads, size) for _ in range(2))
        bias = torch.zeros(cu_k[-1], device=suite.device)
        bias[TEXT_ROWS - 1 :: TEXT_ROWS] = 6.16  # log 473
        ours = partial(attention_by, "triton", q, k, v, cu_q, cu_k, bias)
        masked = partial(attention_by, "sdpa", q, k, v, cu_q, cu_k, bias)
        makes: dict[str, Make] = {"triton": lambda: ours, "sdpa, masked": lambda: masked}
        for name in ("cudnn", "flash", "flash3"):
            makes[f"{name}, 512 rows"] = partial(_padded, suite, name, q, keys, values, cu_q, cu_padded)
        return makes

    words = f"{sequences} x {length} queries, {TEXT_ROWS} keys with a bias, {heads} heads of {size}"
    return kernels_case.Case("attention_biased", words, cost, suite.dtype, build)


def _padded(
    suite: Suite,
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
) -> Run:
    if not suite.on_gpu:
        raise Missing("needs a CUDA device")
    return by(name, q, k, v, cu_q, cu_k)


if __name__ == "__main__":
    sys.exit(main("attention"))
