"""Queries, keys and values of attention in 8 bits: k less its sequence's mean, each token scaled to the format's range.

Softmax is unchanged where one vector is subtracted from all keys, and what is left needs fewer bits: channels with a
large mean, as keys have them, would take up the range. fp8 values are scaled by column. All are written anew, head by
head, each sequence padded to whole tiles with zeros, so that attention reads without bounds; fp8 values transposed, as
sm_90's 8-bit products read them.

Shape letters: N tokens, S sequences, H heads, D head size, P padded tokens, B cells a head is padded to.
Source: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958); scales are a token's own in both operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .tables import PerLayout, upload
from .toolchain import Shipped, jit, next_power_of_2, tl

PADDING = 128  # tokens of a tile; attention's tiles divide it
WARPS = 16  # over a tile of tokens; with 8 and fp8 sm_90 spills 8 bytes
CELLS = 16  # of a head, in a program of `_columns_kernel`: 32 bytes, the least that memory gives
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def columns(k: Tensor, v: Tensor, cu_seqlens: Sequence[int], form: str) -> tuple[Tensor, Tensor]:
    """Of k and v [N, H, D]: each sequence's mean key [S, H, D] fp32, and for fp8 the greatest magnitude of each column
    of its values, which else is empty."""
    _, num_heads, head_size = k.shape
    sequences = sequences_of(tuple(cu_seqlens), k.device)
    mean = k.new_empty((len(sequences), num_heads, head_size), dtype=torch.float32)
    peak = k.new_empty(mean.shape if form == "fp8" else (0,), dtype=torch.float32)
    _columns_kernel[(len(sequences), num_heads, math.ceil(head_size / CELLS))](
        *(k, v, sequences, mean, peak, k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        **dict(HEAD_SIZE=head_size, FP8=form == "fp8", BLOCK_N=256, BLOCK_D=CELLS),
    )
    return mean, peak


def quantize_keys(k: Tensor, cu_seqlens: Sequence[int], mean: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """k - mean in 8 bits [H, P, B], and what each key is to be multiplied by [H, P] fp32."""
    keys, scales, _ = _tokens(k, cu_seqlens, mean, form, 1.0, True, False)
    return keys, scales


def quantize_queries(
    q: Tensor, cu_seqlens: Sequence[int], mean: Tensor, form: str, factor: float, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q in 8 bits [H, P, B], what each query is to be multiplied by [H, P] fp32, `factor` included, and if `shifted`
    what the keys' mean takes from its logits: factor q mean [H, P] fp32."""
    return _tokens(q, cu_seqlens, mean, form, factor, False, shifted)


def _tokens(
    x: Tensor, cu_seqlens: Sequence[int], mean: Tensor, form: str, factor: float, smoothed: bool, shifted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_heads, head_size = x.shape
    tiles, num_padded = tiles_of(tuple(cu_seqlens), x.device)
    quantized = x.new_empty((num_heads, num_padded, block_of(head_size)), dtype=FORMATS[form])
    scales = x.new_empty((num_heads, num_padded), dtype=torch.float32)
    shifts = x.new_empty(scales.shape if shifted else (0,), dtype=torch.float32)
    _tokens_kernel[(len(tiles), num_heads)](
        *(x, tiles, mean, quantized, scales, shifts, factor, num_padded, x.stride(0), x.stride(1)),
        **_token_constants(head_size, form, smoothed, shifted),
        num_warps=WARPS,
    )
    return quantized, scales, shifts


def quantize_values(v: Tensor, cu_seqlens: Sequence[int], peak: Tensor) -> Tensor:
    """v * 448 / peak in fp8 [H, B, P]."""
    _, num_heads, head_size = v.shape
    tiles, num_padded = tiles_of(tuple(cu_seqlens), v.device)
    values = v.new_empty((num_heads, block_of(head_size), num_padded), dtype=FORMATS["fp8"])
    _values_kernel[(len(tiles), num_heads)](
        *(v, tiles, peak, values, num_padded, v.stride(0), v.stride(1)),
        **dict(HEAD_SIZE=head_size, BLOCK_N=PADDING, BLOCK_D=block_of(head_size)),
        num_warps=8,
    )
    return values


def block_of(head_size: int) -> int:
    """Cells that a head is padded to: 8-bit matrix instructions take 32 numbers at a time."""
    return max(32, next_power_of_2(head_size))


def padded(length: int) -> int:
    """Tokens that a sequence is padded to."""
    return PADDING * math.ceil(length / PADDING)


# --- lists of tiles, made once a layout -------------------------------------------------------------------------------


@PerLayout
def sequences_of(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """[S, 2] int32: first token, tokens."""
    return upload([(start, stop - start) for start, stop in pairwise(cu_seqlens)], device)


@PerLayout
def tiles_of(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Tiles [num_tiles, 3] int32 of PADDING tokens: first token, tokens from there, sequence; and P."""
    layout = enumerate(pairwise(cu_seqlens))
    rows = [(token, stop - token, i) for i, (start, stop) in layout for token in range(start, stop, PADDING)]
    return upload(rows, device), PADDING * len(rows)


# --- what is shipped --------------------------------------------------------------------------------------------------


def _token_constants(head_size: int, form: str, smoothed: bool, shifted: bool) -> dict[str, Any]:
    constants: dict[str, Any] = dict(HEAD_SIZE=head_size, FP8=form == "fp8", SMOOTHED=smoothed, SHIFTED=shifted)
    return constants | dict(BLOCK_N=PADDING, BLOCK_D=block_of(head_size))


def shipped() -> list[Shipped]:
    """Each format and head size in bf16; fp8 from sm_89 on."""
    return [
        replace(item, architectures=architectures)
        for form, architectures in (("int8", (80, 89, 90, 100, 120)), ("fp8", (89, 90, 100, 120)))
        for head_size in (64, 96, 128)
        for item in _shipped(form, head_size)
    ]


def _shipped(form: str, head_size: int) -> list[Shipped]:
    fp8, words = form == "fp8", f"bf16 head {head_size}, {form}"
    written = "*fp8e4nv" if fp8 else "*i8"
    strides = dict(stride_n="i32", stride_h="i32")
    column = dict(k="*bf16", v="*bf16", sequences="*i32", mean="*fp32", peak="*fp32")
    column |= {f"stride_{name}": "i32" for name in ("kn", "kh", "vn", "vh")}
    token = dict(x="*bf16", tiles="*i32", mean="*fp32", quantized=written, scales="*fp32", shifts="*fp32")
    token |= dict(factor="fp32", stride_padded="i32") | strides
    value = dict(v="*bf16", tiles="*i32", peak="*fp32", values=written, stride_padded="i32") | strides
    shape = dict(HEAD_SIZE=head_size, BLOCK_N=PADDING, BLOCK_D=block_of(head_size))
    sums: dict[str, Any] = dict(HEAD_SIZE=head_size, FP8=fp8, BLOCK_N=256, BLOCK_D=CELLS)
    items = [
        Shipped("quantize_columns", words, _columns_kernel, column, sums),
        Shipped(
            "quantize", f"{words}, keys", _tokens_kernel, token, _token_constants(head_size, form, True, False), WARPS
        ),
        Shipped(
            "quantize",
            f"{words}, queries",
            _tokens_kernel,
            token,
            _token_constants(head_size, form, False, True),
            WARPS,
        ),
    ]
    return items + ([Shipped("quantize_values", words, _values_kernel, value, shape, 8)] if fp8 else [])


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _columns_kernel(
    k,
    v,
    sequences,
    mean,
    peak,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    HEAD_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One sequence, one head, a few of its cells: always summed in the same order."""
    sequence, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(sequences + 2 * sequence), tl.load(sequences + 2 * sequence + 1)
    rows, cells = tl.arange(0, BLOCK_N), tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    k_at = k + head * stride_kh + start.to(tl.int64) * stride_kn + rows[:, None] * stride_kn + cells[None, :]
    v_at = v + head * stride_vh + start.to(tl.int64) * stride_vn + rows[:, None] * stride_vn + cells[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    highest = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for turn in tl.range(0, length, BLOCK_N):
        inside = (turn + rows < length)[:, None] & whole[None, :]
        total += tl.load(k_at, mask=inside, other=0.0).to(tl.float32)
        k_at += BLOCK_N * stride_kn
        if FP8:
            highest = tl.maximum(highest, tl.abs(tl.load(v_at, mask=inside, other=0.0).to(tl.float32)))
            v_at += BLOCK_N * stride_vn
    at = (sequence * tl.num_programs(1) + head) * HEAD_SIZE + cells
    tl.store(mean + at, tl.sum(total, 0) / length, mask=whole)
    if FP8:
        tl.store(peak + at, tl.max(highest, 0), mask=whole)


@jit
def _tokens_kernel(
    x,
    tiles,
    mean,
    quantized,
    scales,
    shifts,
    factor,
    stride_padded,
    stride_n,
    stride_h,
    HEAD_SIZE: tl.constexpr,
    FP8: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of tokens of one head. A token with a NaN or infinity gets the scale NaN, and so do all its logits."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, left, sequence = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows, cells = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    inside = (rows < left)[:, None] & whole[None, :]
    x_at = x + start.to(tl.int64) * stride_n + head * stride_h + rows[:, None] * stride_n + cells[None, :]
    numbers = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    place = head * stride_padded + tile * BLOCK_N + rows
    if SMOOTHED or SHIFTED:
        mean_at = mean + (sequence * tl.num_programs(1) + head) * HEAD_SIZE + cells
        means = tl.load(mean_at, mask=whole, other=0.0)[None, :]
        if SHIFTED:
            tl.store(shifts + place, tl.sum(numbers * means, 1) * factor)
        if SMOOTHED:
            numbers = tl.where(inside, numbers - means, 0.0)
    most = 448.0 if FP8 else 127.0
    scale = tl.maximum(tl.max(tl.abs(numbers), 1), 1e-30) / most + tl.sum(numbers, 1) * 0.0
    tl.store(scales + place, scale * factor)
    numbers = numbers / scale[:, None]
    if not FP8:
        numbers = tl.floor(numbers + 0.5)
    tl.store(quantized + place[:, None] * BLOCK_D + cells[None, :], numbers.to(quantized.dtype.element_ty))


@jit
def _values_kernel(
    v,
    tiles,
    peak,
    values,
    stride_padded,
    stride_n,
    stride_h,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of values of one head, transposed."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, left, sequence = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows, cells = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    v_at = v + start.to(tl.int64) * stride_n + head * stride_h + rows[:, None] * stride_n + cells[None, :]
    numbers = tl.load(v_at, mask=(rows < left)[:, None] & whole[None, :], other=0.0).to(tl.float32)
    peak_at = peak + (sequence * tl.num_programs(1) + head) * HEAD_SIZE + cells
    numbers *= (448.0 / tl.maximum(tl.load(peak_at, mask=whole, other=1.0), 1e-30))[None, :]
    values_at = values + head * BLOCK_D * stride_padded + tile * BLOCK_N
    values_at += cells[None, :] * stride_padded + rows[:, None]
    tl.store(values_at, numbers.to(values.dtype.element_ty))
