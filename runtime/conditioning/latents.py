"""Given frames: what a request shows the model beside the prompt.

Every kind of conditioning is "some frames are given, denoise the rest". Two kinds of checkpoint take them differently:
clean latent frames at timestep 0 (Wan2.2-TI2V, the demo model), or extra input channels (Wan2.1 and Wan2.2-A14B I2V).

Shape letters: C latent channels, T latent frames, H, W latent rows and columns, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.tables import send
from ..core.request import VideoRequest
from ..vae.codec import VideoCodec
from .given import Given


@dataclass(frozen=True)
class Conditioning:
    """How the model's input is made of the latents; without given frames it is the latents themselves."""

    frame_is_given: tuple[bool, ...]  # for each latent frame, whether it is clean and at timestep 0 (host side)
    given: Tensor | None = None  # [C, T, H, W], clean where `mask` is set
    mask: Tensor | None = None  # [1, T, 1, 1] bool, `frame_is_given` on the device
    channels: Tensor | None = None  # [4 + C, T, H, W], concatenated to the latents
    pixels: tuple[Given, ...] = ()  # pasted back after decoding

    @property
    def num_pasted(self) -> int:
        """Frames whose pixels are kept."""
        return sum(len(piece.frames) for piece in self.pixels)

    @property
    def num_bytes(self) -> int:
        tensors = (self.given, self.mask, self.channels)
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held + sum(piece.frames.nbytes for piece in self.pixels)

    def model_input(self, latents: Tensor) -> Tensor:
        """Latents [C, T, H, W] -> the denoiser's input [C_in, T, H, W]."""
        if self.channels is not None:
            return torch.cat((latents, self.channels))
        return self.apply(latents)

    def apply(self, latents: Tensor) -> Tensor:
        """The latents with the given frames in their places."""
        if self.given is None or self.mask is None:
            return latents
        return torch.where(self.mask, self.given, latents)

    def paste(self, frames: np.ndarray, start: int) -> np.ndarray:
        """Decoded frames [n, H, W, 3] that begin at frame `start`, with the given pixels in their places."""
        for piece in self.pixels:
            first, stop = max(start, piece.start), min(start + len(frames), piece.start + len(piece.frames))
            if first < stop:
                frames[first - start : stop - start] = piece.frames[first - piece.start : stop - piece.start]
        return frames


def encode_given(codec: VideoCodec, pixels: np.ndarray | Tensor) -> Iterator[Tensor]:
    """Latents [C, n, H, W] of given frames, encoded as a clip of their own, chunk by chunk.

    pixels: uint8 [4n-3, H, W, 3], or float [3, 4n-3, H, W] in [-1, 1].

    A causal VAE cannot encode late frames as they would have been within their past, which nobody has; so given frames
    see only themselves, in training and in inference alike. The k-th latent belongs to the clip's latent frame that
    ends with the k-th group's last frame.
    """
    return codec.encode_chunks(pixels)


def give_frames(codec: VideoCodec, request: VideoRequest, pieces: Sequence[Given]) -> Iterator[Conditioning | None]:
    """Their latent frames are given, clean, at timestep 0. None after each work item, the conditioning at the end."""
    width, height, num_frames = request.size
    given = torch.zeros(codec.latent_shape(num_frames, height, width), device=codec.device)
    flags = [False] * given.shape[1]
    for piece in pieces:
        at = piece.start // codec.temporal_factor
        for chunk in encode_given(codec, piece.frames):
            stop = at + chunk.shape[1]
            given[:, at:stop], flags[at:stop] = chunk, [True] * (stop - at)
            at = stop
            yield None
    mask = send(torch.tensor(flags), codec.device).view(1, -1, 1, 1)
    yield Conditioning(tuple(flags), given=given, mask=mask, pixels=tuple(pieces))


def concatenate_frames(
    codec: VideoCodec, request: VideoRequest, pieces: Sequence[Given]
) -> Iterator[Conditioning | None]:
    """Wan's I2V input: 4 mask channels (a latent frame's four frames), and the clip encoded with mid-grey elsewhere.

    None after each work item, the conditioning at the end. As in diffusers, images come out as the model remakes them;
    a video that goes on is pasted back.
    """
    width, height, num_frames = request.size
    _, length, rows, columns = codec.latent_shape(num_frames, height, width)
    pixels = torch.zeros(3, num_frames, height, width)
    shown = torch.zeros(num_frames)
    for piece in pieces:
        stop = piece.start + len(piece.frames)
        pixels[:, piece.start : stop] = torch.tensor(piece.frames).permute(3, 0, 1, 2) / 127.5 - 1
        shown[piece.start : stop] = 1
    factor = codec.temporal_factor
    mask = torch.cat((shown[:1].repeat(factor), shown[1:])).view(length, factor).T  # frame 0 fills its latent frame
    channels = send(mask, codec.device)[:, :, None, None].expand(factor, length, rows, columns)
    parts = []
    for chunk in encode_given(codec, pixels):
        parts.append(chunk)
        yield None
    pasted = tuple(pieces[:1]) if request.continues_video else ()
    yield Conditioning((False,) * length, channels=torch.cat((channels, torch.cat(parts, dim=1))), pixels=pasted)
