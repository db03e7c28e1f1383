"""Given frames: what a request shows the model beside the prompt.

Every kind of conditioning is "some frames are given, denoise the rest". Two kinds of checkpoint take them differently:
clean latent frames at timestep 0 (Wan2.2-TI2V, the demo model), or extra input channels (Wan2.1 and Wan2.2-A14B I2V).

Shape letters: C latent channels, T latent frames, H, W latent rows and columns, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .request import VideoRequest
from .vae.codec import VideoCodec

Image = np.ndarray  # uint8 [height, width, 3]


@dataclass(frozen=True)
class Conditioning:
    """How the model's input is made of the latents; without given frames it is the latents themselves."""

    frame_is_given: tuple[bool, ...]  # for each latent frame, whether it is clean and at timestep 0 (host side)
    given: Tensor | None = None  # [C, T, H, W], clean where `mask` is set
    mask: Tensor | None = None  # [1, T, 1, 1] bool, `frame_is_given` on the device
    channels: Tensor | None = None  # [4 + C, T, H, W], concatenated to the latents
    pixels: tuple[tuple[int, Image], ...] = ()  # (frame, given pixels), pasted back after decoding

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
        for index, image in self.pixels:
            if start <= index < start + len(frames):
                frames[index - start] = image
        return frames


def encode_given(codec: VideoCodec, pixels: np.ndarray | Tensor) -> Iterator[Tensor]:
    """Latents [C, n, H, W] of given frames, encoded as a clip of their own, chunk by chunk.

    pixels: uint8 [4n-3, H, W, 3], or float [3, 4n-3, H, W] in [-1, 1].

    A causal VAE cannot encode late frames as they would have been within their past, which nobody has; so given frames
    see only themselves, in training and in inference alike. The k-th latent belongs to the clip's latent frame that
    ends with the k-th group's last frame.
    """
    return codec.encode_chunks(pixels)


def give_frames(
    codec: VideoCodec, request: VideoRequest, first: Image, last: Image | None
) -> Iterator[Conditioning | None]:
    """The first latent frame is given, clean, at timestep 0. None after each work item, the conditioning at the end."""
    assert last is None, "refused at submission"
    width, height, num_frames = request.size
    shape = codec.latent_shape(num_frames, height, width)
    flags = tuple(index == 0 for index in range(shape[1]))
    given = torch.zeros(shape, device=codec.device)
    for chunk in encode_given(codec, first[None]):
        given[:, : chunk.shape[1]] = chunk
        yield None
    mask = torch.tensor(flags, device=codec.device).view(1, -1, 1, 1)
    yield Conditioning(flags, given=given, mask=mask, pixels=((0, first),))


def concatenate_image(
    codec: VideoCodec, request: VideoRequest, first: Image, last: Image | None
) -> Iterator[Conditioning | None]:
    """Wan's I2V input: 4 mask channels (a latent frame's four frames), and the clip encoded with mid-grey elsewhere.

    None after each work item, the conditioning at the end.
    """
    width, height, num_frames = request.size
    _, length, rows, columns = codec.latent_shape(num_frames, height, width)
    pixels = torch.zeros(3, num_frames, height, width)
    shown = torch.zeros(num_frames)
    for index, image in ((0, first), (-1, last)):
        if image is not None:
            pixels[:, index] = torch.tensor(image).permute(2, 0, 1) / 127.5 - 1
            shown[index] = 1
    factor = codec.temporal_factor
    mask = torch.cat((shown[:1].repeat(factor), shown[1:])).view(length, factor).T  # frame 0 fills its latent frame
    channels = mask[:, :, None, None].expand(factor, length, rows, columns).to(codec.device)
    parts = []
    for chunk in encode_given(codec, pixels):
        parts.append(chunk)
        yield None
    yield Conditioning((False,) * length, channels=torch.cat((channels, torch.cat(parts, dim=1))))
