"""Adaptive layer norm: y = LayerNorm(x) * (1 + scale) + shift, and the gated residual x + y * gate.

Modulation rows come from a table by a token's index; a table of one row serves all tokens. Arithmetic is fp32.
Source: DiT (arXiv 2212.09748), section 3.2, as Wan uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def adaln(x: Tensor, shift: Tensor, scale: Tensor, ids: Tensor, eps: float) -> Tensor:
    """x [N, dim]; shift and scale [num_modulations, dim] fp32; ids [N] into them. Returns [N, dim] in x's dtype."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return torch.addcmul(rows(shift, ids), normed, 1 + rows(scale, ids)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    """x + y * gate; x and y [N, dim], gate [num_modulations, dim] fp32, ids [N]. Returns [N, dim] in x's dtype."""
    return torch.addcmul(x.float(), y.float(), rows(gate, ids)).to(x.dtype)


def rows(table: Tensor, ids: Tensor) -> Tensor:
    """The tokens' rows of a modulation table; one row is broadcast instead of gathered."""
    return table if len(table) == 1 else table.index_select(0, ids)
