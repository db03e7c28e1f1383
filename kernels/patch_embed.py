"""3-D patch embedding straight into the packed token axis, and back.

token = W . patch + b, the patch's elements read in the order (C, p, q, r) of the weight.

Shape letters: C channels, T, H, W latent frames, rows and columns; p, q, r the patch's size along them; K = C p q r.

One launch serves latents of any number of shapes: a table says for each tile of tokens whose it is and which patch it
begins with, another where each request's latents lie. Patches are gathered into registers: there is no im2col tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .linear import linear
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl

PatchSize = tuple[int, int, int]
Grid = tuple[int, int, int]
TILE = 64  # tokens
GEOMETRY = tl and tl.constexpr(8)  # numbers in a request's row of the table


def patch_embed(latents: list[Tensor], weight: Tensor, bias: Tensor, patch_size: PatchSize) -> Tensor:
    """Latents [C, T, H, W] of several shapes, weight [dim, C p q r] -> tokens [N, dim] in the weight's dtype."""
    run = _patch_embed_op if launches(weight) else _patch_embed_cpu
    return run(latents, weight, bias, patch_size)


def unpatchify(tokens: Tensor, grids: list[Grid], patch_size: PatchSize) -> list[Tensor]:
    """Tokens [N, p q r C] of sequences with these patch grids -> one [C, T, H, W] for each."""
    if not launches(tokens):
        return _unpatchify_cpu(tokens, grids, patch_size)
    flat = _unpatchify_op(tokens, [n for grid in grids for n in grid], patch_size)
    shapes = [(-1, t * patch_size[0], h * patch_size[1], w * patch_size[2]) for t, h, w in grids]
    parts = flat.split([t * h * w * tokens.shape[1] for t, h, w in grids])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# --- CPU --------------------------------------------------------------------------------------------------------------


def _patch_embed_cpu(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> Tensor:
    patches = torch.cat([_to_patches(x, patch_size) for x in latents])
    return linear(patches.to(weight.dtype), weight, bias)


def _to_patches(x: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[C, T, H, W] -> [(T/p H/q W/r), (C p q r)]."""
    p, q, r = patch_size
    c, t, h, w = x.shape
    x = x.reshape(c, t // p, p, h // q, q, w // r, r)
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * p * q * r)


def _unpatchify_cpu(tokens: Tensor, grids: Sequence[Grid], patch_size: Sequence[int]) -> list[Tensor]:
    p, q, r = patch_size
    latents = []
    for part, (t, h, w) in zip(tokens.split([t * h * w for t, h, w in grids]), grids, strict=True):
        x = part.reshape(t, h, w, p, q, r, -1).permute(6, 0, 3, 1, 4, 2, 5)
        latents.append(x.reshape(-1, t * p, h * q, w * r))
    return latents


def _unpatchify_flat_cpu(tokens: Tensor, sides: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    return torch.cat([x.flatten() for x in _unpatchify_cpu(tokens, _grids(sides), patch_size)])


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _place(tiles, geometry, TOKENS: tl.constexpr):
    """Of a program's tile: its request, its patches, which of them there are, their positions in the grid.

    All are 32-bit: with 64-bit offsets a tile of 64 x 64 spilt up to 448 bytes a thread (sm_120).
    """
    request = tl.load(tiles + 2 * tl.program_id(0))
    row = geometry + request * GEOMETRY
    patch = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, TOKENS)
    height, width = tl.load(row + 2), tl.load(row + 3)
    frame, rest = patch // (height * width), patch % (height * width)
    return request, patch, patch < tl.load(row), frame, rest // width, rest % width


@jit
def _patch_embed_kernel(
    pointers,
    tiles,
    geometry,
    weight,
    bias,
    out,
    dim,
    ELEMENT: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request, patch, there, frame, line, column = _place(tiles, geometry, BLOCK_M)
    latents = tl.load(pointers + request).to(tl.pointer_type(ELEMENT))
    row = geometry + request * GEOMETRY
    stride_c, stride_t, stride_h, stride_w = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    corner = frame * P * stride_t + line * Q * stride_h + column * R * stride_w
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        within = k // (P * Q * R) * stride_c + k // (Q * R) % P * stride_t + k // R % Q * stride_h + k % R * stride_w
        inside = there[:, None] & (k < K)[None, :]
        values = tl.load(latents + (corner[:, None] + within[None, :]), mask=inside, other=0.0)
        taps = tl.load(weight + (n[None, :] * K + k[:, None]), mask=(n < dim)[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(values.to(weight.dtype.element_ty), taps, total, input_precision="ieee")
    total += tl.load(bias + n, mask=n < dim, other=0.0).to(tl.float32)[None, :]
    first = out + tl.load(row + 1).to(tl.int64) * dim
    inside = there[:, None] & (n < dim)[None, :]
    tl.store(first + (patch[:, None] * dim + n[None, :]), total.to(out.dtype.element_ty), mask=inside)


@jit
def _unpatchify_kernel(
    tokens,
    tiles,
    geometry,
    out,
    stride_token,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request, patch, there, frame, line, column = _place(tiles, geometry, BLOCK_M)
    row = geometry + request * GEOMETRY
    stride_c, stride_t, stride_h, stride_w = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    K: tl.constexpr = P * Q * R * C
    k = tl.arange(0, BLOCK_K)
    tap = k // C
    within = k % C * stride_c + tap // (Q * R) * stride_t + tap // R % Q * stride_h + tap % R * stride_w
    corner = frame * P * stride_t + line * Q * stride_h + column * R * stride_w
    inside = there[:, None] & (k < K)[None, :]
    offset = tl.load(row + 1).to(tl.int64)
    value = tl.load(tokens + offset * stride_token + (patch[:, None] * stride_token + k[None, :]), mask=inside)
    tl.store(out + offset * K + (corner[:, None] + within[None, :]), value, mask=inside)


def _patch_embed_triton(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> Tensor:
    _check_latents(latents, weight, bias, patch_size)
    dim = len(weight)
    shapes = [x.shape for x in latents]
    layout = _layout(tuple(_grid(s, patch_size) for s in shapes), tuple(x.stride() for x in latents), weight.device)
    tiles, geometry, num_tokens = layout
    pointers = torch.tensor([x.data_ptr() for x in latents], dtype=torch.int64, pin_memory=weight.is_cuda)
    pointers = pointers.to(weight.device, non_blocking=True)  # pinned: a pageable copy would wait for the stream
    out = weight.new_empty(num_tokens, dim)
    constants, num_warps = _patch_embed_configuration(shapes[0][0], dim, patch_size, latents[0].dtype, weight.dtype)
    grid = (len(tiles), -(-dim // constants["BLOCK_N"]))
    with torch.cuda.device_of(weight):  # Triton launches on the current device, whatever its tensors' is
        _patch_embed_kernel[grid](pointers, tiles, geometry, weight, bias, out, dim, **constants, num_warps=num_warps)
    return out


def _unpatchify_triton(tokens: Tensor, sides: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    check_floats(tokens=tokens)
    p, q, r = patch_size
    grids = _grids(sides)
    num_tokens = sum(math.prod(grid) for grid in grids)
    if tokens.dim() != 2 or len(tokens) != num_tokens or tokens.shape[1] % (p * q * r) or min(sides, default=0) < 1:
        raise ValueError(f"tokens must be [{num_tokens}, {p * q * r} C] for grids {grids}, got {list(tokens.shape)}")
    if max(math.prod(grid) for grid in grids) * tokens.stride(0) >= 2**31:
        raise ValueError(f"a sequence's tokens exceed 2^31 elements: grids {grids}, rows of {tokens.stride(0)}")
    channels = tokens.shape[1] // (p * q * r)
    strides = tuple((t * p * h * q * w * r, h * q * w * r, w * r, 1) for t, h, w in grids)
    tiles, geometry, _ = _layout(tuple(grids), strides, tokens.device)
    out = tokens.new_empty(tokens.numel())
    constants, num_warps = _unpatchify_configuration(channels, patch_size)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, whatever its tensors' is
        _unpatchify_kernel[(len(tiles),)](
            tokens, tiles, geometry, out, tokens.stride(0), **constants, num_warps=num_warps
        )
    return out


@lru_cache(maxsize=64)
def _layout(
    grids: tuple[Grid, ...], strides: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """For each tile (request, first patch); for each request (count, offset, H/q, W/r, strides); number of tokens.

    It changes when a request joins or leaves, not from step to step, so it is copied to the device that often.
    """
    tiles, geometry, offset = [], [], 0
    for index, ((t, h, w), stride) in enumerate(zip(grids, strides, strict=True)):
        tiles += [(index, first) for first in range(0, t * h * w, TILE)]
        geometry.append((t * h * w, offset, h, w, *stride))
        offset += t * h * w
    table = torch.tensor(geometry, dtype=torch.int32, device=device)
    return torch.tensor(tiles, dtype=torch.int32, device=device), table, offset


def _grid(shape: Sequence[int], patch_size: Sequence[int]) -> Grid:
    t, h, w = (side // patch for side, patch in zip(shape[1:], patch_size, strict=True))
    return t, h, w


def _grids(sides: Sequence[int]) -> list[Grid]:
    return [(sides[i], sides[i + 1], sides[i + 2]) for i in range(0, len(sides), 3)]


def _patch_embed_configuration(
    channels: int, dim: int, patch_size: Sequence[int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[dict[str, Any], int]:
    """A tile of fp32 has no matrix instruction: its products are unrolled, and at 64 x 128 x 64 spilt 1 kB a thread."""
    p, q, r = patch_size
    k = channels * p * q * r
    widest_n, widest_k = (64, 16) if weight_dtype == torch.float32 else (128, 64)
    block_n, block_k = min(widest_n, max(16, next_power_of_2(dim))), min(widest_k, max(16, next_power_of_2(k)))
    constants = dict(ELEMENT=_element(dtype), P=p, Q=q, R=r, K=k, BLOCK_M=TILE, BLOCK_N=block_n, BLOCK_K=block_k)
    return constants, 4 if k <= 64 and weight_dtype != torch.float32 else 8


def _unpatchify_configuration(channels: int, patch_size: Sequence[int]) -> tuple[dict[str, Any], int]:
    p, q, r = patch_size
    block = next_power_of_2(p * q * r * channels)
    return dict(P=p, Q=q, R=r, C=channels, BLOCK_M=TILE, BLOCK_K=block), max(4, min(16, block // 16))


def _element(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _check_latents(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> None:
    if not latents:
        raise ValueError("latents must not be empty")
    check_floats(weight=weight, bias=bias)
    channels = latents[0].shape[0]
    for i, x in enumerate(latents):
        check_floats(**{"weight": weight, f"latents[{i}]": x.as_strided((1,), (1,))})  # any strides will do
        if x.dim() != 4 or x.shape[0] != channels or not x.numel() or x.dtype != latents[0].dtype:
            raise ValueError(
                f"latents[{i}] must be [{channels}, T, H, W] {latents[0].dtype}, got {[*x.shape]} {x.dtype}"
            )
        if any(side % patch for side, patch in zip(x.shape[1:], patch_size, strict=True)):
            raise ValueError(f"latents[{i}] must divide into patches of {tuple(patch_size)}, got {list(x.shape)}")
        last = sum((side - 1) * stride for side, stride in zip(x.shape, x.stride(), strict=True))
        if max(last, len(weight) * x.numel() // weight.shape[1]) >= 2**31:
            raise ValueError(f"latents[{i}] or its tokens exceed 2^31 elements: {list(x.shape)}, dim {len(weight)}")
    k = channels * math.prod(patch_size)
    if weight.dim() != 2 or weight.shape[1] != k or not weight.is_contiguous() or bias.shape != (len(weight),):
        raise ValueError(f"weight must be contiguous [dim, {k}], bias [dim], got {[*weight.shape]} and {[*bias.shape]}")


# --- as operations of torch -------------------------------------------------------------------------------------------

_patch_embed_op = torch.library.custom_op(
    "skylapse::patch_embed", _patch_embed_cpu, mutates_args=(), device_types="cpu"
)
_patch_embed_op.register_kernel("cuda")(_patch_embed_triton)


@_patch_embed_op.register_fake
def _(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> Tensor:
    num_tokens = sum(x.shape[1] * x.shape[2] * x.shape[3] // math.prod(patch_size) for x in latents)
    return weight.new_empty(num_tokens, weight.shape[0])


_unpatchify_op = torch.library.custom_op(
    "skylapse::unpatchify", _unpatchify_flat_cpu, mutates_args=(), device_types="cpu"
)
_unpatchify_op.register_kernel("cuda")(_unpatchify_triton)
_unpatchify_op.register_fake(lambda tokens, sides, patch_size: tokens.new_empty(tokens.numel()))


def shipped() -> list[Shipped]:
    """Wan's channels (text 16, image 36, 5B 48) and widths."""
    embeds = [(16, 1536, "bf16"), (16, 5120, "bf16"), (36, 5120, "bf16"), (48, 3072, "bf16"), (16, 1536, "fp32")]
    return [_shipped_patch_embed(*case) for case in embeds] + [_shipped_unpatchify(c) for c in (16, 48)]


def _shipped_patch_embed(channels: int, dim: int, dtype: str) -> Shipped:
    weight_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    constants, num_warps = _patch_embed_configuration(channels, dim, (1, 2, 2), torch.float32, weight_dtype)
    types = dict(pointers="*i64", tiles="*i32", geometry="*i32", dim="i32")
    types |= dict.fromkeys(("weight", "bias", "out"), f"*{dtype}")
    name = f"{dtype} {channels} channels, dim {dim}"
    return Shipped("patch_embed", name, _patch_embed_kernel, types, constants, num_warps, multiplies=dtype != "fp32")


def _shipped_unpatchify(channels: int) -> Shipped:
    constants, num_warps = _unpatchify_configuration(channels, (1, 2, 2))
    types = dict(tokens="*bf16", out="*bf16", tiles="*i32", geometry="*i32", stride_token="i32")
    return Shipped("unpatchify", f"bf16 {channels} channels", _unpatchify_kernel, types, constants, num_warps)
