"""Frames <-> normalised latents, chunk by chunk, in memory that does not grow with the clip."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...compile.stream import DTYPES, copied
from ...kernels.tables import send
from ..core.events import is_out_of_memory
from .coders import WanDecoder, WanEncoder, move
from .overlap import CudaLane, Lane, overlapped
from .tiling import Chunk, TileStates, Tiling, decode_tiled, encode_tiled
from .wan import WanVAE

logger = logging.getLogger(__name__)
Frames = np.ndarray  # uint8 [frames, height, width, 3]
# From which to which latent frame of a clip, and the states before it -> what that is coded to, and the states after.
Code = Callable[[int, int, TileStates | None], tuple[Tensor, TileStates]]


def decoder_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of `auto`: bf16 on CUDA, where it halves time and memory, and fp32 on a CPU, where it is the quicker one."""
    return DTYPES[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


class VideoCodec:
    """A VAE with its latents' statistics: (z - mean) / std is what the denoiser works on.

    `encoder` and `decoder` are the modules that eager encoding and decoding read. Who moves one between host and
    device sets its parameters' data; nothing here keeps a weight, or asks one where it is.
    """

    def __init__(
        self,
        vae: WanVAE,
        *,
        device: torch.device,
        chunk: int | None = None,
        tiling: Tiling | None = None,
        decoder_dtype: torch.dtype | None = None,
    ) -> None:
        """vae: in fp32, which is what encodes; it is brought to `device`.

        chunk: latent frames at a time where a clip does not say; None is 4. decoder_dtype: by default the VAE's. Where
        another one decodes, the VAE's own decoder stays behind as what compiled ones are made from and judged by, on
        the host, where it takes no memory of a device.
        """
        config = vae.config
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise ValueError(f"{name} must have {config.z_dim} values, got {len(getattr(config, name))}")
        self.vae = vae
        self.device = device
        self.dtype = next(vae.encoder.parameters()).dtype
        self.decoder_dtype = decoder_dtype or self.dtype
        self.encoder, self.decoder = WanEncoder(vae), WanDecoder(vae)
        if self.decoder_dtype != self.dtype:
            master, self.decoder = self.decoder, copied(self.decoder, device, self.decoder_dtype)
            move(master, torch.device("cpu") if device.type == "cuda" else device)
        for module in (self.encoder, self.decoder):
            move(module, device)
        self.chunk = 4 if chunk is None else chunk
        self.lane: Lane | None = CudaLane(device) if device.type == "cuda" else None
        self.tiling = tiling or Tiling()
        self.temporal_factor = config.scale_factor_temporal
        self.spatial_factor = config.scale_factor_spatial
        self.num_channels = config.z_dim
        shape = (1, config.z_dim, 1, 1, 1)
        # What codes a clip whose latents (or whose tiles of them) are h x w; asked once a clip. `Decoders` sets them.
        self.choose_decoder: Callable[[int, int], Chunk] = lambda height, width: self.decoder
        self.choose_encoder: Callable[[int, int], Chunk] = lambda height, width: self.encoder
        self.require: Callable[[str], None] = lambda part: None  # has the "encoder" or "decoder" on the device
        self.mean = torch.tensor(list(config.latents_mean), dtype=torch.float32, device=device).view(shape)
        self.std = torch.tensor(list(config.latents_std), dtype=torch.float32, device=device).view(shape)

    def by(self, chunk: int, tiling: Tiling) -> VideoCodec:
        """The same codec with these for its own."""
        other = copy.copy(self)
        other.chunk, other.tiling = chunk, tiling
        return other

    def eagerly(self) -> VideoCodec:
        """The same weights, coded with by torch alone whatever has been chosen here."""
        other = copy.copy(self)
        other.choose_decoder = lambda height, width: self.decoder
        other.choose_encoder = lambda height, width: self.encoder
        return other

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of a clip's latents; num_frames is temporal_factor * k + 1."""
        factor = self.spatial_factor
        return self.num_channels, (num_frames - 1) // self.temporal_factor + 1, height // factor, width // factor

    def encode(self, frames: Frames | Tensor, *, chunk: int | None = None, tiling: Tiling | None = None) -> Tensor:
        """Latents [C, T, H, W] fp32 (the posterior's mean, normalised) of a clip of 4k+1 frames.

        frames: uint8 [F, H, W, 3], or float [3, F, H, W] in [-1, 1]. chunk, tiling: see `decode`.
        """
        return torch.cat(list(self.encode_chunks(frames, chunk=chunk, tiling=tiling)), dim=1)

    def encode_chunks(
        self, frames: Frames | Tensor, *, chunk: int | None = None, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        """The same latents [C, n, H, W] as soon as each chunk is encoded; the first chunk is the first frame's."""
        num_frames = self._num_frames(frames)
        factor, tiles = self.spatial_factor, tiling or self.tiling
        if (num_frames - 1) % self.temporal_factor:
            raise ValueError(f"num_frames must be {self.temporal_factor}k+1 to be encoded, got {num_frames}")
        height, width = self._sides(frames)
        if height % factor or width % factor:
            raise ValueError(f"frames' sides must be multiples of {factor} to be encoded, got {height} x {width}")
        self.require("encoder")  # the choice may compare a compiled one with it
        run = self.choose_encoder(*tiles.size(height // factor, width // factor, factor))

        def encode(start: int, stop: int, states: TileStates | None) -> tuple[Tensor, TileStates]:
            first = 0 if start == 0 else (start - 1) * self.temporal_factor + 1
            self.require("encoder")
            pixels = self._pixels(frames, first, (stop - 1) * self.temporal_factor + 1).to(self.dtype)
            means, states = encode_tiled(run, pixels, states, tiles, factor)
            return ((means.float() - self.mean) / self.std)[0], states

        return self._pieces(encode, (num_frames - 1) // self.temporal_factor + 1, chunk or self.chunk)

    def decode(
        self, latents: Tensor, *, chunk: int | None = None, tiling: Tiling | None = None, beside: bool = True
    ) -> Iterator[Frames]:
        """uint8 frames [n, H, W, 3] of normalised latents [C, T, H, W], as soon as each chunk is decoded.

        chunk: latent frames at a time, the first one aside; tiling: of frames too large to be done whole. The codec's
        own by default. The first changes nothing but memory and time, the second blends seams.
        On CUDA beside what the caller queues between two chunks, unless memory is too short for both; see overlap.py.
        """
        levels = self._levels(latents, chunk, tiling)
        if self.lane is not None and beside:
            yield from overlapped(levels, self.lane, latents)
        else:
            for frames in levels:
                host = frames.cpu().numpy()
                del frames
                yield host

    def _levels(self, latents: Tensor, chunk: int | None, tiling: Tiling | None) -> Iterator[Tensor]:
        """The same frames, on the device."""
        for frames in self.decode_float(latents, chunk=chunk, tiling=tiling):
            with torch.inference_mode():
                levels = frames.float().add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
                levels = levels.permute(1, 2, 3, 0).contiguous()
            del frames  # no chunk is kept while the next one is made
            yield levels
            del levels

    def decode_float(
        self, latents: Tensor, *, chunk: int | None = None, tiling: Tiling | None = None
    ) -> Iterator[Tensor]:
        """Frames [3, n, H, W] in the decoder's dtype, not clamped; the first chunk is the first frame."""
        tiles = tiling or self.tiling
        with torch.inference_mode():
            z = (latents.to(self.device, torch.float32)[None] * self.std + self.mean).to(self.decoder_dtype)
        self.require("decoder")  # the choice may compare a compiled one with it
        run = self.choose_decoder(*tiles.size(z.shape[-2], z.shape[-1], self.spatial_factor))

        def decode(start: int, stop: int, states: TileStates | None) -> tuple[Tensor, TileStates]:
            self.require("decoder")
            frames, states = decode_tiled(run, z[:, :, start:stop], states, tiles, self.spatial_factor)
            return frames[0], states

        return self._pieces(decode, z.shape[2], chunk or self.chunk)

    def _pieces(self, code: Code, num_latents: int, chunk: int) -> Iterator[Tensor]:
        """[C, n, H, W] of the first latent frame, then of `chunk` of them at a time.

        Eager coding uses its states up, so a chunk cannot be tried twice: where memory is short the clip begins anew,
        once, with chunks of 1. What the caller has by then comes out the same, and is skipped.
        """
        given = 0
        for size, is_last in ((chunk, False), (1, True)):
            try:
                for piece in self._attempt(code, num_latents, size, given):
                    given += piece.shape[1]
                    yield piece
                    del piece  # or it would live while the next one is made
            except Exception as error:
                if is_last or not is_out_of_memory(error):
                    raise
                logger.warning("out of memory: a clip is coded anew in chunks of 1 (%s)", str(error).splitlines()[0])
            else:
                return

    @staticmethod
    def _attempt(code: Code, num_latents: int, chunk: int, skip: int) -> Iterator[Tensor]:
        """All pieces of a clip but the first `skip` frames."""
        states = None
        for start, stop in pairwise(sorted({0, *range(1, num_latents, chunk), num_latents})):
            with torch.inference_mode():  # never across a yield: the caller would inherit it
                piece, states = code(start, stop, states)
            skipped = min(skip, piece.shape[1])
            skip -= skipped
            piece = piece[:, skipped:]
            if piece.shape[1]:
                yield piece
            del piece

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
