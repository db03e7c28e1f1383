"""Attention on 8 bits in Triton's interpreter; prints a line of JSON for each case.

Each result is compared with the formula in float64 (`worst` and `relative`: what quantising costs) and with torch's
path, which rounds in the same places (`apart`). Memory nobody wrote is NaN, as is what lies around each tensor.
"""

from __future__ import annotations

import json
from itertools import accumulate

import torch
from attention_numerics import RAGGED, surrounded
from bf16 import bf16_products
from fp8 import fp8_casts
from torch import Tensor

from skylapse.kernels import quantize, reference
from skylapse.kernels.attention_quantized import plain
from skylapse.kernels.attention_quantized_kernels import run

POINTERS = dict(block_m=64, block_n=64, num_warps=4, num_stages=1)
VARIANTS = {"pointers": POINTERS | dict(short_sums=True), "descriptors": POINTERS | dict(descriptors=True)}
TILES = [(1, 127), (129, 128), (130, 260)]  # around the edges of the tiles of 128 that are quantised
Layout = tuple[tuple[int, ...], tuple[int, ...]]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    torch.manual_seed(0)
    bf16_products()
    fp8_casts()
    for variant, how in VARIANTS.items():
        for form in quantize.FORMATS:
            check(f"{variant} {form} fp32", how, form, torch.float32, 64, RAGGED, biased=True)
            check(f"{variant} {form} bf16", how, form, torch.bfloat16, 128, TILES, biased=False)
            check(f"{variant} {form} head 96", how, form, torch.float16, 96, RAGGED[2:], biased=True)
            wide, lengths = how | dict(block_m=128, block_n=32), torch.randint(1, 200, (2, 2)).tolist()
            check(f"{variant} {form} head 24", wide, form, torch.float16, 24, lengths, biased=False)
            hidden(variant, how, form)
            loud(variant, how, form)


def check(
    name: str,
    how: dict[str, int],
    form: str,
    dtype: torch.dtype,
    head_size: int,
    lengths: list[tuple[int, int]],
    biased: bool,
) -> None:
    """Keys have channels far from zero: what smoothing is for."""
    q_lens, k_lens = zip(*lengths, strict=True)
    cu_q, cu_k = (tuple(accumulate(lens, initial=0)) for lens in (q_lens, k_lens))
    q, k, v = (surrounded(n, 2, head_size) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    k[..., 3], k[..., 7] = k[..., 3] + 30, k[..., 7] - 20
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    bias = torch.randn(cu_k[-1]) * 3 if biased else None
    result = run(q, k, v, cu_q, cu_k, bias, form, True, how)
    expected = reference.attention(q, k, v, cu_q, cu_k, bias)
    for part, one, other, same in zip(
        ("out", "lse"), result, expected, plain(q, k, v, cu_q, cu_k, bias, form, True), strict=True
    ):
        report(f"{name} {part}", form, one, other, same)


def hidden(variant: str, how: dict[str, int], form: str) -> None:
    """Keys with a bias of -inf count for nothing, be it a whole tile of them; a query without keys gets zeros."""
    q, k, v = (surrounded(n, 1, 64) for n in (3, 140, 140))
    bias = torch.zeros(140)
    bias[:70], bias[130:] = -torch.inf, -torch.inf
    out, lse = run(q, k, v, (0, 2, 3), (0, 130, 140), bias, form, True, how)
    expected, sums = reference.attention(q[:2], k[70:130], v[70:130], (0, 2), (0, 60), None)
    same = plain(q, k, v, (0, 2, 3), (0, 130, 140), bias, form, True)
    report(f"{variant} {form} hidden out", form, out[:2], expected, same[0][:2])
    report(f"{variant} {form} hidden lse", form, lse[:, :2], sums, same[1][:, :2])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()


def loud(variant: str, how: dict[str, int], form: str) -> None:
    """A sequence with one NaN in its keys or queries is NaN where attention is, and does not reach its neighbours."""
    q, k, v = (surrounded(n, 1, 64) for n in (9, 99, 99))
    k[40, 0, 5], q[7, 0, 3] = torch.nan, torch.nan
    cu_q, cu_k = (0, 3, 6, 9), (0, 33, 66, 99)
    out, _ = run(q, k, v, cu_q, cu_k, None, form, False, how)
    clean = torch.tensor([0, 1, 2, 6, 8])
    expected, same = reference.attention(q, k, v, cu_q, cu_k, None)[0], plain(q, k, v, cu_q, cu_k, None, form, False)[0]
    report(f"{variant} {form} loud", form, out[clean], expected[clean], same[clean])
    assert out[3:6].isnan().all() and out[7].isnan().all()


def report(case: str, form: str, actual: Tensor, expected: Tensor, same: Tensor) -> None:
    assert actual.shape == expected.shape == same.shape, (case, actual.shape, expected.shape, same.shape)
    assert bool(actual.isfinite().all()), f"{case}: an element was not written"
    error, size = actual.double() - expected, expected.square().mean().sqrt()
    apart = (actual.double() - same.double()).square().mean().sqrt() / size
    figures = dict(worst=float(error.abs().max() / size), relative=float(error.norm() / expected.norm()))
    print(json.dumps(dict(case=case, form=form, dtype=str(actual.dtype), apart=float(apart)) | figures))


if __name__ == "__main__":
    main()
