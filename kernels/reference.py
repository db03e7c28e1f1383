"""The plain formula of every operation in float64, the judge of kernels and CPU paths: for tests and tuning alone.

Written from the formulas, one token or one patch at a time where that is plainer, and from nothing else in this folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def adaln(x: Tensor, shift: Tensor, scale: Tensor, ids: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * (1 + scale) + shift."""
    x, shift, scale = x.double(), shift.double(), scale.double()
    ids = ids if len(shift) > 1 else torch.zeros_like(ids)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (1 + scale[ids]) + shift[ids]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    """x + y * gate."""
    ids = ids if len(gate) > 1 else torch.zeros_like(ids)
    return x.double() + y.double() * gate.double()[ids]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last dimension."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, pairs: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N, H, D]; pairs [N, D / 2, 2] hold cosine and sine of each angle."""
    q, k, v = qkv.double().chunk(3, dim=-1)
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if len(weight) == x.shape[-1]:
            x = rms_norm(x, weight, eps).unflatten(-1, (num_heads, -1))
        else:
            x = rms_norm(x.unflatten(-1, (num_heads, -1)), weight, eps)
        cos, sin = pairs.double()[:, None].unbind(-1)
        y = torch.empty_like(x)
        y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        turned.append(y)
    return turned[0], turned[1], v.unflatten(-1, (num_heads, -1))


def patch_embed(latents: Sequence[Tensor], weight: Tensor, bias: Tensor, patch_size: Sequence[int]) -> Tensor:
    """weight . patch + bias, patches in the order (T, H, W), a patch's elements in the order (C, p, q, r)."""
    p, q, r = patch_size
    patches = []
    for x in latents:
        _, t, h, w = x.shape
        for i in range(0, t, p):
            for j in range(0, h, q):
                for k in range(0, w, r):
                    patches.append(x[:, i : i + p, j : j + q, k : k + r].flatten().double())
    return torch.stack(patches) @ weight.double().T + bias.double()


def unpatchify(tokens: Tensor, grids: Sequence[Grid], patch_size: Sequence[int]) -> list[Tensor]:
    """A token's elements, in the order (p, q, r, C), back to their places in [C, T, H, W]."""
    p, q, r = patch_size
    remaining = iter(tokens.double())
    latents = []
    for t, h, w in grids:
        x = tokens.new_empty(tokens.shape[1] // (p * q * r), t * p, h * q, w * r, dtype=torch.float64)
        for i in range(0, t * p, p):
            for j in range(0, h * q, q):
                for k in range(0, w * r, r):
                    x[:, i : i + p, j : j + q, k : k + r] = next(remaining).view(p, q, r, -1).permute(3, 0, 1, 2)
        latents.append(x)
    return latents


def solver_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    sigma: float,
    predictor: Sequence[float],
    corrector: Sequence[float] = (),
    last_sample: Tensor | None = None,
    earlier: Sequence[Tensor] = (),
    preview: tuple[Tensor, Tensor] | None = None,
    side: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Next latents, clean prediction, sample, and the preview's levels [T, side H, side W, 3] before rounding."""
    velocity = cond.double()
    if uncond is not None:
        velocity = uncond.double() + guidance_scale * (velocity - uncond.double())
    clean = latents.double() - sigma * velocity
    sample = latents.double()
    if corrector:
        assert last_sample is not None
        terms = zip(corrector, (last_sample.double(), clean, *(x.double() for x in earlier)), strict=False)
        sample = torch.stack([weight * tensor for weight, tensor in terms]).sum(0)
    terms = zip(predictor, (sample, clean, *(x.double() for x in earlier)), strict=False)
    moved = torch.stack([weight * tensor for weight, tensor in terms]).sum(0)
    if preview is None:
        return moved, clean, sample, None
    weight, bias = preview
    _, t, h, w = latents.shape
    levels = torch.empty(t, side * h, side * w, 3, dtype=torch.float64)
    for colour in range(3):
        for i in range(side):
            for j in range(side):
                row = colour * side**2 + i * side + j
                value = (weight[row].double()[:, None, None, None] * clean).sum(0) + bias[row].double()
                levels[:, i::side, j::side, colour] = ((value + 1) * 127.5).clamp(0, 255)
    return moved, clean, sample, levels


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(D) + bias) v of each sequence and head [N, H, D], and the logarithm of its sum [H, N]."""
    out = torch.empty(q.shape, dtype=torch.float64)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float64)
    for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for head in range(q.shape[1]):
            keys, values = k[k_start:k_stop, head].double(), v[k_start:k_stop, head].double()
            logits = q[q_start:q_stop, head].double() @ keys.T / q.shape[2] ** 0.5
            if bias is not None:
                logits = logits + bias[k_start:k_stop].double()
            lse[head, q_start:q_stop] = logits.logsumexp(-1)
            out[q_start:q_stop, head] = logits.softmax(-1) @ values
    return out, lse


def quantize_rows(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, dim] -> the nearest of `levels`, rising from 0, to |x| / s with x's sign; s = max|row| / largest."""
    x = x.double()
    scales = x.abs().amax(-1) / levels[-1]
    distances = (x.abs() / scales[:, None])[..., None] - levels
    return levels[distances.abs().argmin(-1)] * x.sign(), scales


def linear_quantized(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """act((values s) (weight t)^T + bias), with GELU(y) = y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))."""
    y = (values.double() * scales.double()[:, None]) @ (weight.double() * weight_scale.double()[:, None]).T
    if bias is not None:
        y = y + bias.double()
    if activation == "gelu_tanh":
        y = y / 2 * (1 + ((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)).tanh())
    return y


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    seen: Sequence[Tensor],
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention` over the keys that each query sees alone; seen[i] [H, queries, keys] is of sequence i.

    A query that sees none gets zeros, and -inf.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
    for mask, (q_start, q_stop), (k_start, _) in zip(seen, pairwise(cu_q), pairwise(cu_k), strict=True):
        for query in range(q_start, q_stop):
            for head in range(q.shape[1]):
                keys = mask[head, query - q_start].nonzero()[:, 0] + k_start
                logits = k[keys, head].double() @ q[query, head].double() / q.shape[2] ** 0.5
                logits = logits if bias is None else logits + bias[keys].double()
                if (logits > -torch.inf).any():
                    lse[head, query] = logits.logsumexp(0)
                    out[query, head] = logits.softmax(0) @ v[keys, head].double()
    return out, lse
