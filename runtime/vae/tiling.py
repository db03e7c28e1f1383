"""Large frames encoded and decoded as overlapping tiles with blended seams, each tile streaming with its own state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compile.stream import States

TileStates = list[States]
Chunk = Callable[[Tensor, States | None], tuple[Tensor, States]]
NEVER = 2**62  # pixels


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels of a frame. Frames of at most `threshold` pixels are done whole."""

    tile: int = 512
    overlap: int = 128
    threshold: int = 1280 * 736

    @classmethod
    def of(cls, side: int | str) -> Tiling:
        """Of SKYLAPSE_TILE: "auto", "none", or the side of a tile; then no frame takes more than a tile does."""
        if isinstance(side, int):
            return cls(tile=side, overlap=max(16, side // 64 * 16), threshold=side * side)
        return cls(threshold=NEVER) if side == "none" else cls()

    def __post_init__(self) -> None:
        if not 0 < self.overlap < self.tile:
            raise ValueError(f"overlap must lie between 0 and the tile's {self.tile} pixels, got {self.overlap}")

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """(h, w) in latents of what is coded at a time, of a frame of height x width latents."""
        if height * width * factor**2 <= self.threshold:
            return height, width
        return min(height, max(1, self.tile // factor)), min(width, max(1, self.tile // factor))

    def spans(self, length: int, factor: int) -> list[tuple[int, int]]:
        """(start, stop) in latents of the tiles along a side of `length` latents, `factor` pixels each."""
        tile, stride = max(1, self.tile // factor), max(1, (self.tile - self.overlap) // factor)
        if length <= tile:
            return [(0, length)]
        starts = [*range(0, length - tile, stride), length - tile]
        return [(start, start + tile) for start in starts]


def decode_tiled(
    run: Chunk, latents: Tensor, states: TileStates | None, tiling: Tiling, factor: int
) -> tuple[Tensor, TileStates]:
    """`WanVAE.decode_chunk` over tiles: latents [B, C, n, h, w] -> frames [B, 3, m, H, W] and every tile's states.

    factor: pixels a side of one latent.
    """
    return _tiled(run, latents, states, tiling, latents.shape[-2:], factor, in_scale=1, out_scale=factor)


def encode_tiled(
    run: Chunk, frames: Tensor, states: TileStates | None, tiling: Tiling, factor: int
) -> tuple[Tensor, TileStates]:
    """An encoder over tiles: frames [B, 3, m, H, W] -> the latents' means [B, C, n, h, w] and every tile's states."""
    size = torch.Size((frames.shape[-2] // factor, frames.shape[-1] // factor))
    return _tiled(run, frames, states, tiling, size, factor, in_scale=factor, out_scale=1)


def _tiled(
    run: Chunk,
    x: Tensor,
    states: TileStates | None,
    tiling: Tiling,
    size: torch.Size,
    factor: int,
    *,
    in_scale: int,
    out_scale: int,
) -> tuple[Tensor, TileStates]:
    """Run every tile of a frame of `size` latents and blend the results; the states are handed over tile by tile.

    Where tiles overlap they are averaged with weights that rise linearly from a tile's edge, so no seam shows.
    """
    if size[0] * size[1] * factor**2 <= tiling.threshold:
        y, new = run(x, states.pop() if states else None)
        return y, [new]
    new_states: TileStates = []
    total = weights = torch.empty(0)
    for top, bottom in tiling.spans(size[0], factor):
        for left, right in tiling.spans(size[1], factor):
            past = states.pop(0) if states else None
            rows, columns = slice(top * in_scale, bottom * in_scale), slice(left * in_scale, right * in_scale)
            y, new = run(x[..., rows, columns], past)
            if not new_states:
                total = y.new_zeros(*y.shape[:3], size[0] * out_scale, size[1] * out_scale, dtype=torch.float32)
                weights = torch.zeros_like(total[0, 0, 0])
            new_states.append(new)
            weight = _ramp(y.shape[3], y)[:, None] * _ramp(y.shape[4], y)
            rows, columns = slice(top * out_scale, bottom * out_scale), slice(left * out_scale, right * out_scale)
            total[..., rows, columns] += y.float() * weight
            weights[rows, columns] += weight
    return total.div_(weights).to(y.dtype), new_states


def _ramp(length: int, like: Tensor) -> Tensor:
    """Weights along a tile's side: 1, 2, 3, … from either edge."""
    position = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(position, position.flip(0))
