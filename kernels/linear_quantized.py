"""Quantised linear: y = act((q_x q_W^T) s_x s_W + b), of operands in 8 bits with a scale for each of their rows.

A row r of the activations (a token) or of the weight (an output channel) becomes q = round(r / s) with
s = max|r| / L: int8 of L = 127, or fp8 e4m3 of L = 448, to the nearest, ties to even. Products of the q are summed in
int32 or fp32, scales and bias are fp32. A row with a NaN or an infinity gets the scale NaN: what is made of it is NaN.
The Triton kernels are in linear_quantized_kernels.py; linear_backends.py says where torch's product is taken instead.

Source: LLM.int8() (arXiv 2208.07339), section 2.1, vector-wise quantisation; FP8 formats (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Activation
from .linear_backends import product_of, scaled_mm
from .linear_quantized_kernels import DTYPES, LARGEST, SMALLEST_SCALE, launch_product, launch_rows, shipped
from .toolchain import check_floats, launches

__all__ = ["DTYPES", "linear_quantized", "quantize_rows", "shipped"]

MAX_DIM = 32768  # a row of the activations is kept in registers; int32 holds the sum of 2^31 / 127^2 = 133,152 products


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [N, dim] in fp32, bf16 or fp16 -> values [N, dim] in `dtype` (int8 or float8_e4m3fn), scales [N] fp32."""
    run = _quantize_rows_op if launches(x) else _quantize_rows_cpu
    return run(x, dtype)


def linear_quantized(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    """x [..., in], quantised row by row; weight [out, in] and its scales [out], by `quantize_rows`; bias [out].

    Returns [..., out] in x's dtype; in and out must be multiples of 16 (the copy engine's, and matrix instructions').
    """
    rows = x.reshape(-1, x.shape[-1])
    _check(rows, weight, weight_scale, bias, activation)
    name = "torch" if not x.is_cuda or (torch.is_grad_enabled() and x.requires_grad) else product_of(rows, weight, bias)
    return linear_quantized_by(name, rows, weight, weight_scale, bias, activation).view(*x.shape[:-1], len(weight))


def linear_quantized_by(
    name: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: Activation
) -> Tensor:
    """`linear_quantized` of checked rows [N, in] by one of `backends.CHOICES`, which must take them."""
    values, scales = (_quantize_rows_cpu if name == "torch" else quantize_rows)(x, weight.dtype)
    if name == "torch":
        return _product_cpu(values, scales, weight, weight_scale, bias, activation, x.dtype)
    if name == "triton":
        return _product_op(values, scales, weight, weight_scale, bias, activation, x.dtype)
    y = scaled_mm(values, scales, weight, weight_scale, bias, dtype=x.dtype, fast=name == "scaled_mm-fast")
    if activation == "gelu_tanh":  # it has no epilogue for it; in place, at least
        torch.ops.aten.gelu_(y, approximate="tanh")
    return y


# --- CPU --------------------------------------------------------------------------------------------------------------


def _quantize_rows_cpu(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_rows(x, dtype)
    x = x.float()
    highest = x.abs().amax(-1)  # NaN where there is one
    scales = (highest * (1 / LARGEST[dtype])).clamp(min=SMALLEST_SCALE)
    scales = torch.where(highest.isfinite(), scales, torch.nan)
    scaled = (x * scales.reciprocal()[:, None]).nan_to_num_(0)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scales


def _product_cpu(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    y = product_in_fp32(values, scales, weight, weight_scale)
    y = y if bias is None else y.add_(bias)
    return (F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else y).to(dtype)


def product_in_fp32(values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Quantised rows [N, in] and weight [out, in], with their scales -> [N, out]; torch's lines, for any device."""
    if values.dtype == torch.int8 and values.device.type == "cpu" and _multiplies_int8():
        # 4 times as fast as the product in fp32 (160 x 256 -> 1024, two AVX-512 cores).
        total = torch._int_mm(values, weight.T).float()
    else:
        total = F.linear(_decoded(values), _decoded(weight))
    return total.mul_(scales[:, None]).mul_(weight_scale)


@torch.compiler.assume_constant_result
def _multiplies_int8() -> bool:
    """Whether the CPU has instructions for it; without them torch's product is a plain loop."""
    return torch.cpu._is_vnni_supported()


def _decoded(values: Tensor) -> Tensor:
    """In fp32, exactly. e4m3's bits, moved to their places in fp16, are 2^-8 of it: 0.05 ms for 256 x 1024, and
    torch's conversion 0.39. NaN's bits would become 480, and `quantize_rows` makes none."""
    if values.dtype == torch.int8:
        return values.float()
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(256)


# --- Triton -----------------------------------------------------------------------------------------------------------


def _quantize_rows_triton(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_rows(x, dtype)
    values, scales = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        launch_rows(x, values, scales)
    return values, scales


def _product_triton(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    out = values.new_empty(len(values), len(weight), dtype=dtype)
    if out.numel():
        launch_product(values, scales, weight, weight_scale, bias, out, activation == "gelu_tanh")
    return out


def _check_rows(x: Tensor, dtype: torch.dtype) -> None:
    check_floats(x=x)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be {' or '.join(map(str, DTYPES.values()))}, got {dtype}")
    if x.dim() != 2 or not 0 < x.shape[1] <= MAX_DIM:
        raise ValueError(f"x must be [N, dim] with dim at most {MAX_DIM}, got {list(x.shape)}")


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str) -> None:
    check_floats(x=x, weight_scale=weight_scale, **({} if bias is None else {"bias": bias}))
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or not 0 < x.shape[1] <= MAX_DIM:
        raise ValueError(f"x must be [N, in], weight [out, in <= {MAX_DIM}], got {[*x.shape]} and {[*weight.shape]}")
    if weight.dtype not in DTYPES.values() or not weight.is_contiguous() or weight.device != x.device:
        wanted = f"contiguous {' or '.join(map(str, DTYPES.values()))} on {x.device}"
        raise ValueError(f"weight must be {wanted}, got {weight.dtype} of strides {weight.stride()} on {weight.device}")
    if x.shape[1] % 16 or len(weight) % 16 or not len(weight):
        raise ValueError(f"in and out must be multiples of 16, got {x.shape[1]} and {len(weight)}")
    for name, vector in (("weight_scale", weight_scale), ("bias", bias)):
        if vector is not None and vector.shape != (len(weight),):
            raise ValueError(f"{name} must be [{len(weight)}], got {list(vector.shape)}")
    if weight_scale.dtype != torch.float32:
        raise ValueError(f"weight_scale must be float32, got {weight_scale.dtype}")
    if activation not in ("none", "gelu_tanh"):
        raise ValueError(f"activation must be none or gelu_tanh, got {activation!r}")


# --- as operations of torch -------------------------------------------------------------------------------------------

_quantize_rows_op = torch.library.custom_op(
    "skylapse::quantize_rows", _quantize_rows_cpu, mutates_args=(), device_types="cpu"
)
_quantize_rows_op.register_kernel("cuda")(_quantize_rows_triton)
_quantize_rows_op.register_fake(
    lambda x, dtype: (x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32))
)

_product_op = torch.library.custom_op("skylapse::product_quantized", _product_cpu, mutates_args=(), device_types="cpu")
_product_op.register_kernel("cuda")(_product_triton)
_product_op.register_fake(
    lambda values, scales, weight, weight_scale, bias, activation, dtype: values.new_empty(
        values.shape[0], weight.shape[0], dtype=dtype
    )
)
