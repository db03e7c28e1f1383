"""Attention kernels in Triton's interpreter against float64; prints a line of JSON for each case.

Uninitialised memory is filled with NaN, so an element that no program writes is a wrong one, and what lies around each
tensor is NaN too, so an element that is read from outside shows. bf16 goes through `bf16_products`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate

import torch
from bf16 import bf16_products
from torch import Tensor

from skylapse.kernels import reference
from skylapse.kernels.attention_kernels import Configuration, run

POINTERS = Configuration(block_m=64, block_n=64, num_warps=4, num_stages=1)
VARIANTS = {"pointers": POINTERS, "descriptors": replace(POINTERS, descriptors=True)}
# Around the edges of tiles of 64, one token alone, and a query length that differs from the key length.
RAGGED = [(1, 1), (63, 64), (64, 65), (65, 1), (1, 129), (7, 63)]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    torch.manual_seed(0)
    bf16_products()
    for variant, configuration in VARIANTS.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for head_size in (64, 96) if dtype == torch.float16 else (64,):
                check(f"{variant} head {head_size}", configuration, dtype, head_size, RAGGED, biased=True)
        check(f"{variant} head 128", configuration, torch.float16, 128, RAGGED[1:3], biased=False)
        check(f"{variant} head 24", configuration, torch.float16, 24, RAGGED[3:], biased=False)
        wide = replace(configuration, block_m=128, block_n=32)
        lengths = [tuple(pair) for pair in torch.randint(1, 200, (3, 2)).tolist()]
        check(f"{variant} 128x32", wide, torch.float32, 64, lengths, biased=False)
        for block_n in (32, 128):
            check(f"{variant} 64x{block_n}", replace(configuration, block_n=block_n), torch.float32, 64, RAGGED, True)
        hidden(variant, configuration)
        loud(variant, configuration)
    specialized = replace(POINTERS, descriptors=True, warp_specialized=True, maxnreg=128)
    for dtype in (torch.float32, torch.bfloat16):
        check("specialised head 64", specialized, dtype, 64, RAGGED, biased=False)


def check(
    name: str,
    configuration: Configuration,
    dtype: torch.dtype,
    head_size: int,
    lengths: list[tuple[int, int]],
    biased: bool,
) -> None:
    q_lens, k_lens = zip(*lengths, strict=True)
    cu_q, cu_k = (tuple(accumulate(lens, initial=0)) for lens in (q_lens, k_lens))
    q, k, v = (surrounded(n, 2, head_size).to(dtype) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    bias = torch.randn(cu_k[-1]) * 3 if biased else None
    out, lse = run(q, k, v, cu_q, cu_k, bias, True, configuration)
    expected, sums = reference.attention(q, k, v, cu_q, cu_k, bias)
    report(f"{name} {'biased ' if biased else ''}out", out, expected)
    report(f"{name} {'biased ' if biased else ''}lse", lse, sums)


def hidden(variant: str, configuration: Configuration) -> None:
    """Keys with a bias of -inf count for nothing, be it a whole tile of them; a query without keys gets zeros."""
    q, k, v = (surrounded(n, 1, 64) for n in (3, 140, 140))
    bias = torch.zeros(140)
    bias[:70], bias[130:] = -torch.inf, -torch.inf
    out, lse = run(q, k, v, (0, 2, 3), (0, 130, 140), bias, True, configuration)
    expected, sums = reference.attention(q[:2], k[70:130], v[70:130], (0, 2), (0, 60), None)
    report(f"{variant} hidden out", out[:2], expected)
    report(f"{variant} hidden lse", lse[:, :2], sums)
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()


def loud(variant: str, configuration: Configuration) -> None:
    """A sequence of NaN does not reach its neighbours, nor do logits of 1000 overflow."""
    q, k, v = (surrounded(n, 1, 64) for n in (9, 99, 99))
    q[:3] *= 100
    k[33:66], v[33:66] = torch.nan, torch.inf
    cu_q, cu_k = (0, 3, 6, 9), (0, 33, 66, 99)
    out, _ = run(q, k, v, cu_q, cu_k, None, False, configuration)
    expected, _ = reference.attention(q, k, v, cu_q, cu_k, None)
    for part in (slice(0, 3), slice(6, 9)):
        report(f"{variant} loud {part.start}", out[part], expected[part])


def report(case: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, (case, actual.shape, expected.shape)
    worst = (actual.double() - expected).abs().max() / expected.square().mean().sqrt()
    print(json.dumps({"case": case, "dtype": str(actual.dtype), "worst": float(worst)}))


def surrounded(num_tokens: int, num_heads: int, head_size: int) -> Tensor:
    """[N, H, D] of random numbers, a view of what is NaN elsewhere: strides as in a fused q, k, v."""
    tokens = torch.full((num_tokens + 70, 3, num_heads, head_size), torch.nan)
    tokens[1 : num_tokens + 1, 1] = torch.randn(num_tokens, num_heads, head_size)
    return tokens[1 : num_tokens + 1, 1]


if __name__ == "__main__":
    main()
