"""RMSNorm of q and k, then 3-D rotary embedding: pairs (x0, x1) of a head turn by the token's angle.

norm(x) = x / sqrt(mean(x^2) + eps) * w over all heads together, as Wan does it.
Source: RoFormer (arXiv 2104.09864); Wan (arXiv 2503.20314), section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rotation: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, 3 dim]; weights [dim]; rotation [N, D / 2] complex64. Returns q, k, v, each [N, H, D]."""
    q, k, v = qkv.chunk(3, dim=-1)
    dim = (q.shape[-1],)
    q, k = F.rms_norm(q, dim, q_weight, eps), F.rms_norm(k, dim, k_weight, eps)
    heads = (num_heads, -1)
    return rotate(q.unflatten(-1, heads), rotation), rotate(k.unflatten(-1, heads), rotation), v.unflatten(-1, heads)


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
