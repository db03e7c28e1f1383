"""Linear layers in 8 bits at Wan-14B's shapes, by each product, beside bf16 and torch's own in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import roofline
from ...kernels.backends import CHOICES
from ...kernels.linear_backends import fault_of_scaled_mm
from ...kernels.linear_quantized import DTYPES, linear_quantized, linear_quantized_by, quantize_rows
from ..harness import Missing, Run
from .case import Case, Make, Suite, compiled

SHAPES = {"qkv": (5120, 15360), "out": (5120, 5120), "up": (5120, 13824), "down": (13824, 5120)}  # in, out
SMALL_SHAPES = {"up": (256, 1024), "down": (1024, 256)}


def cases(suite: Suite) -> Iterator[Case]:
    num_tokens = 32760 if suite.on_gpu else 160
    for kind, dtype in DTYPES.items():
        for name, (inner, outer) in (SHAPES if suite.on_gpu else SMALL_SHAPES).items():
            cost = roofline.linear_quantized(num_tokens, inner, outer, suite.dtype.itemsize)
            words = f"{name}: {num_tokens} tokens, {inner} to {outer}, {kind}"
            build = partial(_build, suite, dtype, num_tokens, inner, outer)
            yield Case("linear", words, cost, dtype, build)


def _build(suite: Suite, dtype: torch.dtype, num_tokens: int, inner: int, outer: int) -> dict[str, Make]:
    x, weight, bias = suite.draw(num_tokens, inner), suite.draw(outer, inner), suite.draw(outer)
    values, scales = quantize_rows(weight, dtype)
    plain, in_8_bits = partial(F.linear, x, weight, bias), partial(_by_torch, x, values, scales, bias)

    def compiled_8_bits() -> Run:
        if dtype != torch.int8 and not suite.on_gpu:
            raise Missing("torch has no such product in fp8 on a CPU")
        return compiled(in_8_bits)

    def by(name: str) -> Run:
        fault = fault_of_scaled_mm(x.device) if name.startswith("scaled_mm") else None
        if fault is not None:
            raise Missing(fault)
        return partial(linear_quantized_by, name, x, values, scales, bias, "none")

    names = CHOICES["linear"] if suite.on_gpu else ()
    if dtype == torch.int8:
        names = tuple(name for name in names if not name.startswith("scaled_mm"))
    return {name: partial(by, name) for name in names} | {
        "skylapse": lambda: partial(linear_quantized, x, values, scales, bias),
        str(suite.dtype).removeprefix("torch."): lambda: plain,
        "torch in 8 bits, compiled": compiled_8_bits,
    }


def _by_torch(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """torch's product of rows that are quantised in its lines: `torch._int_mm`, `torch._scaled_mm`."""
    limit = 127.0 if values.dtype == torch.int8 else torch.finfo(values.dtype).max
    by_row = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / limit
    rows = x.float() / by_row
    if values.dtype == torch.int8:
        product = torch._int_mm(rows.round().to(torch.int8), values.T).float()
        return (product * by_row * scales + bias).to(x.dtype)
    rows = rows.to(values.dtype)
    out: Tensor = torch._scaled_mm(rows, values.T, by_row, scales[None], bias=bias, out_dtype=x.dtype)
    return out
