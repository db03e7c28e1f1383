"""Linear: y = act(x W^T + b), the one matrix product of every model, with its activation fused where the device can."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "gelu_tanh"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out], in x's dtype."""
    if activation == "none":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # inductor fuses what it can by itself
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if _onednn_fuses(x):  # 1.5x over linear and gelu one after the other (160 x 256 -> 1024, fp32, one AVX-512 core)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return out
    if bias is not None and _cublas_fuses(x, weight, bias):
        # One tensor of [..., out] instead of two, and a pass over it less: cuBLASLt's epilogue is the tanh-GELU, in
        # fp32 before rounding. Where torch cannot have it (one row or column, DISABLE_ADDMM_CUDA_LT=1, no algorithm
        # found), it applies gelu_(approximate="tanh") to the product in place: tanh either way, by
        # aten/src/ATen/native/cuda/Blas.cpp. On a CPU the same operation is the exact GELU, and is not called.
        rows = x.reshape(-1, x.shape[-1])
        out = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], len(weight))
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _onednn_fuses(x: Tensor) -> bool:
    """Whether oneDNN's product with GELU serves: on a CPU."""
    return (
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    )


def _cublas_fuses(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether cuBLASLt's product with GELU serves: on CUDA, operands of one dtype that matrix units multiply."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return x.is_cuda and x.dtype in floats and weight.dtype == x.dtype == bias.dtype
