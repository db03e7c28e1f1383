"""Frames <-> normalised latents, chunk by chunk, in memory that does not grow with the clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...kernels.tables import send
from .overlap import CudaLane, Lane, overlapped
from .tiling import Chunk, Tiling, decode_tiled, encode_tiled
from .wan import States, WanVAE

Frames = np.ndarray  # uint8 [frames, height, width, 3]


class VideoCodec:
    """A VAE with its latents' statistics: (z - mean) / std is what the denoiser works on."""

    def __init__(self, vae: WanVAE, *, device: torch.device, chunk: int = 4, tiling: Tiling | None = None) -> None:
        config = vae.config
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise ValueError(f"{name} must have {config.z_dim} values, got {len(getattr(config, name))}")
        self.vae = vae
        self.device = device
        self.dtype = next(vae.parameters()).dtype
        self.chunk = chunk
        self.lane: Lane | None = CudaLane(device) if device.type == "cuda" else None
        self.tiling = tiling or Tiling()
        self.temporal_factor = config.scale_factor_temporal
        self.spatial_factor = config.scale_factor_spatial
        self.num_channels = config.z_dim
        shape = (1, config.z_dim, 1, 1, 1)
        # What codes a clip whose latents (or whose tiles of them) are h x w; asked once a clip. `Decoders` sets them.
        self.choose_decoder: Callable[[int, int], Chunk] = lambda height, width: vae.decode_chunk
        self.choose_encoder: Callable[[int, int], Chunk] = lambda height, width: self._encode_means
        self.mean = torch.tensor(list(config.latents_mean), dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(list(config.latents_std), dtype=torch.float32, device=device).view(shape)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of a clip's latents; num_frames is temporal_factor * k + 1."""
        factor = self.spatial_factor
        return self.num_channels, (num_frames - 1) // self.temporal_factor + 1, height // factor, width // factor

    def encode(self, frames: Frames | Tensor) -> Tensor:
        """Latents [C, T, H, W] fp32 (the posterior's mean, normalised) of a clip of 4k+1 frames.

        frames: uint8 [F, H, W, 3], or float [3, F, H, W] in [-1, 1].
        """
        return torch.cat(list(self.encode_chunks(frames)), dim=1)

    def encode_chunks(self, frames: Frames | Tensor) -> Iterator[Tensor]:
        """The same latents [C, n, H, W] as soon as each chunk is encoded; the first chunk is the first frame's."""
        num_frames = self._num_frames(frames)
        if (num_frames - 1) % self.temporal_factor:
            raise ValueError(f"num_frames must be {self.temporal_factor}k+1 to be encoded, got {num_frames}")
        states = None
        factor = self.spatial_factor
        height, width = self._sides(frames)
        if height % factor or width % factor:
            raise ValueError(f"frames' sides must be multiples of {factor} to be encoded, got {height} x {width}")
        run = self.choose_encoder(*self.tiling.size(height // factor, width // factor, factor))
        starts = (0, *range(1, num_frames, self.chunk * self.temporal_factor), num_frames)
        for start, stop in pairwise(starts):
            with torch.inference_mode():  # never across a yield: the caller would inherit it
                chunk = self._pixels(frames, start, stop).to(self.dtype)
                means, states = encode_tiled(run, chunk, states, self.tiling, factor)
                latents = (means.float() - self.mean) / self.std
            yield latents[0]

    def decode(self, latents: Tensor) -> Iterator[Frames]:
        """uint8 frames [n, H, W, 3] of normalised latents [C, T, H, W], as soon as each chunk is decoded.

        On CUDA beside what the caller queues between two chunks; see overlap.py.
        """
        levels = self._levels(latents)
        if self.lane is not None:
            yield from overlapped(levels, self.lane, latents)
        else:
            yield from (chunk.cpu().numpy() for chunk in levels)

    def _levels(self, latents: Tensor) -> Iterator[Tensor]:
        """The same frames, on the device."""
        for chunk in self.decode_float(latents):
            with torch.inference_mode():
                levels = chunk.float().add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
            yield levels.permute(1, 2, 3, 0).contiguous()

    def decode_float(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames [3, n, H, W] in the VAE's dtype, not clamped; the first chunk is the first frame."""
        with torch.inference_mode():
            z = (latents.to(self.device, torch.float32)[None] * self.std + self.mean).to(self.dtype)
        states = None
        run = self.choose_decoder(*self.tiling.size(z.shape[-2], z.shape[-1], self.spatial_factor))
        for chunk in (z[:, :, :1], *z[:, :, 1:].split(self.chunk, dim=2)):
            if chunk.shape[2]:
                with torch.inference_mode():
                    frames, states = decode_tiled(run, chunk, states, self.tiling, self.spatial_factor)
                yield frames[0]

    def _encode_means(self, frames: Tensor, states: States | None) -> tuple[Tensor, States]:
        moments, states = self.vae.encode_chunk(frames, states)
        return moments.chunk(2, dim=1)[0], states

    @staticmethod
    def _sides(frames: Frames | Tensor) -> tuple[int, int]:
        """(height, width)"""
        height, width = frames.shape[1:3] if isinstance(frames, np.ndarray) else frames.shape[2:]
        return int(height), int(width)

    def _num_frames(self, frames: Frames | Tensor) -> int:
        if isinstance(frames, np.ndarray):
            if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
                raise ValueError(f"frames must be uint8 [frames, height, width, 3], got {frames.dtype} {frames.shape}")
            return len(frames)
        if frames.ndim != 4 or frames.shape[0] != 3:
            raise ValueError(f"frames must be [3, frames, height, width], got {tuple(frames.shape)}")
        return frames.shape[1]

    def _pixels(self, frames: Frames | Tensor, start: int, stop: int) -> Tensor:
        """[1, 3, n, H, W] fp32 in [-1, 1] of these frames alone: a whole clip would be four times its bytes."""
        if isinstance(frames, np.ndarray):
            chunk = torch.tensor(frames[start:stop]).permute(3, 0, 1, 2) / 127.5 - 1
        else:
            chunk = frames[:, start:stop]
        return send(chunk.float(), self.device)[None]
