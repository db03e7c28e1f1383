"""Block-sparse attention in Triton: one program a tile of queries and a head, which runs through its spans of keys.

Online softmax as in attention_kernels.py; the loop is over spans instead of a whole sequence. A span holds at most a
tile of keys, so that one loop, which the compiler pipelines, reads where each begins and then the keys.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, over lists as in VSA (arXiv 2505.13389).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import launches
from .attention_kernels import _fold, _normalised, _scratch, _store_lse, can_be_described, unfit
from .toolchain import Shipped, jit, next_power_of_2, tl, triton


def launch(
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
    """Outputs [N, H, D] and log-sum-exp [H, N] fp32 (empty unless asked for), with a layout for this device."""
    if (reason := unfit(q, k, v, key_bias)) is not None:
        raise ValueError(reason)
    for name, table in (("tiles", tiles), ("spans", spans)):
        if table.device != q.device or table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int32 on {q.device} as q is, got {table.dtype}, {table.device}"
            )
    described = can_be_described(q, k, v)

    def fits(how: Mapping[str, Any]) -> bool:
        return (how["block_m"], how["block_n"]) == (block_m, block_n) and (described or not how.get("descriptors"))

    arch, dtype = launches.arch_of(q.device), launches.DTYPES[q.dtype]
    how = launches.find("attention_sparse", "attention_sparse", arch, dtype, q.shape[2], len(q), fits)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its tensors' is
        return run(q, k, v, tiles, spans, key_bias, with_lse, how)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    spans: Tensor,
    key_bias: Tensor | None,
    with_lse: bool,
    how: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """The launch itself."""
    num_queries, num_heads, head_size = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_queries) if with_lse else (0,), dtype=torch.float32)
    if how.get("descriptors"):
        triton.set_allocator(_scratch)  # each thread has its own; descriptors are written where it says
    # Triton compiles anew for a number that 16 divides, and for one that it does not.
    lse_rows = num_queries if with_lse else 16
    _sparse_kernel[(tiles.shape[1], num_heads)](
        *(q, k, v, key_bias, out, lse, tiles, spans, lse_rows, head_size**-0.5 * math.log2(math.e), head_size**0.5),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0)),
        **_constants(head_size, len(tiles) > 1, key_bias is not None, with_lse, how),
        num_warps=how["num_warps"],
        num_stages=how["num_stages"],
    )
    return out, lse


def _constants(head_size: int, per_head: bool, biased: bool, with_lse: bool, how: Mapping[str, Any]) -> dict[str, Any]:
    constants = dict(HEAD_SIZE=head_size, BLOCK_D=max(16, next_power_of_2(head_size)), PER_HEAD=per_head)
    constants |= dict(BLOCK_M=how["block_m"], BLOCK_N=how["block_n"], DESCRIPTORS=how.get("descriptors", False))
    return constants | dict(BIASED=biased, WITH_LSE=with_lse)


def shipped() -> list[Shipped]:
    """Every row of attention_sparse.json, with a list of each head's own: without a bias, and with one."""
    return [
        _shipped(*point, biased)
        for point in launches.points("attention_sparse", "attention_sparse", (64, 96, 128))
        for biased in (False, True)
    ]


def _shipped(arch: int, row: launches.Row, dtype: str, head_size: int, biased: bool) -> Shipped:
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict(bias="*fp32", lse="*fp32", tiles="*i32")
    types |= dict(spans="*i32", num_queries="i32", scale="fp32", unscale="fp32")
    types |= {f"stride_{name}": "i32" for name in ("qn", "qh", "kn", "kh", "vn", "vh", "on")}
    constants = _constants(head_size, True, biased, True, row.launch) | ({} if biased else {"bias": None})
    words = [f"{dtype} head {head_size}", *(["biased"] if biased else [])]
    words += ["descriptors"] if row.launch.get("descriptors") else []
    return Shipped(
        op="attention_sparse",
        configuration=", ".join(words),
        kernel=_sparse_kernel,
        types={name: type_ for name, type_ in types.items() if name not in constants},
        constants=constants,
        num_warps=row.launch["num_warps"],
        num_stages=row.launch["num_stages"],
        multiplies=True,
        architectures=(arch,),
    )


@jit
def _sparse_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
    spans,
    num_queries,
    scale,
    unscale,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    stride_on,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BIASED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    tile = tiles + 6 * tl.program_id(0)
    if PER_HEAD:
        tile += 6 * tl.num_programs(0) * tl.program_id(1)
    q_start, q_count, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    k_start, k_len = tl.load(tile + 4), tl.load(tile + 5)
    head = tl.program_id(1).to(tl.int64)
    rows, columns, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    q_at = q + head * stride_qh + q_start.to(tl.int64) * stride_qn + rows[:, None] * stride_qn + cells[None, :]
    queries = tl.load(q_at, mask=(rows < q_count)[:, None] & whole[None, :], other=0.0)
    k_at = k + head * stride_kh + k_start.to(tl.int64) * stride_kn
    v_at = v + head * stride_vh + k_start.to(tl.int64) * stride_vn
    if DESCRIPTORS:  # of this sequence and head alone: what lies outside is read as zero
        key_rows = tl.make_tensor_descriptor(k_at, [k_len, HEAD_SIZE], [stride_kn, 1], [BLOCK_N, BLOCK_D])
        value_rows = tl.make_tensor_descriptor(v_at, [k_len, HEAD_SIZE], [stride_vn, 1], [BLOCK_N, BLOCK_D])
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for span in tl.range(first, end):
        key, count = tl.load(spans + 2 * span), tl.load(spans + 2 * span + 1)
        inside = columns < count
        if DESCRIPTORS:
            keys = key_rows.load([key, 0]).T
        else:
            keys_at = k_at + key.to(tl.int64) * stride_kn + columns[None, :] * stride_kn + cells[:, None]
            keys = tl.load(keys_at, mask=inside[None, :] & whole[:, None], other=0.0)
        logits = tl.dot(queries, keys)
        if BIASED:
            logits += (tl.load(bias + k_start + key + columns, mask=inside, other=0.0) * unscale)[None, :]
        logits = tl.where(inside[None, :], logits, float("-inf"))
        if DESCRIPTORS:
            values = value_rows.load([key, 0])
        else:
            values_at = v_at + key.to(tl.int64) * stride_vn + columns[:, None] * stride_vn + cells[None, :]
            values = tl.load(values_at, mask=inside[:, None] & whole[None, :], other=0.0)
        highest, total, mixed = _fold(logits, values, highest, total, mixed, scale, BIASED)
    mixed = _normalised(mixed, total, True)  # a query without keys gets zeros
    out_at = out + head * HEAD_SIZE + q_start.to(tl.int64) * stride_on + rows[:, None] * stride_on + cells[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=(rows < q_count)[:, None] & whole[None, :])
    if WITH_LSE:
        _store_lse(lse + head * num_queries + q_start + rows, highest, total, rows < q_count)
