"""Call 3: operations that bandwidth bounds, and linear layers in bf16 and in 8 bits, at Wan's shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from ...kernels import roofline
from ...kernels.linear import Activation, linear
from ...kernels.linear_quantized import DTYPES, linear_quantized, quantize_rows
from ..harness import Missing, Run
from ..kernels import case as kernels_case
from ..kernels import linear as kernels_linear
from ..kernels import memory_bound
from ..kernels.case import Make, Suite
from .case import Case, Context
from .drive import main

SLOW = ("torch.compile", "conv3d")  # a compilation is 5 to 20 s; a convolution of patches in bf16 may take seconds
TOKENS = (32760, 75600)


def cases(context: Context) -> Iterator[Case]:
    """First everyone who needs no compiler; then torch.compile, where the greatest width and length are enough."""
    suite = context.suite
    yield context.limits_case()
    for tokens in (128,) if context.dry else TOKENS:
        for case in _linear(suite, tokens):
            yield Case(f"{case.op}: {case.name}", lambda case=case: [context.compare(case)])  # type: ignore[misc]
    found = [*memory_bound.cases(suite)]
    if context.dry:  # one of each operation
        found = list({case.op: case for case in reversed(found)}.values())
    for case in found:
        yield Case(f"{case.op}: {case.name}", lambda case=case: [context.compare(case, SLOW)])  # type: ignore[misc]
    for case in [*kernels_linear.cases(suite)][: 1 if context.dry else None]:
        yield Case(f"{case.op}: {case.name}", lambda case=case: [context.compare(case)])  # type: ignore[misc]
    for case in () if context.dry else [case for case in found if "14B, 720p" in case.name]:
        named = kernels_case.Case(case.op, f"{case.name}, compiled too", case.cost, case.dtype, case.build)
        yield Case(f"{named.op}: {named.name}", lambda case=named: [context.compare(case, ("conv3d",))])  # type: ignore[misc]


def _linear(suite: Suite, num_tokens: int) -> Iterator[kernels_case.Case]:
    """The feed-forward's first product with its GELU, fused and not, and all products in 8 bits with and without it."""
    shapes = kernels_linear.SHAPES if suite.on_gpu else kernels_linear.SMALL_SHAPES
    for name, (inner, outer) in shapes.items():
        itemsize = suite.dtype.itemsize
        weights = (num_tokens * (inner + outer) + inner * outer + outer) * itemsize
        cost = roofline.Cost(weights, 2 * num_tokens * inner * outer)
        words = f"{name}: {num_tokens} tokens, {inner} to {outer}"
        activated = name == "up"
        build = partial(_products, suite, num_tokens, inner, outer, activated)
        yield kernels_case.Case("linear_gelu" if activated else "linear_plain", words, cost, suite.dtype, build)


def _products(suite: Suite, num_tokens: int, inner: int, outer: int, activated: bool) -> Mapping[str, Make]:
    x, weight, bias = suite.draw(num_tokens, inner), suite.draw(outer, inner) / inner**0.5, suite.draw(outer)
    activation: Activation = "gelu_tanh" if activated else "none"
    makes: dict[str, Make] = {"skylapse": lambda: partial(linear, x, weight, bias, activation)}
    if activated:
        makes |= {"apart": lambda: lambda: F.gelu(F.linear(x, weight, bias), approximate="tanh")}
        makes |= {"addmm_activation": lambda: partial(_fused, x, weight, bias)}
    for kind, dtype in DTYPES.items():
        values, scales = quantize_rows(weight, dtype)
        makes[f"skylapse, {kind}"] = partial(partial, linear_quantized, x, values, scales, bias, activation)
        makes[f"product alone, torch, {kind}"] = partial(_by_torch, suite, x, values, scales, bias)
    return makes


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """cuBLASLt's epilogue."""
    out: torch.Tensor = torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    return out


def _by_torch(suite: Suite, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor) -> Run:
    """The product of rows that are in 8 bits already: the floor of what a layer in 8 bits takes."""
    if values.dtype != torch.int8 and not suite.on_gpu:
        raise Missing("torch has no such product in fp8 on a CPU")
    rows, row_scales = quantize_rows(x, values.dtype)
    if values.dtype == torch.int8:
        return partial(torch._int_mm, rows, values.T)
    return partial(
        torch._scaled_mm,
        *(rows, values.T, row_scales[:, None], scales[None]),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


if __name__ == "__main__":
    sys.exit(main("memory_bound"))
