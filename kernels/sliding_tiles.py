"""Sliding tiles in three dimensions: which tiles of a latent grid each tile attends to.

A grid of T x H x W tokens is cut into tiles, and a tile's queries attend to the tiles of a window around it. At the
border the window is moved inside, so that every tile sees equally many. Tokens are put into the order of tiles, in
which a tile is one block of keys: no block is masked in part, but for the smaller ones at the ends of a grid that the
tile does not divide.

Source: Sliding Tile Attention (arXiv 2502.04507), algorithm 1; smaller tiles at the ends are ours.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, product
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_sparse import BlockLists

Triple = tuple[int, int, int]


class SlidingTiles(NamedTuple):
    """Of one sequence of n tokens: x[order] are its tokens tile by tile, y[order.argsort()] puts them back."""

    order: Tensor  # [n] int64, on the host
    lists: BlockLists


@lru_cache(maxsize=64)
def sliding_tiles(grid: Triple, tile: Triple, window: Triple) -> SlidingTiles:
    """grid: tokens along time, height, width, as the pack has them; tile: tokens of a tile along each; window: tiles
    that a tile attends to along each, itself among them. A window as wide as the grid is full attention."""
    for name, triple in (("grid", grid), ("tile", tile), ("window", window)):
        if len(triple) != 3 or min(triple) < 1:
            raise ValueError(f"{name} must be three positive numbers, got {triple}")
    counts = tuple(ceil(length / side) for length, side in zip(grid, tile, strict=True))
    t, h, w = (torch.arange(length) // side for length, side in zip(grid, tile, strict=True))
    tiles = ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()
    bounds = tuple(accumulate(tiles.bincount(minlength=prod(counts)).tolist(), initial=0))
    seen = [_windows(count, side) for count, side in zip(counts, window, strict=True)]
    lists = tuple(
        tuple((i * counts[1] + j) * counts[2] + k for i, j, k in product(*windows)) for windows in product(*seen)
    )
    return SlidingTiles(tiles.argsort(stable=True), BlockLists(bounds, bounds, (lists,)))


def _windows(count: int, window: int) -> list[range]:
    """Along one axis of `count` tiles: what each of them sees."""
    window = min(window, count)
    starts = (min(max(tile - window // 2, 0), count - window) for tile in range(count))
    return [range(start, start + window) for start in starts]
