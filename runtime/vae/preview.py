"""Previews of a clip while it is being denoised: a linear map from latents to small pictures, fitted once per VAE.

Each latent position becomes SCALE x SCALE pixels of the frame that ends its group: one matrix product a preview, where
the decoder would cost more than a denoising step. With a distilled decoder's file the same pixels come from that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .codec import VideoCodec
from .taehv import TinyDecoder, load_tiny_decoder

logger = logging.getLogger(__name__)
FILE = "preview.safetensors"
SCALE = 4  # pixels a side for each latent
CLIPS, SIZE, FRAMES = 24, 64, 5  # what the map is fitted on


class Previewer:
    """Clean latents [C, T, H, W] -> uint8 frames [T, SCALE H, SCALE W, 3]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight [3 SCALE^2, C], bias [3 SCALE^2]: colours in [-1, 1] of the pixels that a latent covers."""
        self.weight, self.bias = weight, bias

    @property
    def linear(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias, for a kernel that makes the preview with the step."""
        return self.weight, self.bias

    def __call__(self, latents: Tensor) -> np.ndarray:
        with torch.inference_mode():
            colours = torch.einsum("pc,cthw->pthw", self.weight, latents) + self.bias[:, None, None, None]
            frames = F.pixel_shuffle(colours.transpose(0, 1), SCALE)  # [T, 3, SCALE H, SCALE W]
            return _levels(frames)


class TinyPreviewer:
    """The same frames of the same size by a distilled decoder, a chunk of latents at a time."""

    linear = None

    def __init__(self, decoder: TinyDecoder, codec: VideoCodec) -> None:
        self.decoder, self.codec = decoder, codec

    def __call__(self, latents: Tensor) -> np.ndarray:
        codec = self.codec
        size = latents.shape[2] * SCALE, latents.shape[3] * SCALE
        shown, states = [], None
        with torch.inference_mode():
            z = latents.to(codec.device, torch.float32)[None] * codec.std + codec.mean
            for chunk in (z[:, :, :1], *z[:, :, 1:].split(codec.chunk, dim=2)):
                if chunk.shape[2]:
                    step = 1 if states is None else codec.temporal_factor
                    frames, states = self.decoder(chunk, states)
                    last = frames[0, :, step - 1 :: step].transpose(0, 1)  # of each latent's group, [n, 3, H, W]
                    shown.append(F.interpolate(last, size, mode="area"))
            return _levels(torch.cat(shown))


AnyPreviewer = Previewer | TinyPreviewer


def _levels(frames: Tensor) -> np.ndarray:
    """[T, 3, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    levels = frames.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def load_previewer(folder: Path, codec: VideoCodec, decoder: Path | None = None) -> AnyPreviewer:
    """The map stored beside the model, or fitted now (seconds) and stored there if the folder can be written.

    decoder: file of a distilled decoder, which shows more. ValueError where it does not fit the model.
    """
    if decoder is not None:
        return TinyPreviewer(load_tiny_decoder(decoder, codec), codec)
    path = folder / FILE
    if path.exists():
        try:
            tensors = load_file(path)
            if tensors["weight"].shape == (3 * SCALE**2, codec.num_channels):
                return Previewer(tensors["weight"].to(codec.device), tensors["bias"].to(codec.device))
        except (SafetensorError, KeyError) as error:
            logger.warning("%s cannot be read (%s) and is fitted again", path, error)
    previewer = fit(codec)
    try:
        store(previewer, folder)
    except OSError as error:
        logger.warning("the preview map cannot be stored beside the model (%s)", error)
    return previewer


def store(previewer: Previewer, folder: Path) -> Path:
    """Write the map beside the model, whole or not at all."""
    part = folder / f"{FILE}.part"
    part.write_bytes(save({"weight": previewer.weight.cpu(), "bias": previewer.bias.cpu()}))  # `save_file`: mode 0600
    return part.replace(folder / FILE)


def fit(codec: VideoCodec, seed: int = 0) -> Previewer:
    """Least squares from latents to pixels, on moving blobs and gradients that the VAE itself encodes."""
    rows, targets = [], []
    side = codec.spatial_factor // SCALE if codec.spatial_factor % SCALE == 0 else 1
    for clip in _clips(seed):
        latents = codec.encode(clip)  # [C, T, H, W]
        shown = clip[:, :: codec.temporal_factor].to(codec.device)  # the last frame of each latent's group
        small = F.avg_pool2d(shown.transpose(0, 1), side)  # [T, 3, SCALE H, SCALE W]
        small = F.interpolate(small, (latents.shape[2] * SCALE, latents.shape[3] * SCALE), mode="area")
        rows.append(latents.flatten(1).T)
        targets.append(F.pixel_unshuffle(small, SCALE).transpose(0, 1).flatten(1).T)
    x, y = torch.cat(rows).double().cpu(), torch.cat(targets).double().cpu()
    x = F.pad(x, (0, 1), value=1.0)
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(x.T @ x + ridge, x.T @ y).float().to(codec.device)  # [C + 1, 3 SCALE^2]
    return Previewer(solution[:-1].T.contiguous(), solution[-1].contiguous())


def _clips(seed: int) -> Iterator[Tensor]:
    """Clips [3, FRAMES, SIZE, SIZE] in [-1, 1]: a gradient, and soft discs that move over it."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for _ in range(CLIPS):
        u = torch.rand(40, generator=generator) * 2 - 1
        clip = u[:3, None, None, None] * 0.7 + 0.4 * (u[3:6, None, None] * x + u[6:9, None, None] * y)[:, None]
        clip = clip.repeat(1, FRAMES, 1, 1)
        for k in range(3):
            cx, cy, dx, dy, radius = u[9 + 9 * k : 14 + 9 * k].tolist()
            colour = u[14 + 9 * k : 17 + 9 * k, None, None]
            for frame in range(FRAMES):
                distance = ((x - cx - 0.1 * dx * frame) ** 2 + (y - cy - 0.1 * dy * frame) ** 2).sqrt()
                inside = torch.sigmoid((0.15 + 0.3 * abs(radius) - distance) * 40)
                clip[:, frame] = clip[:, frame] * (1 - inside) + colour * inside
        yield clip.clamp(-1, 1)
