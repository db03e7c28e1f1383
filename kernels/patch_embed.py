"""3-D patch embedding straight into the packed token axis, and back.

token = W . patch + b, the patch's elements read in the order (C, p, q, r) of the weight.

Shape letters: C channels, T, H, W latent frames, rows and columns; p, q, r the patch's size along them; K = C p q r.

One launch serves latents of up to 16 shapes: a table says for each tile of tokens whose it is and which patch it begins
with, another how each request's latents lie. Both are uploaded when a layout is new, and addresses are the kernel's
arguments, so that a call copies nothing and can be captured into a CUDA graph whose latents stay where they are.
Patches are gathered into registers: there is no im2col tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launches import DTYPES, arch_of, find, points
from .linear import linear
from .tables import PerLayout, upload
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl

PatchSize = tuple[int, int, int]
Grid = tuple[int, int, int]
LATENTS = [f"latents_{i}" for i in range(16)]  # the kernel's arguments: what one launch takes
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
def _place(tiles, geometry, first_tile, TOKENS: tl.constexpr):
    """Of a program's tile: its request, its patches, which of them there are, their positions in the grid.

    All are 32-bit: with 64-bit offsets a tile of 64 x 64 spilt up to 448 bytes a thread (sm_120).
    """
    tile = tiles + 2 * (first_tile + tl.program_id(0))
    request = tl.load(tile)
    row = geometry + request * GEOMETRY
    patch = tl.load(tile + 1) + tl.arange(0, TOKENS)
    height, width = tl.load(row + 2), tl.load(row + 3)
    frame, rest = patch // (height * width), patch % (height * width)
    return request, patch, patch < tl.load(row), frame, rest // width, rest % width


# Neither alignment nor numbers of these arguments make another kernel: one is compiled, whatever a pack is made of.
@jit(do_not_specialize=["first_tile", "first_request"], do_not_specialize_on_alignment=LATENTS)
def _patch_embed_kernel(
    latents_0,
    latents_1,
    latents_2,
    latents_3,
    latents_4,
    latents_5,
    latents_6,
    latents_7,
    latents_8,
    latents_9,
    latents_10,
    latents_11,
    latents_12,
    latents_13,
    latents_14,
    latents_15,
    first_tile,
    first_request,
    tiles,
    geometry,
    weight,
    bias,
    out,
    dim,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    request, patch, there, frame, line, column = _place(tiles, geometry, first_tile, BLOCK_M)
    slot = request - first_request
    latents = latents_0
    latents = tl.where(slot == 1, latents_1, latents)
    latents = tl.where(slot == 2, latents_2, latents)
    latents = tl.where(slot == 3, latents_3, latents)
    latents = tl.where(slot == 4, latents_4, latents)
    latents = tl.where(slot == 5, latents_5, latents)
    latents = tl.where(slot == 6, latents_6, latents)
    latents = tl.where(slot == 7, latents_7, latents)
    latents = tl.where(slot == 8, latents_8, latents)
    latents = tl.where(slot == 9, latents_9, latents)
    latents = tl.where(slot == 10, latents_10, latents)
    latents = tl.where(slot == 11, latents_11, latents)
    latents = tl.where(slot == 12, latents_12, latents)
    latents = tl.where(slot == 13, latents_13, latents)
    latents = tl.where(slot == 14, latents_14, latents)
    latents = tl.where(slot == 15, latents_15, latents)
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
    request, patch, there, frame, line, column = _place(tiles, geometry, 0, BLOCK_M)
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
    dim, k = weight.shape
    grids, strides = tuple(_grid(x.shape, patch_size) for x in latents), tuple(_strides(x) for x in latents)
    num_tokens = sum(math.prod(grid) for grid in grids)
    launch = find("patch_embed", "patch_embed", arch_of(weight.device), DTYPES[weight.dtype], k, num_tokens)
    layout = layout_of(grids, strides, launch["block_m"], weight.device)
    out = weight.new_empty(num_tokens, dim)
    constants = _patch_embed_constants(dim, k, patch_size, launch)
    how = dict(num_warps=launch["num_warps"], num_stages=launch["num_stages"])
    with torch.cuda.device_of(weight):  # Triton launches on the current device, whatever its tensors' is
        for first in range(0, len(latents), len(LATENTS)):
            some = latents[first : first + len(LATENTS)]
            begin, end = layout.first_tiles[first], layout.first_tiles[first + len(some)]
            _patch_embed_kernel[(end - begin, -(-dim // constants["BLOCK_N"]))](
                *(*some, *[some[0]] * (len(LATENTS) - len(some)), begin, first),
                *(layout.tiles, layout.geometry, weight, bias, out, dim),
                **constants,
                **how,
            )
    return out


def _unpatchify_triton(tokens: Tensor, sides: Sequence[int], patch_size: Sequence[int]) -> Tensor:
    check_floats(tokens=tokens)
    _check_patch_size(patch_size)
    if len(sides) % 3:
        raise ValueError(f"grids must have three sides each, got {len(sides)} sides")
    p, q, r = patch_size
    grids = _grids(sides)
    num_tokens = sum(math.prod(grid) for grid in grids)
    if tokens.dim() != 2 or len(tokens) != num_tokens or tokens.shape[1] % (p * q * r) or min(sides, default=0) < 1:
        raise ValueError(f"tokens must be [{num_tokens}, {p * q * r} C] for grids {grids}, got {list(tokens.shape)}")
    if max(math.prod(grid) for grid in grids) * tokens.stride(0) >= 2**31:
        raise ValueError(f"a sequence's tokens exceed 2^31 elements: grids {grids}, rows of {tokens.stride(0)}")
    channels = tokens.shape[1] // (p * q * r)
    strides = tuple((t * p * h * q * w * r, h * q * w * r, w * r, 1) for t, h, w in grids)
    call = (arch_of(tokens.device), DTYPES[tokens.dtype], tokens.shape[1], num_tokens)
    launch = find("patch_embed", "unpatchify", *call)
    layout = layout_of(tuple(grids), strides, launch["block_m"], tokens.device)
    out = tokens.new_empty(tokens.numel())
    constants = _unpatchify_constants(channels, patch_size, launch)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device, whatever its tensors' is
        _unpatchify_kernel[(len(layout.tiles),)](
            *(tokens, layout.tiles, layout.geometry, out, tokens.stride(0)), **constants, num_warps=launch["num_warps"]
        )
    return out


class Layout(NamedTuple):
    """Where a pack's requests lie; it changes when one joins or leaves, not from step to step."""

    tiles: Tensor  # [num_tiles, 2] int32: request, first patch
    geometry: Tensor  # [num_requests, 8] int32: patches, offset among the tokens, H/q, W/r, strides
    first_tiles: tuple[int, ...]  # of each request, and the number of tiles: the host's


@PerLayout
def layout_of(
    grids: tuple[Grid, ...], strides: tuple[tuple[int, ...], ...], block_m: int, device: torch.device
) -> Layout:
    counts = [t * h * w for t, h, w in grids]
    offsets = accumulate(counts, initial=0)
    tiles = [(index, first) for index, count in enumerate(counts) for first in range(0, count, block_m)]
    geometry = [
        (count, offset, h, w, *stride)
        for count, offset, (_, h, w), stride in zip(counts, offsets, grids, strides, strict=False)
    ]
    first_tiles = accumulate((-(-count // block_m) for count in counts), initial=0)
    return Layout(upload(tiles, device), upload(geometry, device), tuple(first_tiles))


def _strides(x: Tensor) -> tuple[int, ...]:
    """A side of one is never stepped along, and its stride may be any number."""
    return tuple(stride if side > 1 else 0 for side, stride in zip(x.shape, x.stride(), strict=True))


def _grid(shape: Sequence[int], patch_size: Sequence[int]) -> Grid:
    t, h, w = (side // patch for side, patch in zip(shape[1:], patch_size, strict=True))
    return t, h, w


def _grids(sides: Sequence[int]) -> list[Grid]:
    return [(sides[i], sides[i + 1], sides[i + 2]) for i in range(0, len(sides), 3)]


def _patch_embed_constants(dim: int, k: int, patch_size: Sequence[int], launch: Mapping[str, Any]) -> dict[str, Any]:
    """A tile is no larger than the matrix; patch_embed.json goes by K. fp32 has no matrix instruction: its products are
    unrolled, and at 64 x 128 x 64 spilt 1 kB a thread.
    """
    p, q, r = patch_size
    block_n = min(launch["block_n"], max(16, next_power_of_2(dim)))
    block_k = min(launch["block_k"], max(16, next_power_of_2(k)))
    return dict(P=p, Q=q, R=r, K=k, BLOCK_M=launch["block_m"], BLOCK_N=block_n, BLOCK_K=block_k)


def _unpatchify_constants(channels: int, patch_size: Sequence[int], launch: Mapping[str, Any]) -> dict[str, Any]:
    p, q, r = patch_size
    return dict(P=p, Q=q, R=r, C=channels, BLOCK_M=launch["block_m"], BLOCK_K=next_power_of_2(p * q * r * channels))


def _check_patch_size(patch_size: Sequence[int]) -> None:
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size must be three positive numbers, got {tuple(patch_size)}")


def _check_latents(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> None:
    if not latents:
        raise ValueError("latents must not be empty")
    _check_patch_size(patch_size)
    check_floats(weight=weight, bias=bias)
    channels = latents[0].shape[0]
    for i, x in enumerate(latents):
        if x.dim() != 4 or x.shape[0] != channels or not x.numel() or x.dtype != latents[0].dtype:
            raise ValueError(
                f"latents[{i}] must be [{channels}, T, H, W] {latents[0].dtype}, got {[*x.shape]} {x.dtype}"
            )
        check_floats(**{"weight": weight, f"latents[{i}]": x.as_strided((1,), (1,))})  # any strides will do
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
    """Every row of patch_embed.json: Wan's channels (text 16, image 36, 5B 48) and widths; unpatchify's 16 to 48."""
    wan = {64: (1536, 5120), 144: (5120,), 192: (3072,)}
    embeds = [
        compiled(arch, dtype, k // 4, dim, row.launch)
        for arch, row, dtype, k in points("patch_embed", "patch_embed", wan)
        for dim in wan.get(k, (1536,))[: None if dtype == "bf16" else 1]
    ]
    found = points("patch_embed", "unpatchify", (64, 128, 192))
    return embeds + [compiled_unpatchify(arch, dtype, k // 4, row.launch) for arch, row, dtype, k in found]


def compiled(arch: int, dtype: str, channels: int, dim: int, launch: Mapping[str, Any]) -> Shipped:
    """Latents in fp32 and patches of 1 x 2 x 2, as Wan has them; dtype: the weight's."""
    types = dict.fromkeys(LATENTS, "*fp32") | dict.fromkeys(("weight", "bias", "out"), f"*{dtype}")
    types |= dict(first_tile="i32", first_request="i32", tiles="*i32", geometry="*i32", dim="i32")
    return Shipped(
        op="patch_embed",
        configuration=f"{dtype} {channels} channels, dim {dim}",
        kernel=_patch_embed_kernel,
        types=types,
        constants=_patch_embed_constants(dim, 4 * channels, (1, 2, 2), launch),
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        multiplies=dtype != "fp32",
        architectures=(arch,),
    )


def compiled_unpatchify(arch: int, dtype: str, channels: int, launch: Mapping[str, Any]) -> Shipped:
    constants = _unpatchify_constants(channels, (1, 2, 2), launch)
    types = dict(tokens=f"*{dtype}", out=f"*{dtype}", tiles="*i32", geometry="*i32", stride_token="i32")
    name, num_warps = f"{dtype} {channels} channels", launch["num_warps"]
    return Shipped("unpatchify", name, _unpatchify_kernel, types, constants, num_warps, architectures=(arch,))
