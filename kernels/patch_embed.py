"""3-D patch embedding straight into the packed token axis, and back.

Shape letters: C channels, T, H, W latent frames, rows and columns; p, q, r the patch's size along them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import linear

PatchSize = tuple[int, int, int]


def patch_embed(latents: list[Tensor], weight: Tensor, bias: Tensor, patch_size: PatchSize) -> Tensor:
    """Latents [C, T, H, W] of several shapes, weight [dim, C p q r] -> tokens [N, dim] in the weight's dtype."""
    patches = torch.cat([_to_patches(x, patch_size) for x in latents])
    return linear(patches.to(weight.dtype), weight, bias)


def unpatchify(tokens: Tensor, grids: list[tuple[int, int, int]], patch_size: PatchSize) -> list[Tensor]:
    """Tokens [N, p q r C] of sequences with these patch grids -> one [C, T, H, W] for each."""
    p, q, r = patch_size
    latents = []
    for part, (t, h, w) in zip(tokens.split([t * h * w for t, h, w in grids]), grids, strict=True):
        x = part.reshape(t, h, w, p, q, r, -1).permute(6, 0, 3, 1, 4, 2, 5)
        latents.append(x.reshape(-1, t * p, h * q, w * r))
    return latents


def _to_patches(x: Tensor, patch_size: PatchSize) -> Tensor:
    """[C, T, H, W] -> [(T/p H/q W/r), (C p q r)]."""
    p, q, r = patch_size
    c, t, h, w = x.shape
    x = x.reshape(c, t // p, p, h // q, q, w // r, r)
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, c * p * q * r)
