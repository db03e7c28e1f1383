"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w over a row's elements; arithmetic is fp32.

Source: Zhang & Sennrich (arXiv 1910.07467). A program keeps a whole row in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
        constants, num_warps = _configuration(x.shape[1])
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
            _kernel[(len(x),)](x, weight, out, x.shape[1], x.stride(0), eps, **constants, num_warps=num_warps)
    return out


def _configuration(dim: int) -> tuple[dict[str, Any], int]:
    block = next_power_of_2(dim)
    return dict(BLOCK=block), max(1, min(8, block // 512))


_op = torch.library.custom_op("skylapse::rms_norm", _cpu, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(_triton)
_op.register_fake(lambda x, weight, eps: x.new_empty(x.shape))


def shipped() -> list[Shipped]:
    """Wan's widths in bf16."""
    configurations = [(dim, *_configuration(dim)) for dim in (1536, 3072, 5120)]
    types = dict(x="*bf16", weight="*bf16", out="*bf16", dim="i32", stride_x="i32", eps="fp32")
    return [
        Shipped("rms_norm", f"bf16 dim {dim}", _kernel, types, constants, num_warps)
        for dim, constants, num_warps in configurations
    ]
