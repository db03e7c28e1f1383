"""Block-sparse attention over packed sequences: each block of queries attends to the blocks of keys in its list.

Blocks are of any sizes. The lists are the host's, and become a device's tables once a layout: tiles of queries, and
spans of keys that a tile runs through, behind each other as in a compressed sparse row. A query whose list is empty
gets zeros, and the log-sum-exp -inf.

Shape letters: N query tokens, M key tokens, H heads, D head size. The kernel is in attention_sparse_kernels.py, a
pattern in sliding_tiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from . import launches
from .attention import plain
from .attention_sparse_kernels import launch
from .tables import PerLayout, upload
from .toolchain import launches as serves

CPU_BLOCKS = (1024, 2**30)  # queries and keys that are multiplied at once: whole spans


@dataclass(frozen=True, eq=False)  # told apart by identity: lists are long, and made once a shape
class BlockLists:
    """Of one sequence: where its blocks start, and what each block of queries attends to."""

    q_bounds: tuple[int, ...]  # 0, ..., the sequence's queries
    k_bounds: tuple[int, ...]  # 0, ..., its keys
    lists: tuple[tuple[tuple[int, ...], ...], ...]  # [1 or H][block of queries] -> blocks of keys, ascending

    def __post_init__(self) -> None:
        for name, bounds in (("q_bounds", self.q_bounds), ("k_bounds", self.k_bounds)):
            if len(bounds) < 2 or bounds[0] != 0 or any(stop <= start for start, stop in pairwise(bounds)):
                raise ValueError(f"{name} must rise from 0, got {bounds}")
        last = len(self.k_bounds) - 2
        for of_head in self.lists:
            if len(of_head) != len(self.q_bounds) - 1:
                raise ValueError(f"{len(of_head)} lists for {len(self.q_bounds) - 1} blocks of queries")
            for blocks in of_head:
                rising = all(one < other for one, other in pairwise(blocks))
                if blocks and not (rising and blocks[0] >= 0 and blocks[-1] <= last):
                    raise ValueError(f"a list must rise within 0 and {last}, got {blocks}")
        if not self.lists:
            raise ValueError("lists must be of every head, or one for all of them; got none")

    @staticmethod
    def full(num_queries: int, num_keys: int) -> BlockLists:
        """Of a sequence whose queries attend to every key."""
        return BlockLists((0, num_queries), (0, num_keys), (((0,),),))


@dataclass(frozen=True, eq=False)
class SparseLayout:
    """A pack's lists on a device; `build_layout` makes it, where a request joins or leaves."""

    tiles: Tensor  # [1 or H, num_tiles, 6] int32: first query, queries, first span, end of spans, first key, keys
    spans: Tensor  # [num_spans, 2] int32: first key, counted from its sequence's first, and keys
    num_queries: int
    num_keys: int
    num_pairs: int  # of query and key, in all heads' lists, or the one list that all heads share
    block_m: int  # queries of a tile at most
    block_n: int  # keys of a span at most


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, layout: SparseLayout, key_bias: Tensor | None = None) -> Tensor:
    """`attention` of each block of queries to the blocks of keys in its list.

    q [N, H, D], k and v [M, H, D]; key_bias [M] fp32 is added to every logit of that key. Returns [N, H, D].
    """
    return _run(q, k, v, layout, key_bias, False)[0]


def sparse_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, layout: SparseLayout, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sparse_attention`, and the logarithm of each query's softmax sum [H, N] fp32."""
    return _run(q, k, v, layout, key_bias, True)


def _run(
    q: Tensor, k: Tensor, v: Tensor, layout: SparseLayout, key_bias: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor]:
    if q.dim() != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"shapes differ: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if (len(q), len(k)) != (layout.num_queries, layout.num_keys):
        lengths = f"{layout.num_queries} queries and {layout.num_keys} keys"
        raise ValueError(f"the layout is of {lengths}, got {len(q)} and {len(k)}")
    if len(layout.tiles) not in (1, q.shape[1]):
        raise ValueError(f"the layout is of {len(layout.tiles)} heads, got {q.shape[1]}")
    if key_bias is not None and key_bias.shape != (len(k),):
        raise ValueError(f"key_bias must be [{len(k)}], got {tuple(key_bias.shape)}")
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    run = _torch if differentiated or (q.is_cuda and not serves(q)) else _op  # the kernel has no backward
    return run(q, k, v, layout.tiles, layout.spans, layout.block_m, layout.block_n, key_bias, with_lse)


# --- layouts ----------------------------------------------------------------------------------------------------------


def build_layout(
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    lists: Sequence[BlockLists],
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> SparseLayout:
    """Of a pack whose sequences have these lists, one each; kept for the next call, and uploaded without waiting."""
    lengths = [zip(pairwise(cu_seqlens), lists, strict=False) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    wrong_q = any(stop - start != own.q_bounds[-1] for (start, stop), own in lengths[0])
    wrong_k = any(stop - start != own.k_bounds[-1] for (start, stop), own in lengths[1])
    if not len(cu_seqlens_q) == len(cu_seqlens_k) == len(lists) + 1 or wrong_q or wrong_k:
        own = [(own.q_bounds[-1], own.k_bounds[-1]) for own in lists]
        raise ValueError(f"lists of {own} queries and keys do not fit {tuple(cu_seqlens_q)} and {tuple(cu_seqlens_k)}")
    blocks = CPU_BLOCKS
    if device.type == "cuda":
        arch, longest = launches.arch_of(device), max(stop - start for start, stop in pairwise(cu_seqlens_q))
        how = launches.find("attention_sparse", "attention_sparse", arch, launches.DTYPES[dtype], head_size, longest)
        blocks = how["block_m"], how["block_n"]
    return layout_of(tuple(lists), *blocks, device)


@PerLayout
def layout_of(lists: tuple[BlockLists, ...], block_m: int, block_n: int, device: torch.device) -> SparseLayout:
    num_lists = max(len(own.lists) for own in lists)
    if any(len(own.lists) not in (1, num_lists) for own in lists):
        raise ValueError(f"sequences have lists of {sorted({len(own.lists) for own in lists})} heads")
    spans: list[tuple[int, int]] = []
    places = {own: [[_add(spans, own, blocks, block_n) for blocks in head] for head in own.lists] for own in set(lists)}
    tiles: list[list[tuple[int, ...]]] = [[] for _ in range(num_lists)]
    q_starts = accumulate((own.q_bounds[-1] for own in lists), initial=0)
    k_starts = accumulate((own.k_bounds[-1] for own in lists), initial=0)
    for own, q_start, k_start in zip(lists, q_starts, k_starts, strict=False):
        for head, of_head in enumerate(tiles):
            for (start, stop), place in zip(pairwise(own.q_bounds), places[own][head % len(own.lists)], strict=True):
                for query in range(start, stop, block_m):
                    count = min(block_m, stop - query)
                    of_head.append((q_start + query, count, *place, k_start, own.k_bounds[-1]))
    for of_head in tiles:
        of_head.sort(key=lambda row: row[2] - row[3])  # those of most spans start first
    sizes = [0, *accumulate(count for _, count in spans)]
    return SparseLayout(
        tiles=upload([row for of_head in tiles for row in of_head], device).view(num_lists, -1, 6),
        spans=upload(spans or [(0, 0)], device),
        num_queries=sum(own.q_bounds[-1] for own in lists),
        num_keys=sum(own.k_bounds[-1] for own in lists),
        num_pairs=sum(row[1] * (sizes[row[3]] - sizes[row[2]]) for of_head in tiles for row in of_head),
        block_m=block_m,
        block_n=block_n,
    )


def _add(spans: list[tuple[int, int]], own: BlockLists, blocks: Sequence[int], block_n: int) -> tuple[int, int]:
    """The list's spans behind those there are, neighbouring blocks as one; returns the first's place and the end's."""
    first, runs = len(spans), list[list[int]]()
    for block in blocks:
        start, stop = own.k_bounds[block], own.k_bounds[block + 1]
        if runs and runs[-1][1] == start:
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    spans += [(key, min(block_n, stop - key)) for start, stop in runs for key in range(start, stop, block_n)]
    return first, len(spans)


# --- torch, and as an operation of it ---------------------------------------------------------------------------------


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    spans: Tensor,
    block_m: int,
    block_n: int,
    key_bias: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Tile by tile, over the keys that it gathers."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], len(q)), -math.inf, dtype=torch.float32)
    ranges = spans.tolist()
    for head, of_head in enumerate(tiles.tolist()):
        heads = slice(head, head + 1) if len(tiles) > 1 else slice(None)
        for query, count, first, end, k_start, _ in of_head:
            if first < end:
                rows = slice(query, query + count)
                keys = torch.cat(
                    [torch.arange(k_start + key, k_start + key + n, device=q.device) for key, n in ranges[first:end]]
                )
                bias = None if key_bias is None else key_bias[keys]
                part = q[rows, heads], k[keys, heads], v[keys, heads]
                out[rows, heads], lse[heads, rows] = plain(*part, (0, count), (0, len(keys)), bias)
    return out, lse if with_lse else lse.new_empty(0)


_op = torch.library.custom_op("skylapse::attention_sparse", _torch, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(launch)


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    spans: Tensor,
    block_m: int,
    block_n: int,
    key_bias: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]) if with_lse else (0,), dtype=torch.float32)
