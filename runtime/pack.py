"""Sequences of different shapes packed into one token axis.

Shape letters: S sequences (a request has one for each guidance branch), N tokens, L context rows, H heads, D head
size. A pack's layout changes only when a request joins or leaves, so it is built once and reused from step to step;
what changes every step (latents, timesteps) travels beside it. All counts are host integers: nothing here
synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TextContext:
    """A prompt's cross-attention keys and values for every block, shared by requests with the same prompt."""

    keys_values: Tensor  # [num_layers, 2, L, H, D]
    key_bias: Tensor  # [L] fp32

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes + self.key_bias.nbytes


@dataclass(frozen=True)
class Sequence:
    """One denoising trajectory's place in a pack."""

    grid: Grid  # patches along time, height, width
    modulations: tuple[int, ...]  # for each frame of the grid, which of the pack's timesteps it is at
    text: TextContext
    image: Tensor | None = None  # [num_layers, 2, L, H, D]


@dataclass(frozen=True)
class Context:
    """What the pack's sequences cross-attend to."""

    keys_values: Tensor  # [num_layers, 2, L, H, D], all sequences behind each other
    cu_seqlens: tuple[int, ...]
    key_bias: Tensor | None  # [L]

    def alone(self) -> Iterator[Context]:
        """Of each sequence, on the same memory."""
        for start, stop in pairwise(self.cu_seqlens):
            bias = None if self.key_bias is None else self.key_bias[start:stop]
            yield Context(self.keys_values[:, :, start:stop], (0, stop - start), bias)


@dataclass(frozen=True)
class Pack:
    """The token axis: where sequences lie, and what each token is at."""

    grids: list[Grid]
    cu_seqlens: tuple[int, ...]  # [S + 1], 0 to N
    modulation_ids: Tensor  # [N] int64
    rotation: Tensor  # [N, D / 2] complex64
    text: Context
    image: Context | None

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    def alone(self) -> Iterator[Pack]:
        """A pack of each sequence, on the same memory."""
        images = self.image.alone() if self.image is not None else iter([None] * len(self.grids))
        spans = zip(self.grids, pairwise(self.cu_seqlens), self.text.alone(), images, strict=True)
        for grid, (start, stop), text, image in spans:
            ids, rotation = self.modulation_ids[start:stop], self.rotation[start:stop]
            yield Pack([grid], (0, stop - start), ids, rotation, text, image)


def each_alone(
    trunk: Callable[[Tensor, Tensor, Pack, slice], Tensor],
    tokens: Tensor,
    modulation: Tensor,
    pack: Pack,
    blocks: slice,
) -> Tensor:
    """A range of blocks over one sequence after the other: the activations of one, for as many passes.

    Tokens [N, dim] of the whole pack -> [N, dim].
    """
    parts = tokens.split([stop - start for start, stop in pairwise(pack.cu_seqlens)])
    return torch.cat([trunk(part, modulation, own, blocks) for part, own in zip(parts, pack.alone(), strict=True)])


def build_pack(sequences: Items[Sequence], head_dim: int, device: torch.device) -> Pack:
    """Lay out S sequences behind each other; `modulations` of all of them index one list of timesteps."""
    grids = [s.grid for s in sequences]
    ids = [torch.tensor(s.modulations, dtype=torch.int64).repeat_interleave(s.grid[1] * s.grid[2]) for s in sequences]
    rotations = {grid: build_rotation(head_dim, grid, device) for grid in set(grids)}
    images = [s.image for s in sequences if s.image is not None]
    if images and len(images) != len(sequences):
        raise ValueError("a pack is image-conditioned as a whole or not at all")
    return Pack(
        grids=grids,
        cu_seqlens=_cumulative([t * h * w for t, h, w in grids]),
        modulation_ids=torch.cat(ids).to(device),
        rotation=torch.cat([rotations[grid] for grid in grids]),
        text=Context(
            keys_values=torch.cat([s.text.keys_values for s in sequences], dim=2),
            cu_seqlens=_cumulative([len(s.text.key_bias) for s in sequences]),
            key_bias=torch.cat([s.text.key_bias for s in sequences]),
        ),
        image=Context(
            keys_values=torch.cat(images, dim=2),
            cu_seqlens=_cumulative([image.shape[2] for image in images]),
            key_bias=None,
        )
        if images
        else None,
    )


@lru_cache(maxsize=64)
def build_rotation(head_dim: int, grid: Grid, device: torch.device) -> Tensor:
    """RoPE factors [t h w, D / 2] complex64 of a patch grid: a head's pairs are shared out to time, height and width.

    Angles are computed in float64, as the reference has them. Source: Wan (arXiv 2503.20314), RoFormer (arXiv
    2104.09864).
    """
    side = 2 * (head_dim // 6)
    axes = []
    for axis, (length, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        axes.append(angles.view(shape).expand(*grid, dim // 2))
    angles = torch.cat(axes, dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(device)


def _cumulative(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
