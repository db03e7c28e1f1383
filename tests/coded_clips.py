"""Clips coded chunk by chunk, for whoever compares two ways of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from skylapse.compile.stream import Coder, Run


def clip(coder: Coder, num_latents: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """A whole clip's input, as many latent frames as are said."""
    _, channels, _, height, width = coder.input_shape(1, *size, "first")
    frames = 1 + (num_latents - 1) * coder.in_frames
    return torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def stream(run: Run, coder: Coder, x: Tensor, chunk: int) -> Iterator[Tensor]:
    """Results of the clip's first frame and of its chunks of so many latent frames."""
    y, states = run(x[:, :, :1], None)
    yield y
    for part in x[:, :, 1:].split(chunk * coder.in_frames, dim=2):
        y, states = run(part, states)
        yield y


@torch.inference_mode()
def coded(run: Run, coder: Coder, x: Tensor, chunk: int) -> Tensor:
    return torch.cat(list(stream(run, coder, x, chunk)), dim=2)
