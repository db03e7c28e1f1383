"""Large frames decoded as overlapping tiles with blended seams, each tile streaming with its own state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .wan import States, WanVAE

TileStates = list[States]


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels of a decoded frame. Frames of at most `threshold` pixels are decoded whole."""

    tile: int = 512
    overlap: int = 128
    threshold: int = 1280 * 736

    def __post_init__(self) -> None:
        if not 0 < self.overlap < self.tile:
            raise ValueError(f"overlap must lie between 0 and the tile's {self.tile} pixels, got {self.overlap}")

    def spans(self, length: int, factor: int) -> list[tuple[int, int]]:
        """(start, stop) in latent units of the tiles along one side of `length` latents, each with the same overlap."""
        tile, stride = max(1, self.tile // factor), max(1, (self.tile - self.overlap) // factor)
        if length <= tile:
            return [(0, length)]
        starts = [*range(0, length - tile, stride), length - tile]
        return [(start, start + tile) for start in starts]


def decode_tiled(vae: WanVAE, latents: Tensor, states: TileStates | None, tiling: Tiling) -> tuple[Tensor, TileStates]:
    """`WanVAE.decode_chunk` over tiles: latents [B, C, n, h, w] -> frames [B, 3, m, H, W] and every tile's states.

    Where tiles overlap they are averaged with weights that rise linearly from the edge, so no seam shows.
    """
    factor = vae.config.scale_factor_spatial
    height, width = latents.shape[3] * factor, latents.shape[4] * factor
    if height * width <= tiling.threshold:
        frames, new = vae.decode_chunk(latents, states[0] if states else None)
        return frames, [new]
    rows, columns = tiling.spans(latents.shape[3], factor), tiling.spans(latents.shape[4], factor)
    new_states: TileStates = []
    total = weights = None
    for top, bottom in rows:
        for left, right in columns:
            past = states[len(new_states)] if states else None
            tile, new = vae.decode_chunk(latents[..., top:bottom, left:right], past)
            new_states.append(new)
            if total is None or weights is None:
                total = tile.new_zeros(*tile.shape[:3], height, width, dtype=torch.float32)
                weights = tile.new_zeros(height, width, dtype=torch.float32)
            weight = _ramp(tile.shape[3], tile)[:, None] * _ramp(tile.shape[4], tile)
            area = (slice(top * factor, bottom * factor), slice(left * factor, right * factor))
            total[..., area[0], area[1]] += tile.float() * weight
            weights[area] += weight
    assert total is not None and weights is not None
    return (total / weights).to(latents.dtype), new_states


def _ramp(length: int, like: Tensor) -> Tensor:
    """Weights along a tile's side: 1, 2, 3, … from either edge."""
    position = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(position, position.flip(0))
