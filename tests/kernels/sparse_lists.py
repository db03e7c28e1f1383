"""Lists of blocks for the tests of block-sparse attention, and what they mean, query by query."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from skylapse.kernels.attention_sparse import BlockLists


def random_lists(
    q_sizes: Sequence[int], k_sizes: Sequence[int], num_heads: int, generator: torch.Generator
) -> BlockLists:
    """Each block of keys in each list by the toss of a coin; the last head's last list is empty."""
    lists = [
        [torch.randint(2, (len(k_sizes),), generator=generator).nonzero()[:, 0].tolist() for _ in q_sizes]
        for _ in range(num_heads)
    ]
    lists[-1][-1] = []
    q_bounds, k_bounds = (tuple(accumulate(sizes, initial=0)) for sizes in (q_sizes, k_sizes))
    return BlockLists(q_bounds, k_bounds, tuple(tuple(tuple(blocks) for blocks in head) for head in lists))


def seen(own: BlockLists, num_heads: int) -> Tensor:
    """[H, queries, keys] bool: what the lists say, written out."""
    mask = torch.zeros(num_heads, own.q_bounds[-1], own.k_bounds[-1], dtype=torch.bool)
    for head in range(num_heads):
        of_head = own.lists[head] if len(own.lists) > 1 else own.lists[0]
        for (start, stop), blocks in zip(pairwise(own.q_bounds), of_head, strict=True):
            for block in blocks:
                mask[head, start:stop, own.k_bounds[block] : own.k_bounds[block + 1]] = True
    return mask
