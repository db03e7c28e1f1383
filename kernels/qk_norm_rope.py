"""RMSNorm of q and k, then 3-D rotary embedding: pairs (x0, x1) of a head turn by the token's angle.

norm(x) = x / sqrt(mean(x^2) + eps) * w over all heads together, as Wan does it; a weight of one head's size asks for
a norm of each head by itself.
Source: RoFormer (arXiv 2104.09864); Wan (arXiv 2503.20314), section 4.2.

The kernel gives a program one token's q or k as a tile [heads, head size] in registers: one read, one write. v is
neither: attention reads it where it lies, by its stride.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launches import DTYPES, arch_of, find, points
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3 dim]; weights [dim], or [D] for a norm per head; rotation [N, D / 2] complex64 or its real pairs.

    Returns q, k, v, each [N, H, D]; v is a view of qkv.
    """
    if not launches(qkv):
        return _cpu(qkv, q_weight, k_weight, rotation, num_heads, eps)
    pairs = torch.view_as_real(rotation) if rotation.is_complex() else rotation
    q, k = _op(qkv, q_weight, k_weight, pairs, num_heads, eps).unbind(0)
    return q, k, qkv.chunk(3, dim=-1)[2].unflatten(-1, (num_heads, -1))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [N, H, D], its neighbouring elements taken as complex numbers, times rotation [N, D / 2].

    rotation may also be real pairs [N, D / 2, 2]: inductor generates no code for complex numbers.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if not rotation.is_complex():
        x0, x1 = pairs.unbind(-1)
        cos, sin = rotation[:, None].unbind(-1)
        return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(pairs)
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _cpu(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    heads, size = (num_heads, -1), q_weight.shape
    if size == q.shape[-1:]:
        q, k = F.rms_norm(q, size, q_weight, eps), F.rms_norm(k, size, k_weight, eps)
        q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
    else:
        q, k = q.unflatten(-1, heads), k.unflatten(-1, heads)
        q, k = F.rms_norm(q, size, q_weight, eps), F.rms_norm(k, size, k_weight, eps)
    return rotate(q, rotation), rotate(k, rotation), v.unflatten(-1, heads)


def _stacked_cpu(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pairs: Tensor, num_heads: int, eps: float) -> Tensor:
    return torch.stack(_cpu(qkv, q_weight, k_weight, pairs, num_heads, eps)[:2])


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["num_tokens"])  # times dim, which 16 divides: no alignment comes of it, but another kernel
def _kernel(
    qkv,
    q_weight,
    k_weight,
    pairs,
    out,
    num_tokens,
    num_heads,
    stride_token,
    eps,
    D: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # 0: q, 1: k
    heads = tl.arange(0, BLOCK_H)[:, None]
    elements = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (elements < D)
    columns = heads * D + elements
    dim = num_heads * D

    x = tl.load(qkv + token * stride_token + part * dim + columns, mask=inside, other=0.0).to(tl.float32)
    weight_columns = elements + heads * 0 if PER_HEAD else columns
    if part == 0:
        weight = tl.load(q_weight + weight_columns, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.load(k_weight + weight_columns, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1)
    if PER_HEAD:
        x = x * tl.rsqrt(squares / D + eps)[:, None] * weight
    else:
        x = x * tl.rsqrt(tl.sum(squares, axis=0) / dim + eps) * weight

    turn = tl.load(pairs + token * D + elements, mask=elements < D, other=0.0).to(tl.float32)
    cos, sin = tl.split(turn.reshape(1, BLOCK_D // 2, 2))
    x0, x1 = tl.split(x.reshape(BLOCK_H, BLOCK_D // 2, 2))
    y = tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos).reshape(BLOCK_H, BLOCK_D)
    tl.store(out + (part * num_tokens + token) * dim + columns, y.to(out.dtype.element_ty), mask=inside)


def _triton(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pairs: Tensor, num_heads: int, eps: float) -> Tensor:
    head_dim = _check(qkv, q_weight, k_weight, pairs, num_heads)
    out = qkv.new_empty(2, len(qkv), num_heads, head_dim)
    if qkv.numel():
        constants = _constants(num_heads, head_dim, len(q_weight) == head_dim and num_heads > 1)
        call = (arch_of(qkv.device), DTYPES[qkv.dtype], _width(num_heads, head_dim), len(qkv))
        num_warps = find("qk_norm_rope", "qk_norm_rope", *call)["num_warps"]
        strides = (qkv.stride(0), eps)
        with torch.cuda.device_of(qkv):  # Triton launches on the current device, whatever its tensors' is
            _kernel[(len(qkv), 2)](
                qkv, q_weight, k_weight, pairs, out, len(qkv), num_heads, *strides, **constants, num_warps=num_warps
            )
    return out


def _constants(num_heads: int, head_dim: int, per_head: bool) -> dict[str, Any]:
    block_h, block_d = next_power_of_2(num_heads), next_power_of_2(head_dim)
    return dict(D=head_dim, PER_HEAD=per_head, BLOCK_H=block_h, BLOCK_D=block_d)


def _width(num_heads: int, head_dim: int) -> int:
    """Elements of a program's tile: what qk_norm_rope.json goes by."""
    return next_power_of_2(num_heads) * next_power_of_2(head_dim)


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pairs: Tensor, num_heads: int) -> int:
    """The head size."""
    check_floats(qkv=qkv, q_weight=q_weight, k_weight=k_weight, rotation=pairs)
    if qkv.dim() != 2 or num_heads < 1 or qkv.shape[1] % (6 * num_heads) or qkv.shape[1] > 3 * 16384:
        raise ValueError(f"qkv must be [N, 3 H D] of {num_heads} heads of an even size, got {list(qkv.shape)}")
    dim = qkv.shape[1] // 3
    head_dim = dim // num_heads
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape not in ((dim,), (head_dim,)) or weight.shape != q_weight.shape:
            raise ValueError(f"{name} must be [{dim}] or [{head_dim}], as the other is, got {list(weight.shape)}")
    if pairs.shape != (len(qkv), head_dim // 2, 2) or not pairs.is_contiguous() or pairs.dtype != torch.float32:
        shape = [len(qkv), head_dim // 2]
        raise ValueError(f"rotation must be {shape} complex64, got {list(pairs.shape)} {pairs.dtype} as real pairs")
    return head_dim


_op = torch.library.custom_op("skylapse::qk_norm_rope", _stacked_cpu, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(_triton)
_op.register_fake(
    lambda qkv, q_weight, k_weight, pairs, num_heads, eps: qkv.new_empty(
        2, qkv.shape[0], num_heads, qkv.shape[1] // (3 * num_heads)
    )
)


def shipped() -> list[Shipped]:
    """Every row of qk_norm_rope.json: Wan's heads (1.3B, 5B, 14B) across all and each, sizes 64 and 96, most heads."""
    cases = [(12, 128, False), (24, 128, False), (40, 128, False), (40, 128, True), (24, 64, False), (32, 96, False)]
    cases += [(128, 128, False)]
    wan: dict[int, list[tuple[int, int, bool]]] = {}
    for heads, size, per_head in cases:
        wan.setdefault(_width(heads, size), []).append((heads, size, per_head))
    return [
        compiled(arch, dtype, *case, row.launch)
        for arch, row, dtype, width in points("qk_norm_rope", "qk_norm_rope", wan)
        for case in (wan[width] if dtype == "bf16" and width in wan else [(width // 128, 128, False)])
    ]


def compiled(
    arch: int, dtype: str, num_heads: int, head_dim: int, per_head: bool, launch: Mapping[str, Any]
) -> Shipped:
    constants, num_warps = _constants(num_heads, head_dim, per_head), launch["num_warps"]
    types = dict.fromkeys(("qkv", "q_weight", "k_weight", "out"), f"*{dtype}") | dict(pairs="*fp32", eps="fp32")
    types |= dict.fromkeys(("num_tokens", "num_heads", "stride_token"), "i32")
    name = f"{dtype} {num_heads} heads of {head_dim}{', each' if per_head else ''}"
    return Shipped("qk_norm_rope", name, _kernel, types, constants, num_warps, architectures=(arch,))
