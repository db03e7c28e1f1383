"""Attention on 8 bits: products of queries and keys in int8 or fp8, with smoothed keys. Lossy, so never a default.

k less its sequence's mean m leaves softmax as it is, q (k - m) = q k - q m, and needs fewer bits; the log-sum-exp gets
q m back. Each query and key has a scale of its own. int8: values stay in their dtype. fp8 (e4m3): values are scaled by
column, weights times 448, and both are rounded to 8 bits.

Error, relative L2 against float64, of random inputs in bf16 (tests/kernels/test_attention_quantized.py holds it):
int8 0.010, fp8 0.055, where bf16 attention has 0.0017; of keys with outlier channels without smoothing 0.09 and 0.13.
Source: SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958); kernels in quantize.py and
attention_quantized_kernels.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .attention_quantized_kernels import launch
from .quantize import FORMATS

QUANTIZED = {f"triton-{form}": form for form in FORMATS}  # by the names of backends.CHOICES
QUERY_ROWS = 1024  # queries whose logits are held at once, on a CPU


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `attention` and `attention_with_lse`, which check: [N, H, D] and [H, N] fp32, empty unless asked for.

    form: "int8" or "fp8". On a CPU torch computes with the same roundings.
    """
    return _op(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, form, with_lse)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool,
    smoothed: bool = True,
) -> tuple[Tensor, Tensor]:
    """By torch, a block of queries at a time; `smoothed` is false to show what smoothing does."""
    outputs, sums, scale = [], [], q.shape[2] ** -0.5
    for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        keys, values = (x[k_start:k_stop].float().transpose(0, 1) for x in (k, v))
        mean = keys.mean(1, keepdim=True) * smoothed
        keys_8, key_scales = _tokens(keys - mean, form)
        peak = values.abs().amax(1, keepdim=True).clamp(min=1e-30)
        if form == "fp8":
            values = (values * (448 / peak)).to(FORMATS[form]).float()
        for queries in q[q_start:q_stop].float().transpose(0, 1).split(QUERY_ROWS, dim=1):
            queries_8, query_scales = _tokens(queries, form)
            logits = (
                queries_8 @ keys_8.mT * key_scales.mT * (query_scales * scale)
            )  # integers below 2^24: exact in fp32
            if key_bias is not None:
                logits = logits + key_bias[k_start:k_stop].float()
            highest = logits.amax(-1, keepdim=True)
            weights = (logits - highest.masked_fill(highest == -math.inf, 0)).exp()
            total = weights.sum(-1, keepdim=True)  # nothing where all keys are hidden by -inf: zeros, and -inf below
            if form == "fp8":
                out = (weights * 448).to(FORMATS[form]).float() @ values * (peak / 448**2)
            else:
                out = weights.to(v.dtype).float() @ values
            outputs.append((out / total.masked_fill(total == 0, 1)).transpose(0, 1))
            sums.append((highest + total.log() + queries @ mean.mT * scale)[..., 0])
    lse = torch.cat(sums, dim=1) if with_lse else q.new_empty(0, dtype=torch.float32)
    return torch.cat(outputs).to(q.dtype), lse


def _tokens(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """[H, N, D] fp32 as numbers of 8 bits, and what each token is to be multiplied by [H, N, 1]; NaN with NaN."""
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (448 if form == "fp8" else 127)
    x = x / scales
    return x.to(FORMATS[form]).float() if form == "fp8" else (x + 0.5).floor(), scales


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return plain(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, form, with_lse)


_op = torch.library.custom_op("skylapse::attention_quantized", _torch, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(launch)


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    form: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]) if with_lse else (0,), dtype=torch.float32)
