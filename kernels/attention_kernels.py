"""Attention in Triton: one program a tile of queries and a head, the keys folded in tile by tile (online softmax).

Two variants of one algorithm: by pointers, for every architecture, and by tensor descriptors (TMA, sm_90 and newer),
whose bounds are each sequence's own, so that neither reads nor writes reach a neighbour. The host knows all lengths,
so it lists the tiles and no program starts in vain. Logits are kept as plain products q k, in fp32; `scale` takes
them to powers of two, in which the exponential is one instruction.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import launches
from .tables import PerLayout, upload
from .toolchain import Shipped, jit, next_power_of_2, tl, triton

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEAD_SIZE = 128


@dataclass(frozen=True)
class Configuration:
    """How one launch is cut up; attention.json lists them by architecture."""

    block_m: int  # queries a program
    block_n: int  # keys a turn of its loop
    num_warps: int
    num_stages: int
    descriptors: bool = False
    warp_specialized: bool = False
    maxnreg: int | None = None  # registers a thread at most, so that two programs fit


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None,
    with_lse: bool,
    warp_specialized: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs [N, H, D] and log-sum-exp [H, N] fp32 (empty unless asked for) of checked sequences."""
    if (reason := unfit(q, k, v, key_bias)) is not None:
        raise ValueError(reason)
    longest = max(stop - start for start, stop in pairwise(cu_seqlens_q))
    described = can_be_described(q, k, v)
    specialized = warp_specialized and described and key_bias is None
    found = configuration(launches.arch_of(q.device), DTYPES[q.dtype], q.shape[2], longest, described, specialized)
    return run(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, with_lse, found)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None,
    with_lse: bool,
    configuration: Configuration,
) -> tuple[Tensor, Tensor]:
    """The launch itself."""
    num_queries, num_heads, head_size = q.shape
    tiles = tiles_of(tuple(cu_seqlens_q), tuple(cu_seqlens_k), configuration.block_m, q.device)
    out = q.new_empty(q.shape)
    lse = q.new_empty((num_heads, num_queries) if with_lse else (0,), dtype=torch.float32)
    if configuration.descriptors:
        triton.set_allocator(_scratch)  # each thread has its own; descriptors are written where it says
    kernel = _descriptor_kernel if configuration.descriptors else _pointer_kernel
    # Triton compiles anew for a number that 16 divides, and for one that not.
    lse_rows = num_queries if with_lse else 16
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its tensors' is
        kernel[(len(tiles), num_heads)](
            *(q, k, v, key_bias, out, lse, tiles, lse_rows, head_size**-0.5 * math.log2(math.e), head_size**0.5),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0)),
            **_constants(head_size, key_bias is not None, with_lse, configuration),
            **launches.options(vars(configuration)),
        )
    return out, lse


def unfit(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> str | None:
    """Why the kernels cannot serve these tensors; None where they can."""
    if q.dtype not in DTYPES:
        return f"q must be bfloat16 or float16, got {q.dtype}"
    if not 0 < q.shape[2] <= MAX_HEAD_SIZE:
        return f"head size must be at most {MAX_HEAD_SIZE}, got {q.shape[2]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype:
            return f"{name} must be {q.dtype} as q is, got {x.dtype}"
        if x.device != q.device:
            return f"{name} must be on {q.device} as q is, got {x.device}"
        if x.stride(2) != 1:
            return f"{name}'s last dimension must be contiguous, got strides {x.stride()}"
        if x.numel() > 2**31:
            return f"{name} must have at most 2^31 elements, got {x.numel()}"
    if key_bias is not None and (key_bias.dtype != torch.float32 or not key_bias.is_contiguous()):
        return f"key_bias must be contiguous float32, got {key_bias.dtype} of strides {key_bias.stride()}"
    if key_bias is not None and key_bias.device != q.device:
        return f"key_bias must be on {q.device} as q is, got {key_bias.device}"
    return None


@PerLayout
def tiles_of(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], block_m: int, device: torch.device
) -> Tensor:
    """Tiles [num_tiles, 4] int32: first query, queries from there, first key, keys; those of most keys start first."""
    rows = [
        (query, q_stop - query, k_start, k_stop - k_start)
        for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
        for query in range(q_start, q_stop, block_m)
    ]
    return upload(sorted(rows, key=lambda row: -row[3]), device)


# --- configurations ---------------------------------------------------------------------------------------------------


def configuration(
    arch: int, dtype: str, head_size: int, longest: int, described: bool = True, warp_specialized: bool = False
) -> Configuration:
    """Of attention.json, by head size and length (queries of the longest sequence).

    described: whether descriptors can be made of the tensors; pointers take any.
    """

    def fits(launch: Mapping[str, Any]) -> bool:
        specialized = launch.get("warp_specialized", False)
        return specialized == warp_specialized and (described or not launch.get("descriptors", False))

    try:
        return Configuration(**launches.find("attention", "attention", arch, dtype, head_size, longest, fits))
    except ValueError:
        if not warp_specialized:
            raise
        return configuration(arch, dtype, head_size, longest, described)  # the opt-in has few rows


def can_be_described(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the copy engine takes them: starts, strides and the output's heads are multiples of 16 bytes."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 for x in (q, k, v))
    return aligned and q.shape[2] % 8 == 0


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _constants(head_size: int, biased: bool, with_lse: bool, configuration: Configuration) -> dict[str, Any]:
    constants = dict(HEAD_SIZE=head_size, BLOCK_D=max(16, next_power_of_2(head_size)), BIASED=biased, WITH_LSE=with_lse)
    constants |= dict(BLOCK_M=configuration.block_m, BLOCK_N=configuration.block_n)
    return constants | (dict(SPECIALIZED=configuration.warp_specialized) if configuration.descriptors else {})


def shipped() -> list[Shipped]:
    """Every row of attention.json: in each dtype, with a bias and without.

    Warps are specialised where there is no bias alone: Triton 3.7 fails over sm_90's loop with one.
    """
    return [
        _shipped(arch, row, dtype, biased)
        for arch, rows in launches.table("attention").items()
        for row in rows
        for dtype in row.dtypes
        for biased in (False, True)
        if not (biased and row.launch.get("warp_specialized"))
    ]


def _shipped(arch: int, row: launches.Row, dtype: str, biased: bool) -> Shipped:
    assert row.width is not None
    words = [f"{dtype} head {row.width}", f"to {row.longest} queries" if row.longest else "any length"]
    return compiled(arch, dtype, row.width, biased, Configuration(**row.launch), words)


def compiled(
    arch: int, dtype: str, head_size: int, biased: bool, how: Configuration, words: Sequence[str] = ()
) -> Shipped:
    """As `run` launches it with a log-sum-exp."""
    kernel = _descriptor_kernel if how.descriptors else _pointer_kernel
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    types |= dict(bias="*fp32", lse="*fp32", tiles="*i32", num_queries="i32", scale="fp32", unscale="fp32")
    types |= {f"stride_{name}": "i32" for name in ("qn", "qh", "kn", "kh", "vn", "vh", "on")}
    constants = _constants(head_size, biased, True, how) | ({} if biased else {"bias": None})
    way = ["biased"] if biased else []
    way += ["specialised"] if how.warp_specialized else ["descriptors"] if how.descriptors else []
    return Shipped(
        op="attention",
        configuration=", ".join([*words, *way]),
        kernel=kernel,
        types={name: type_ for name, type_ in types.items() if name not in constants},
        constants=constants,
        **launches.options(vars(how)),
        multiplies=True,
        architectures=(arch,),
    )


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _pointer_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
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
    BIASED: tl.constexpr,
    WITH_LSE: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    q_start, q_left, k_start, k_len = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    head = tl.program_id(1).to(tl.int64)
    rows, columns, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    whole = cells < HEAD_SIZE
    q_at = q + head * stride_qh + (q_start + rows[:, None]).to(tl.int64) * stride_qn + cells[None, :]
    k_at = k + head * stride_kh + (k_start + columns[None, :]).to(tl.int64) * stride_kn + cells[:, None]
    v_at = v + head * stride_vh + (k_start + columns[:, None]).to(tl.int64) * stride_vn + cells[None, :]
    queries = tl.load(q_at, mask=(rows < q_left)[:, None] & whole[None, :], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole_tiles = k_len // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole_tiles, BLOCK_N):
        if BLOCK_D == HEAD_SIZE:
            keys = tl.load(k_at)
        else:
            keys = tl.load(k_at, mask=whole[:, None], other=0.0)
        logits = tl.dot(queries, keys)
        if BIASED:
            logits = _biased(logits, bias + k_start + start, BLOCK_N, unscale, BLOCK_N)
        if BLOCK_D == HEAD_SIZE:
            values = tl.load(v_at)
        else:
            values = tl.load(v_at, mask=whole[None, :], other=0.0)
        highest, total, mixed = _fold(logits, values, highest, total, mixed, scale, BIASED)
        k_at += BLOCK_N * stride_kn
        v_at += BLOCK_N * stride_vn
    if whole_tiles < k_len:
        inside = whole_tiles + columns < k_len
        keys = tl.load(k_at, mask=whole[:, None] & inside[None, :], other=0.0)
        logits = tl.dot(queries, keys)
        if BIASED:
            logits = _biased(logits, bias + k_start + whole_tiles, k_len - whole_tiles, unscale, BLOCK_N)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        values = tl.load(v_at, mask=inside[:, None] & whole[None, :], other=0.0)
        highest, total, mixed = _fold(logits, values, highest, total, mixed, scale, BIASED)
    mixed = _normalised(mixed, total, BIASED)
    out_at = out + head * HEAD_SIZE + (q_start + rows[:, None]).to(tl.int64) * stride_on + cells[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=(rows < q_left)[:, None] & whole[None, :])
    if WITH_LSE:
        _store_lse(lse + head * num_queries + q_start + rows, highest, total, rows < q_left)


@jit
def _descriptor_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    tiles,
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
    BIASED: tl.constexpr,
    WITH_LSE: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    q_start, q_left, k_start, k_len = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    head = tl.program_id(1).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # Two dimensions, of this sequence and head alone: what lies outside is read as zero and never written.
    q_at = q + q_start.to(tl.int64) * stride_qn + head * stride_qh
    k_at = k + k_start.to(tl.int64) * stride_kn + head * stride_kh
    v_at = v + k_start.to(tl.int64) * stride_vn + head * stride_vh
    out_at = out + q_start.to(tl.int64) * stride_on + head * HEAD_SIZE
    query_rows = tl.make_tensor_descriptor(q_at, [q_left, HEAD_SIZE], [stride_qn, 1], [BLOCK_M, BLOCK_D])
    key_rows = tl.make_tensor_descriptor(k_at, [k_len, HEAD_SIZE], [stride_kn, 1], [BLOCK_N, BLOCK_D])
    value_rows = tl.make_tensor_descriptor(v_at, [k_len, HEAD_SIZE], [stride_vn, 1], [BLOCK_N, BLOCK_D])
    out_rows = tl.make_tensor_descriptor(out_at, [q_left, HEAD_SIZE], [stride_on, 1], [BLOCK_M, BLOCK_D])
    queries = query_rows.load([0, 0])
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The last tile alone is masked, where it is not whole: 491 instructions a turn on sm_90 instead of 613. Specialised
    # warps mask all: beside a second body sm_90's are not specialised (its wgmma serialised), and sm_100's spill.
    whole_tiles = k_len // BLOCK_N * BLOCK_N
    for start in tl.range(0, k_len if SPECIALIZED else whole_tiles, BLOCK_N, warp_specialize=SPECIALIZED):
        logits = tl.dot(queries, key_rows.load([start, 0]).T)
        if BIASED:
            left = k_len - start if SPECIALIZED else BLOCK_N
            logits = _biased(logits, bias + k_start + start, left, unscale, BLOCK_N)
        if SPECIALIZED:
            logits = tl.where((start + columns < k_len)[None, :], logits, float("-inf"))
        highest, total, mixed = _fold(logits, value_rows.load([start, 0]), highest, total, mixed, scale, BIASED)
    if not SPECIALIZED and whole_tiles < k_len:
        logits = tl.dot(queries, key_rows.load([whole_tiles, 0]).T)
        if BIASED:
            logits = _biased(logits, bias + k_start + whole_tiles, k_len - whole_tiles, unscale, BLOCK_N)
        logits = tl.where((whole_tiles + columns < k_len)[None, :], logits, float("-inf"))
        highest, total, mixed = _fold(logits, value_rows.load([whole_tiles, 0]), highest, total, mixed, scale, BIASED)
    mixed = _normalised(mixed, total, BIASED)
    out_rows.store([0, 0], mixed.to(out.dtype.element_ty))
    if WITH_LSE:
        _store_lse(lse + head * num_queries + q_start + rows, highest, total, rows < q_left)


@jit
def _fold(logits, values, highest, total, mixed, scale, BIASED: tl.constexpr):
    """A tile of keys into the running maximum, sum and output."""
    higher = tl.maximum(highest, tl.max(logits, 1) * scale)
    if BIASED:  # a bias of -inf may hide a whole tile, and -inf - -inf is no number
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        anchor = higher
    weights = tl.math.exp2(logits * scale - anchor[:, None])
    decay = tl.math.exp2(highest - anchor)
    total = total * decay + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * decay[:, None])
    return higher, total, mixed


@jit
def _biased(logits, at, num_keys, unscale, BLOCK_N: tl.constexpr):
    return tl.fma(_bias_row(at, num_keys, BLOCK_N)[None, :], unscale, logits)


@jit
def _bias_row(at, num_keys, BLOCK_N: tl.constexpr):
    """Biases [BLOCK_N] from `at` on, the first `num_keys` of them read, once a program.

    The load is of 256, and the first are kept: one of fewer elements than a program has threads Triton repeats in each
    thread, for every column that the thread holds (32 of 128 keys); this one goes through shared memory.
    """
    tl.static_assert(BLOCK_N <= 256)
    cells = tl.arange(0, 256)
    row = tl.load(at + cells, mask=cells < num_keys, other=0.0)
    if BLOCK_N <= 128:
        row, _ = tl.split(tl.trans(tl.reshape(row, [2, 128])))
    if BLOCK_N <= 64:
        row, _ = tl.split(tl.trans(tl.reshape(row, [2, 64])))
    if BLOCK_N <= 32:
        row, _ = tl.split(tl.trans(tl.reshape(row, [2, 32])))
    return row


@jit
def _normalised(mixed, total, BIASED: tl.constexpr):
    """A query whose keys are all hidden gets zeros."""
    if BIASED:
        total = tl.where(total == 0.0, 1.0, total)
    return mixed / total[:, None]


@jit
def _store_lse(at, highest, total, mask):
    tl.store(at, (highest + tl.math.log2(total)) * 0.6931471805599453, mask=mask)
