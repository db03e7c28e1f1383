"""Block-sparse attention in Triton's interpreter against float64; prints a line of JSON for each case.

Memory nobody wrote is NaN, as is what lies around each tensor.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from attention_numerics import report, surrounded
from bf16 import bf16_products
from sparse_lists import random_lists, seen

from skylapse.kernels import attention_kernels, reference
from skylapse.kernels.attention_sparse import BlockLists, layout_of
from skylapse.kernels.attention_sparse_kernels import run
from skylapse.kernels.sliding_tiles import sliding_tiles

POINTERS = dict(block_m=64, block_n=64, num_warps=4, num_stages=1)
VARIANTS = {"pointers": POINTERS, "descriptors": POINTERS | dict(descriptors=True)}
# Blocks around the edges of tiles of 64, of one token, and sequences of one block.
BLOCKS = [((63, 1, 65), (64, 1, 70, 33)), ((1,), (129,)), ((7, 64), (1, 1, 1))]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.ones(3).new_empty(3).isnan().all()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    bf16_products()
    of_each, shared = (
        [random_lists(q_sizes, k_sizes, heads, generator) for q_sizes, k_sizes in BLOCKS] for heads in (2, 1)
    )
    tiles = [sliding_tiles((5, 7, 6), (2, 4, 4), (1, 2, 1)).lists] * 2
    for variant, how in VARIANTS.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            check(f"{variant} of each head", how, of_each, dtype, 64, biased=True)
        check(f"{variant} shared", how, shared, torch.float16, 96, biased=False)
        check(f"{variant} sliding", how | dict(block_m=32, block_n=32), tiles, torch.float32, 24, biased=False)
        apart(variant, how)
        full(variant, how)


def check(
    name: str, how: dict[str, int], lists: list[BlockLists], dtype: torch.dtype, head_size: int, biased: bool
) -> None:
    cu_q, cu_k = (
        tuple(accumulate(ends, initial=0))
        for ends in zip(*((own.q_bounds[-1], own.k_bounds[-1]) for own in lists), strict=True)
    )
    q, k, v = (surrounded(n, 2, head_size).to(dtype) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    bias = torch.randn(cu_k[-1]) * 3 if biased else None
    layout = layout_of(tuple(lists), how["block_m"], how["block_n"], torch.device("cpu"))
    out, lse = run(q, k, v, layout.tiles, layout.spans, bias, True, how)
    expected, sums = reference.sparse_attention(q, k, v, cu_q, cu_k, [seen(own, 2) for own in lists], bias)
    hidden = sums == -torch.inf
    assert torch.equal(lse == -torch.inf, hidden) and (out.transpose(0, 1)[hidden] == 0).all()
    assert hidden.any() or "each" not in name, "some query has an empty list"
    report(f"{name} out", out, expected)
    report(f"{name} lse", lse.masked_fill(hidden, 0), sums.masked_fill(hidden, 0))


def apart(variant: str, how: dict[str, int]) -> None:
    """A sequence of NaN does not reach its neighbours, though the last tile of their keys goes beyond their end."""
    lists = BlockLists((0, 3), (0, 20, 33), (((1,),),))
    layout = layout_of((lists,) * 3, how["block_m"], how["block_n"], torch.device("cpu"))
    q, k, v = (surrounded(n, 1, 64) for n in (9, 99, 99))
    k[33:66], v[33:66] = torch.nan, torch.inf
    out, _ = run(q, k, v, layout.tiles, layout.spans, None, False, how)
    for part in (0, 2):
        keys = slice(33 * part + 20, 33 * part + 33)
        expected, _ = reference.attention(q[3 * part : 3 * part + 3], k[keys], v[keys], (0, 3), (0, 13), None)
        report(f"{variant} apart {part}", out[3 * part : 3 * part + 3], expected)


def full(variant: str, how: dict[str, int]) -> None:
    """Lists of every block are attention, to the bit."""
    lists = [BlockLists((0, 1), (0, 70), (((0,),),)), BlockLists((0, 64, 67), (0, 1, 64, 129), (((0, 1, 2),) * 2,))]
    q, k, v = (surrounded(n, 2, 64) for n in (68, 199, 199))
    layout = layout_of(tuple(lists), how["block_m"], how["block_n"], torch.device("cpu"))
    out, lse = run(q, k, v, layout.tiles, layout.spans, None, True, how)
    dense = attention_kernels.Configuration(**how)
    expected, sums = attention_kernels.run(q, k, v, (0, 1, 68), (0, 70, 199), None, True, dense)
    assert torch.equal(out, expected) and torch.equal(lse, sums)
    report(f"{variant} full", out, reference.attention(q, k, v, (0, 1, 68), (0, 70, 199), None)[0])


if __name__ == "__main__":
    main()
