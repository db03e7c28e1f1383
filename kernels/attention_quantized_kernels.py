"""Attention on quantised keys in Triton: 8-bit products of queries and keys, online softmax in fp32.

quantize.py prepares queries, keys and values. Products with the values are of the values' dtype for int8, of 8 bits for
fp8.

Source: SageAttention2 (arXiv 2411.10958): fp8 weights times 448, products accumulated in two levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import launches
from .attention_kernels import _scratch, unfit
from .quantize import FORMATS, block_of, columns, padded, quantize_keys, quantize_queries, quantize_values
from .tables import PerLayout, upload
from .toolchain import Shipped, jit, tl, triton


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [N, H, D] and log-sum-exp [H, N] fp32 (empty unless asked for) of checked sequences."""
    if form not in FORMATS:
        raise ValueError(f"form must be {' or '.join(FORMATS)}, got {form!r}")
    if (reason := unfit(q, k, v, key_bias)) is not None:
        raise ValueError(reason)
    arch, dtype = launches.arch_of(q.device), launches.DTYPES[q.dtype]
    longest = max(stop - start for start, stop in pairwise(cu_seqlens_q))
    found = launches.find("attention_quantized", f"attention_{form}", arch, dtype, q.shape[2], longest)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its tensors' is
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, form, with_lse, found)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool,
    how: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """The launches themselves."""
    num_queries, num_heads, head_size = q.shape
    mean, peak = columns(k, v, cu_seqlens_k, form)
    keys, key_scales = quantize_keys(k, cu_seqlens_k, mean, form)
    values = quantize_values(v, cu_seqlens_k, peak) if form == "fp8" else v
    factor = head_size**-0.5 * math.log2(
        math.e
    )  # logits are powers of two, in which the exponential is one instruction
    queries, query_scales, shifts = quantize_queries(q, cu_seqlens_q, mean, form, factor, with_lse)
    tiles = query_tiles_of(tuple(cu_seqlens_q), tuple(cu_seqlens_k), how["block_m"], q.device)
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_queries) if with_lse else (0,), dtype=torch.float32)
    if how.get("descriptors"):
        triton.set_allocator(_scratch)  # each thread has its own; descriptors are written where it says
    # Triton compiles anew for a number that 16 divides, and for one that it does not.
    lse_rows = num_queries if with_lse else 16
    _attention_kernel[(len(tiles), num_heads)](
        *(queries, query_scales, shifts, keys, key_scales, values, peak, key_bias, out, lse, tiles),
        *(lse_rows, queries.shape[1], keys.shape[1], v.stride(0), v.stride(1), out.stride(0)),
        **_constants(head_size, form, key_bias is not None, with_lse, how),
        **launches.options(how),
    )
    return out, lse


@PerLayout
def query_tiles_of(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], block_m: int, device: torch.device
) -> Tensor:
    """Tiles [num_tiles, 7] int32: first query, queries from there, first padded query, first key, keys, first padded
    key, sequence; those of most keys first."""
    rows, q_place, k_place = [], 0, 0
    for i, ((q_start, q_stop), (start, stop)) in enumerate(
        zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    ):
        for done in range(0, q_stop - q_start, block_m):
            tile = q_start + done, q_stop - q_start - done, q_place + done
            rows.append((*tile, start, stop - start, k_place, i))
        q_place, k_place = q_place + padded(q_stop - q_start), k_place + padded(stop - start)
    return upload(sorted(rows, key=lambda row: -row[4]), device)


# --- configurations ---------------------------------------------------------------------------------------------------


def _constants(head_size: int, form: str, biased: bool, with_lse: bool, how: Mapping[str, Any]) -> dict[str, Any]:
    constants = dict(HEAD_SIZE=head_size, FP8=form == "fp8", BLOCK_D=block_of(head_size))
    constants |= dict(BLOCK_M=how["block_m"], BLOCK_N=how["block_n"], BIASED=biased, WITH_LSE=with_lse)
    flags = dict(DESCRIPTORS=how.get("descriptors", False), SHORT_SUMS=how.get("short_sums", False))
    return constants | flags


def shipped() -> list[Shipped]:
    """Every row of attention_quantized.json, with a bias and without."""
    return [
        _shipped(form, *point, biased)
        for form in FORMATS
        for point in launches.points("attention_quantized", f"attention_{form}", (64, 96, 128))
        for biased in (False, True)
    ]


def _shipped(form: str, arch: int, row: launches.Row, dtype: str, head_size: int, biased: bool) -> Shipped:
    fp8, written = form == "fp8", "*fp8e4nv" if form == "fp8" else "*i8"
    types = dict.fromkeys(("query_scales", "shifts", "key_scales", "peak", "bias", "lse"), "*fp32")
    types |= dict(queries=written, keys=written, values=written if fp8 else f"*{dtype}", out=f"*{dtype}", tiles="*i32")
    types |= dict.fromkeys(
        ("num_queries", "stride_queries", "stride_keys", "stride_vn", "stride_vh", "stride_on"), "i32"
    )
    constants = _constants(head_size, form, biased, True, row.launch) | ({} if biased else {"bias": None})
    return Shipped(
        op=f"attention_{form}",
        configuration=f"{dtype} head {head_size}{', biased' if biased else ''}",
        kernel=_attention_kernel,
        types={name: type_ for name, type_ in types.items() if name not in constants},
        constants=constants,
        **launches.options(row.launch),
        multiplies=True,
        architectures=(arch,),
    )


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _attention_kernel(
    queries,
    query_scales,
    shifts,
    keys,
    key_scales,
    values,
    peak,
    bias,
    out,
    lse,
    tiles,
    num_queries,
    stride_queries,
    stride_keys,
    stride_vn,
    stride_vh,
    stride_on,
    HEAD_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    SHORT_SUMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIASED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    tile = tiles + 7 * tl.program_id(0)
    q_start, q_left, q_place = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    k_start, k_len, k_place, sequence = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    head = tl.program_id(1).to(tl.int64)
    rows, columns, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    # What was quantised is of our own making: padded to whole tiles, aligned, and so fit for the copy engine.
    queries_at = queries + (head * stride_queries + q_place) * BLOCK_D
    tile_queries = tl.load(queries_at + rows[:, None] * BLOCK_D + cells[None, :])
    row_scales = tl.load(query_scales + head * stride_queries + q_place + rows)
    scales_at = key_scales + head * stride_keys + k_place + columns
    keys_at = keys + (head * stride_keys + k_place) * BLOCK_D
    if DESCRIPTORS:
        key_rows = tl.make_tensor_descriptor(keys_at, [k_len, BLOCK_D], [BLOCK_D, 1], [BLOCK_N, BLOCK_D])
    else:
        keys_at += columns[None, :] * BLOCK_D + cells[:, None]
    if FP8:  # transposed
        values_at = values + head * BLOCK_D * stride_keys + k_place
        if DESCRIPTORS:
            value_rows = tl.make_tensor_descriptor(values_at, [BLOCK_D, k_len], [stride_keys, 1], [BLOCK_D, BLOCK_N])
        else:
            values_at += cells[:, None] * stride_keys + columns[None, :]
    else:
        values_at = values + head * stride_vh + (k_start + columns[:, None]).to(tl.int64) * stride_vn + cells[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Every tile is masked, a select an element: a peeled last one is a second loop body, and spilt (24 to 32 bytes).
    for start in tl.range(0, k_len, BLOCK_N):
        inside = start + columns < k_len
        if DESCRIPTORS:
            tile_keys = key_rows.load([start, 0]).T
        else:
            tile_keys = tl.load(keys_at)
            keys_at += BLOCK_N * BLOCK_D
        logits = tl.dot(tile_queries, tile_keys).to(tl.float32) * tl.load(scales_at + start)[None, :]
        if BIASED:
            biases = tl.load(bias + k_start + start + columns, mask=inside, other=0.0)
            logits += biases[None, :] * (1.4426950408889634 / row_scales)[:, None]
        logits = tl.where(inside[None, :], logits, float("-inf"))
        if FP8 and DESCRIPTORS:
            tile_values = value_rows.load([0, start]).T
        elif FP8:
            tile_values = tl.load(values_at).T
            values_at += BLOCK_N
        else:
            tile_values = tl.load(values_at, mask=inside[:, None] & whole[None, :], other=0.0)
            values_at += BLOCK_N * stride_vn
        highest, total, mixed = _fold(logits, tile_values, highest, total, mixed, row_scales, FP8, SHORT_SUMS, BIASED)
    if BIASED:  # a query whose keys are all hidden gets zeros
        mixed /= tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        mixed /= total[:, None]
    if FP8:
        columns_at = (sequence * tl.num_programs(1) + head) * HEAD_SIZE + cells
        mixed *= (tl.load(peak + columns_at, mask=whole, other=0.0) / 448.0)[None, :]
    out_at = out + head * HEAD_SIZE + (q_start + rows[:, None]).to(tl.int64) * stride_on + cells[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=(rows < q_left)[:, None] & whole[None, :])
    if WITH_LSE:  # of logits less q mean / sqrt(D): that is added again, and the weights' 448 taken away
        summed = highest + tl.math.log2(total) + tl.load(shifts + head * stride_queries + q_place + rows)
        if FP8:
            summed -= 8.807354922057604
        tl.store(lse + head * num_queries + q_start + rows, summed * 0.6931471805599453, mask=rows < q_left)


@jit
def _fold(
    logits,
    values,
    highest,
    total,
    mixed,
    row_scales,
    FP8: tl.constexpr,
    SHORT_SUMS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """A tile of keys into the running maximum, sum and output; fp8's weights go up to 448.

    SHORT_SUMS: the matrix unit sums a tile's products, fp32 the rest. Units of sm_89 and 90 keep some 13 bits of
    fraction of a sum of fp8 products (SageAttention2, section 3.3); sm_120's are taken to be like those.
    """
    higher = tl.maximum(highest, tl.max(logits, 1) * row_scales)
    if BIASED:  # a bias of -inf may hide a whole tile, and -inf - -inf is no number
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        anchor = higher
    decay = tl.math.exp2(highest - anchor)
    if FP8:
        anchor -= 8.807354922057604
    weights = tl.math.exp2(logits * row_scales[:, None] - anchor[:, None])
    total = total * decay + tl.sum(weights, 1)
    if SHORT_SUMS:  # one instruction, and unlike a product and a sum the compiler leaves it outside the matrix unit
        mixed = tl.fma(mixed, decay[:, None], tl.dot(weights.to(values.dtype), values))
    else:
        mixed = tl.dot(weights.to(values.dtype), values, mixed * decay[:, None])
    return higher, total, mixed
