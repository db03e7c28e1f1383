"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w over a row's elements; arithmetic is fp32.

Source: Zhang & Sennrich (arXiv 1910.07467). A program keeps a whole row in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launches import DTYPES, arch_of, find, points
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, dim], whose rows may be strided; weight [dim]. Returns [N, dim] in x's dtype."""
    run = _op if launches(x) else _cpu
    return run(x, weight, eps)


def _cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@jit
def _kernel(x, weight, out, dim, stride_x, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    value = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / dim + eps)
    value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + columns, value.to(out.dtype.element_ty), mask=inside)


def _triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_floats(x=x, weight=weight)
    if x.dim() != 2 or x.shape[1] > 16384 or weight.shape != x.shape[1:]:
        raise ValueError(f"x must be [N, dim], weight [dim], dim at most 16384, got {[*x.shape]} and {[*weight.shape]}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        constants, num_warps = _configuration(arch_of(x.device), DTYPES[x.dtype], x.shape[1], len(x))
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
            _kernel[(len(x),)](x, weight, out, x.shape[1], x.stride(0), eps, **constants, num_warps=num_warps)
    return out


def _configuration(arch: int, dtype: str, dim: int, num_tokens: int) -> tuple[dict[str, Any], int]:
    return _constants(dim), find("rms_norm", "rms_norm", arch, dtype, dim, num_tokens)["num_warps"]


def _constants(dim: int) -> dict[str, Any]:
    return dict(BLOCK=next_power_of_2(dim))


_op = torch.library.custom_op("skylapse::rms_norm", _cpu, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(_triton)
_op.register_fake(lambda x, weight, eps: x.new_empty(x.shape))


def shipped() -> list[Shipped]:
    """Every row of rms_norm.json, at Wan's widths (1.3B, 5B, 14B) and at its greatest."""
    found = points("rms_norm", "rms_norm", (1536, 3072, 5120))
    return [compiled(arch, dtype, dim, row.launch) for arch, row, dtype, dim in found]


def compiled(arch: int, dtype: str, dim: int, launch: Mapping[str, Any]) -> Shipped:
    types = dict(x=f"*{dtype}", weight=f"*{dtype}", out=f"*{dtype}", dim="i32", stride_x="i32", eps="fp32")
    name, num_warps = f"{dtype} dim {dim}", launch["num_warps"]
    return Shipped("rms_norm", name, _kernel, types, _constants(dim), num_warps, architectures=(arch,))
