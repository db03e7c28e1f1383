"""The quantised linear's kernels in Triton's interpreter; prints a line of JSON for each case.

Rows must be the CPU path's to the bit, which the formula judges elsewhere; products are compared with float64.
Uninitialised memory is filled with NaN (and the largest int8), so an element that no program writes is a wrong one.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from fp8 import fp8_casts
from torch import Tensor

from skylapse.kernels import reference
from skylapse.kernels.linear_quantized import _quantize_rows_cpu, _quantize_rows_triton
from skylapse.kernels.linear_quantized_kernels import DTYPES, Configuration, run_product

POINTERS = Configuration(block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=1)
VARIANTS = {"pointers": POINTERS, "descriptors": replace(POINTERS, descriptors=True, short_sums=True)}
# tokens, inputs, outputs: one, less than a tile, about its edges, and bands of more tiles than one
SHAPES = [(1, 16, 16), (63, 128, 112), (64, 112, 128), (65, 144, 144), (129, 256, 272), (600, 32, 48)]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    torch.manual_seed(0)
    fp8_casts()
    for dtype in DTYPES.values():
        for x_dtype in (torch.float32, torch.float16, torch.bfloat16):
            for num_tokens, dim in ((1, 16), (5, 1536), (7, 144)):
                x = (torch.randn(num_tokens, 2 * dim) * torch.logspace(-3, 3, num_tokens)[:, None]).to(x_dtype)
                rows(f"rows {num_tokens}x{dim} {x_dtype}", x[:, dim:], dtype)
        x = torch.randn(8, 32)
        x[1], x[2, 3], x[3, 4], x[4, 5], x[5], x[6] = 0, torch.nan, torch.inf, -torch.inf, 1e-42, 3e38
        rows("rows that are special", x, dtype)
    for variant, how in VARIANTS.items():
        for kind in DTYPES:
            for index, shape in enumerate(SHAPES):
                out_dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
                product(f"{variant} {kind} {shape}", how, kind, shape, out_dtype, index % 2 == 0, index % 4 < 2)
            product(f"{variant} {kind} deep", how, kind, (70, 1536, 144), torch.float32, True, False)
            wide = replace(how, block_m=128, block_n=64)
            product(f"{variant} {kind} 128x64", wide, kind, (130, 272, 80), torch.float32, False, True)


def rows(name: str, x: Tensor, dtype: torch.dtype) -> None:
    values, scales = _quantize_rows_triton(x, dtype)
    expected, expected_scales = _quantize_rows_cpu(x, dtype)
    same = torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    same &= torch.equal(scales.nan_to_num(nan=-1), expected_scales.nan_to_num(nan=-1))
    print(json.dumps({"case": f"{name} {dtype}", "dtype": "torch.float32", "worst": 0.0 if same else 1.0}))


def product(
    name: str,
    how: Configuration,
    kind: str,
    shape: tuple[int, int, int],
    out_dtype: torch.dtype,
    gelu: bool,
    biased: bool,
) -> None:
    """One token's scale is NaN: it must be that in all outputs, and in no other token's."""
    num_tokens, num_inputs, num_outputs = shape
    values, scales = _quantize_rows_cpu(torch.randn(num_tokens, num_inputs), DTYPES[kind])
    weight, weight_scale = _quantize_rows_cpu(torch.randn(num_outputs, num_inputs), DTYPES[kind])
    bias = torch.randn(num_outputs).to(out_dtype) if biased else None
    out = torch.empty(num_tokens, num_outputs, dtype=out_dtype)
    if num_tokens > 1:
        scales[num_tokens // 2] = torch.nan
    run_product(values, scales, weight, weight_scale, bias, out, gelu, how)
    activation = "gelu_tanh" if gelu else "none"
    expected = reference.linear_quantized(values, scales, weight, weight_scale, bias, activation)
    finite = scales.isfinite()
    assert out[~finite].isnan().all(), name
    actual, expected = out[finite].double(), expected[finite]
    worst = (actual - expected).abs().max() / expected.square().mean().sqrt()
    print(json.dumps({"case": name, "dtype": str(out_dtype), "worst": float(worst)}))


if __name__ == "__main__":
    main()
