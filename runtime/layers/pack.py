"""Sequences of different shapes packed into one token axis.

Shape letters: S sequences (a request has one for each guidance branch), N tokens, L context rows, H heads, D head
size. A pack's layout changes only when a request joins or leaves, so it is built once and reused from step to step;
what changes every step (latents, timesteps) travels beside it. All counts are host integers, and what a device needs of
them is sent without waiting: nothing here synchronises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from ...kernels.tables import send

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
    images = [s.image for s in sequences if s.image is not None]
    if images and len(images) != len(sequences):
        raise ValueError("a pack is image-conditioned as a whole or not at all")
    return Pack(
        grids=grids,
        cu_seqlens=_cumulative([t * h * w for t, h, w in grids]),
        modulation_ids=_modulation_ids(sequences, device),
        rotation=build_rotation(head_dim, grids, device),
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


def build_rotation(head_dim: int, grids: Items[Grid], device: torch.device) -> Tensor:
    """RoPE factors [N, D / 2] complex64 of patch grids behind each other: a head's pairs are shared out to time, height
    and width.

    Angles are computed in float64, as the reference has them. What is sent is a row for each place along an axis, some
    kB; a token's factors (at 720p and 81 frames 39 MB of them) are put together on the device. Source: Wan (arXiv
    2503.20314), RoFormer (arXiv 2104.09864).
    """
    side = 2 * (head_dim // 6)
    dims = (head_dim - 2 * side, side, side)
    distinct = list(dict.fromkeys(grids))
    axes = [(length, dim) for grid in distinct for length, dim in zip(grid, dims, strict=True)]
    sent = send(torch.tensor(np.concatenate([_axis_rotation(length, dim) for length, dim in axes])), device)
    parts = iter(sent.split([length * dim // 2 for length, dim in axes]))
    rotation_of = {grid: [next(parts).view(length, -1) for length in grid] for grid in distinct}
    rotation = torch.empty(sum(t * h * w for t, h, w in grids), head_dim // 2, dtype=torch.complex64, device=device)
    start = 0
    for grid, equal in groupby(grids):
        (t, h, w), count = grid, len(list(equal))
        stop = start + count * t * h * w
        along_t, along_h, along_w = rotation_of[grid]
        of_time, of_height, of_width = (
            rotation[start:stop].view(count, t, h, w, -1).split([dim // 2 for dim in dims], dim=-1)
        )
        of_time.copy_(along_t[:, None, None])
        of_height.copy_(along_h[:, None])
        of_width.copy_(along_w)
        start = stop
    return rotation


@lru_cache(maxsize=256)
def _axis_rotation(length: int, dim: int) -> np.ndarray:
    """complex64 [length dim / 2], on the host."""
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, dim, 2) / dim))
    return (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64).ravel()


def _modulation_ids(sequences: Items[Sequence], device: torch.device) -> Tensor:
    """[N] int64 on the device, of which a number for each frame is sent."""
    sent = send(torch.tensor([number for s in sequences for number in s.modulations], dtype=torch.int64), device)
    frames = sent.split([len(s.modulations) for s in sequences])
    per_frame = [s.grid[1] * s.grid[2] for s in sequences]
    return torch.cat([ids[:, None].expand(-1, n).flatten() for ids, n in zip(frames, per_frame, strict=True)])


def _cumulative(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))
