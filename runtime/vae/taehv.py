"""A tiny distilled decoder (TAEHV; TAEW2.1 for Wan2.1's latents): for previews, not for what a client keeps.

Shape letters: n latent frames of a chunk, C channels, h, w sides of the latents; F = n times the strides over time.

Architecture: github.com/madebyollin/taehv. 2-D convolutions; a memory block sees the frame before the one it works on,
which is the only state. Read from a local .safetensors file under the original's names; how wide it is, and how far it
enlarges, is read off the weights. Its latents are the normalised ones, so a module that takes Wan's divides first.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...compile.stream import Coder, States, owned
from .codec import VideoCodec

LEVELS = 3  # each doubles the sides
BLOCKS = 3  # memory blocks of a level


class MemoryBlock(nn.Module):
    """Convolutions over a frame and the one before it, around which the frame itself goes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        halves = [nn.Conv2d(2 * dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*halves, nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [F, C, h, w], past [1, C, h, w]: the frame before the first."""
        before = torch.cat((past, x[:-1]))
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class Grow(nn.Module):
    """Each frame becomes `stride` frames."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(dim, stride * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


class Squash(nn.Module):
    """Latents kept within what the decoder has seen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TinyDecoder(nn.Module):
    """The same function as `WanVAE.decode_chunk`: latents, not normalised, and states to frames and states."""

    def __init__(
        self,
        latent_channels: int,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        patch: int,
        mean: Tensor,
        std: Tensor,
    ) -> None:
        """widths: of the three levels and of the last convolution; mean, std: the latents', [C, 1, 1]."""
        super().__init__()
        layers: list[nn.Module] = [Squash(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for width, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [*(MemoryBlock(width) for _ in range(BLOCKS)), nn.Upsample(scale_factor=2.0), Grow(width, stride)]
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(widths[-1], 3 * patch**2, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)  # numbered as the original's, which its weights are named by
        self.patch = patch
        self.register_buffer("mean", mean, persistent=True)
        self.register_buffer("std", std, persistent=True)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, latents: Tensor, states: States | None) -> tuple[Tensor, States]:
        """latents [1, C, n, h, w]; returns frames [1, 3, F, H, W] in [-1, 1], one for the first latent."""
        x = (latents.squeeze(0).transpose(0, 1) - self.mean) / self.std  # [n, C, h, w]
        new: States = []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                past = torch.zeros_like(x[:1]) if states is None else states.pop(0).squeeze(0).transpose(0, 1)
                new.append(owned(x[-1:]).transpose(0, 1).unsqueeze(0))
                x = layer(x, past)
            else:
                x = layer(x)
        if states is None:  # of the first group only the last frame is shown
            x = x[-1:]
        frames = F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
        return (frames.clamp(0, 1) * 2 - 1).transpose(0, 1).unsqueeze(0), new


def load_tiny_decoder(path: Path, codec: VideoCodec) -> TinyDecoder:
    """The decoder of a file for a model's latents; ValueError in one line where the file is none or does not fit."""
    weights = _read(path)
    try:
        latent_channels = weights["decoder.1.weight"].shape[1]
        convolutions = ("decoder.1", "decoder.8", "decoder.14", "decoder.20")
        widths = tuple(weights[f"{name}.weight"].shape[0] for name in convolutions)
        grown = (weights[f"decoder.{index}.conv.weight"] for index in (7, 13, 19))
        strides = tuple(weight.shape[0] // weight.shape[1] for weight in grown)
        patch = round((weights["decoder.22.weight"].shape[0] / 3) ** 0.5)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is no TAEHV decoder: it has no {error}") from None
    factors = 2**LEVELS * patch, strides[0] * strides[1] * strides[2], latent_channels
    wanted = codec.spatial_factor, codec.temporal_factor, codec.num_channels
    if factors != wanted:
        told = "{} pixels and {} frames of latents of {} channels"
        raise ValueError(f"{path} makes {told.format(*factors)}; the model needs {told.format(*wanted)}")
    with torch.device("meta"):
        mean, std = (torch.empty(latent_channels, 1, 1) for _ in range(2))
        decoder = TinyDecoder(latent_channels, widths, strides, patch, mean, std)
    statistics = {name: tensor.view(-1, 1, 1) for name, tensor in (("mean", codec.mean), ("std", codec.std))}
    try:
        decoder.load_state_dict(weights | statistics, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no TAEHV decoder: {' '.join(str(error).split())[:300]}") from None
    return decoder.to(codec.device, torch.float32).requires_grad_(False).eval()


def tiny_decoder_of(decoder: TinyDecoder, codec: VideoCodec) -> Coder:
    """As the backends of `compile` see it."""
    return Coder(
        kind="decoder",
        module=decoder,
        in_channels=codec.num_channels,
        out_channels=3,
        in_scale=1,
        out_scale=codec.spatial_factor,
        in_frames=1,
        out_frames=codec.temporal_factor,
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The decoder's tensors in fp32. Other formats are pickles, which can run code."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"a tiny decoder must be a .safetensors file, got {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys() if name.startswith("decoder.")}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
