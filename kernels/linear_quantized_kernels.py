"""Quantised linear in Triton: rows to 8 bits in one pass, and the product with scales, bias and GELU behind it.

A row is kept in registers between its maximum and its rounding, so it is read once. The product goes tile by tile, by
tensor descriptors (TMA) on sm_90 and newer and by pointers elsewhere; a band of tiles of tokens is finished before the
next, so that their weights come from the L2 cache. Offsets within a tile are 32 bits wide, those of tiles 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import launches
from .toolchain import ARCHITECTURES, Shipped, capability, jit, next_power_of_2, tl, triton

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
SMALLEST_SCALE = 2.0**-126  # of rows of zeros: its reciprocal is finite
FP8_FROM = 89  # the first architecture whose matrix instructions read fp8
ELEMENTS = {"fp8": "*fp8e4nv", "int8": "*i8"}  # as Triton names them
BAND = 8  # tiles of tokens


@dataclass(frozen=True)
class Configuration:
    """How one product is cut up; linear_quantized.json lists them by architecture."""

    block_m: int  # tokens a program
    block_n: int  # outputs a program
    block_k: int  # inputs a turn of its loop
    num_warps: int
    num_stages: int
    descriptors: bool = False
    short_sums: bool = False  # of block_k products each, in fp32: see _product_kernel


def launch_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """Checked x [N, dim], not empty, into values and scales."""
    constants, num_warps = _rows_configuration(x.shape[1], values.dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
        _rows_kernel[(len(x),)](
            x, values, scales, x.shape[1], x.stride(0), SMALLEST_SCALE, **constants, num_warps=num_warps
        )


def launch_product(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, gelu: bool
) -> None:
    """Checked rows [N, in] and weight [out, in], both quantised, into out [N, out]; none of them empty."""
    kind = next(kind for kind, dtype in DTYPES.items() if dtype == weight.dtype)
    run_product(
        values, scales, weight, weight_scale, bias, out, gelu, configuration(capability(out.device), kind, len(out))
    )


def run_product(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    gelu: bool,
    how: Configuration,
) -> None:
    """The launch itself."""
    num_tokens, num_outputs = out.shape
    num_tiles = -(-num_tokens // how.block_m) * -(-num_outputs // how.block_n)
    if how.descriptors:
        triton.set_allocator(_scratch)  # each thread has its own; descriptors are written where it says
    with torch.cuda.device_of(out):  # Triton launches on the current device, whatever its tensors' is
        _product_kernel[(num_tiles,)](
            *(values, scales, weight, weight_scale, bias, out, num_tokens, values.shape[1], num_outputs),
            **_product_constants(bias is not None, gelu, values.shape[1], how),
            num_warps=how.num_warps,
            num_stages=how.num_stages,
        )


# --- configurations ---------------------------------------------------------------------------------------------------


def configuration(arch: int, kind: str, num_tokens: int) -> Configuration:
    """Of linear_quantized.json, by kind and number of tokens."""
    if kind == "fp8" and arch < FP8_FROM:
        raise ValueError(f"fp8 products need sm_{FP8_FROM} or newer, this is sm_{arch}")
    return Configuration(**launches.find("linear_quantized", "linear_quantized", arch, kind, 0, num_tokens))


def _rows_configuration(dim: int, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Constants and warps: at most 32 elements a thread up to a row of 16384."""
    block = next_power_of_2(dim)
    return dict(LARGEST=LARGEST[dtype], BLOCK=block), max(1, min(16, block // 512))


def _product_constants(biased: bool, gelu: bool, dim: int, how: Configuration) -> dict[str, Any]:
    constants = dict(BIASED=biased, GELU=gelu, DESCRIBED=how.descriptors, WHOLE=dim % how.block_k == 0, BAND=BAND)
    constants |= dict(BLOCK_M=how.block_m, BLOCK_N=how.block_n, BLOCK_K=how.block_k)
    return constants | dict(SHORT_SUMS=how.short_sums)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _rows_kernel(x, values, scales, dim, stride_x, smallest, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    value = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    scale = tl.maximum(tl.max(size, 0) * (1 / LARGEST), smallest)
    finite = tl.min((size < float("inf")).to(tl.int32), 0) == 1  # a maximum passes over NaN
    scaled = tl.where(finite, value * tl.div_rn(1.0, scale), 0.0)
    if values.dtype.element_ty == tl.int8:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left of the sum is the nearest integer
    tl.store(values + row * dim + columns, scaled.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, tl.where(finite, scale, float("nan")))


@jit
def _product_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    out,
    num_tokens,
    dim,
    stride_out,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WHOLE: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHORT_SUMS: tl.constexpr,
):
    """stride_out is the number of outputs too. SHORT_SUMS: the matrix unit sums BLOCK_K products, fp32 the rest.

    Units of sm_89 and 90 keep some 13 bits of fraction of a sum of fp8 products (SageAttention2, arXiv 2411.10958;
    DeepSeek-V3, arXiv 2412.19437, section 3.3.2), too few for 5,120 of them. sm_120's are taken to be like those.
    """
    first_token, first_output = _tile(tl.program_id(0), num_tokens, stride_out, BAND, BLOCK_M, BLOCK_N)
    rows, columns, inputs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    token_there, output_there = first_token + rows < num_tokens, first_output + columns < stride_out
    if DESCRIBED:  # what lies outside is read as zero and never written
        x_rows = tl.make_tensor_descriptor(x, [num_tokens, dim], [dim, 1], [BLOCK_M, BLOCK_K])
        weight_rows = tl.make_tensor_descriptor(weight, [stride_out, dim], [dim, 1], [BLOCK_N, BLOCK_K])
    x_at = x + first_token.to(tl.int64) * dim + (rows[:, None] * dim + inputs[None, :])
    weight_at = weight + first_output.to(tl.int64) * dim + (columns[None, :] * dim + inputs[:, None])
    if x.dtype.element_ty == tl.int8:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, dim, BLOCK_K):
        if DESCRIBED:
            left = x_rows.load([first_token, start])
            right = weight_rows.load([first_output, start]).T
        elif WHOLE:
            left = tl.load(x_at, mask=token_there[:, None], other=0.0)
            right = tl.load(weight_at, mask=output_there[None, :], other=0.0)
        else:
            inside = start + inputs < dim
            left = tl.load(x_at, mask=token_there[:, None] & inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=output_there[None, :] & inside[:, None], other=0.0)
        if SHORT_SUMS:
            total += tl.dot(left, right, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(left, right, total, out_dtype=total.dtype)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    token_scale = tl.load(x_scale + first_token + rows, mask=token_there, other=0.0)
    output_scale = tl.load(weight_scale + first_output + columns, mask=output_there, other=0.0)
    y = total.to(tl.float32) * token_scale[:, None] * output_scale[None, :]
    if BIASED:
        y += tl.load(bias + first_output + columns, mask=output_there, other=0.0).to(tl.float32)[None, :]
    if GELU:  # y / 2 (1 + tanh z) is y sigmoid(2 z)
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if DESCRIBED:
        out_rows = tl.make_tensor_descriptor(out, [num_tokens, stride_out], [stride_out, 1], [BLOCK_M, BLOCK_N])
        out_rows.store([first_token, first_output], y.to(out.dtype.element_ty))
    else:
        there = token_there[:, None] & output_there[None, :]
        out_at = out + first_token.to(tl.int64) * stride_out + first_output
        tl.store(out_at + (rows[:, None] * stride_out + columns[None, :]), y.to(out.dtype.element_ty), mask=there)


@jit
def _tile(program, num_tokens, num_outputs, BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first token and output of a program: through a band of BAND tiles of tokens output by output."""
    tiles_m, tiles_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    first = program // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = program % (BAND * tiles_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


def shipped() -> list[Shipped]:
    """Rows of Wan's widths, and every row of linear_quantized.json: bf16 with GELU and without; fp16 and fp32 once."""
    rows = [
        _shipped_rows(dim, dtype, kind)
        for kind in DTYPES
        for dim, dtype in (*((dim, "bf16") for dim in (1536, 8960, 3072, 14336, 5120, 13824)), (5120, "fp32"))
    ]
    products = [
        _shipped_product(arch, row, kind, dtype, gelu)
        for arch, table in launches.table("linear_quantized").items()
        for row in table
        for kind in row.dtypes
        for dtype, gelu in (("bf16", True), ("bf16", False), ("fp16", False), ("fp32", False))
        if dtype == "bf16" or row.longest is None
    ]
    return rows + products


def _shipped_rows(dim: int, dtype: str, kind: str) -> Shipped:
    constants, num_warps = _rows_configuration(dim, DTYPES[kind])
    types = dict(x=f"*{dtype}", values=ELEMENTS[kind], scales="*fp32", dim="i32", stride_x="i32", smallest="fp32")
    return Shipped(
        op="quantize_rows",
        configuration=f"{dtype} to {kind}, dim {dim}",
        kernel=_rows_kernel,
        types=types,
        constants=constants,
        num_warps=num_warps,
        architectures=tuple(arch for arch in ARCHITECTURES if kind == "int8" or arch >= FP8_FROM),
    )


def _shipped_product(arch: int, row: launches.Row, kind: str, dtype: str, gelu: bool) -> Shipped:
    how = Configuration(**row.launch)
    types = dict.fromkeys(("x", "weight"), ELEMENTS[kind]) | dict.fromkeys(("x_scale", "weight_scale"), "*fp32")
    types |= dict.fromkeys(("bias", "out"), f"*{dtype}") | dict.fromkeys(("num_tokens", "dim", "stride_out"), "i32")
    words = [f"{kind} to {dtype}", *(["GELU"] if gelu else [])]
    words += [f"to {row.longest} tokens" if row.longest else "any number of tokens"]
    return Shipped(
        op="linear_quantized",
        configuration=", ".join(words),
        kernel=_product_kernel,
        types=types,
        constants=_product_constants(True, gelu, 0, how),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        multiplies=True,
        architectures=(arch,),
    )
