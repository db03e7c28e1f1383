"""Causal 3-D convolutions written as 2-D ones with fewer multiplications, for runtimes whose 3-D convolution is slow.

ONNX Runtime's CPU provider runs a 3-D convolution as im2col + GEMM and a 2-D one directly in blocked memory. A
convolution over three frames is three 2-D ones; Winograd's algorithm over time makes do with less (Lavin & Gray,
arXiv 1509.09308, F(m, 3)): of m + 2 frames it makes m outputs with m + 2 2-D convolutions in place of 3 m. Here m is 4
where the number of frames is known to be a multiple of 4 (half of the multiplications), 2 where it is even (two
thirds), whatever the length of the chunk. Demo decoder, 13 x 128 x 128, one thread of an AVX-512 core: 0.40 s with 3-D
convolutions, 0.35 s with 2-D ones, 0.30 s with m = 2 and 0.26 s with m up to 4; largest error against eager 2.6e-6,
3.1e-6, 3.1e-6 and 3.3e-6. Frames kept as frames between layers save the turning around, a tenth of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .frames import Frames, Lowered, Views

Matrix = list[list[float]]
Triple = tuple[int, int, int]
BLOCK = 16  # channels that ONNX Runtime's blocked convolution makes at once; for a group of other counts it has none

# m -> (of frames, of weights, of results): y = results [(weights w) * (frames x)]
WINOGRAD: dict[int, tuple[Matrix, Matrix, Matrix]] = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}


class Planar(Frames):
    """Frames are [T, C, H, W]."""

    VIEWS: ClassVar[Views] = {
        "clip": lambda frames: frames.transpose(0, 1).unsqueeze(0),
        "frames first": lambda frames: frames.unsqueeze(0),
        "channels last": lambda frames: frames.movedim(1, -1).unsqueeze(0),
        "images": lambda frames: frames,
        "images, channels last": lambda frames: frames.movedim(1, -1),
    }
    LOWERED: ClassVar[Lowered] = {**Frames.LOWERED, F.conv3d: "conv3d", F.rms_norm: "rms_norm"}

    def frames_of(self, x: Tensor) -> Tensor:
        frames = self.frames(x)
        return x.squeeze(0).transpose(0, 1) if frames is None else frames

    def of_images(self, x: Tensor) -> Tensor:
        return x

    def conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: Triple = (1, 1, 1), padding: Triple = (0, 0, 0)
    ) -> Tensor | None:
        if stride[0] != 1:
            return None
        return self.view(planar_conv3d(self.frames_of(x), weight, bias, stride, padding))

    def rms_norm(self, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor | None:
        frames = self.frames(x, "channels last")
        return None if frames is None else self.view(planar_rms_norm(frames, weight, eps), "channels last")


def planar_rms_norm(frames: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the channels of frames [T, C, H, W].

    The mean over channels is a convolution: a reduction over them would turn every frame around and back.
    """
    num_channels = frames.shape[1]
    share = torch.full((1, num_channels, 1, 1), 1 / num_channels, dtype=frames.dtype)
    return frames * torch.rsqrt(F.conv2d(frames * frames, share) + eps) * weight[:, None, None]


def planar_conv3d(frames: Tensor, weight: Tensor, bias: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """F.conv3d of frames [T, C, H, W] with 1 or 3 frames a kernel and no padding in time."""
    taps, height = weight.shape[2:4]
    if taps == 1:
        return F.conv2d(frames, weight[:, :, 0], bias, stride[1:], padding[1:])
    assert taps == 3 and padding[0] == 0 and tuple(stride) == (1, 1, 1)
    num_frames = frames.shape[0] - 2
    m = next((m for m in (4, 2) if height > 1 and statically_known_true(num_frames % m == 0)), 1)
    return _winograd(frames, weight, bias, padding, m) if m > 1 else _stacked(frames, weight, bias, padding)


def _stacked(frames: Tensor, weight: Tensor, bias: Tensor, padding: Triple) -> Tensor:
    """The three frames of each output side by side as channels."""
    x = torch.cat((frames[:-2], frames[1:-1], frames[2:]), dim=1)
    return F.conv2d(x, weight.transpose(1, 2).flatten(1, 2), bias, padding=padding[1:])


def _winograd(frames: Tensor, weight: Tensor, bias: Tensor, padding: Triple, m: int) -> Tensor:
    """F(m, 3): frames [m k + 2, C, H, W] -> [m k, C_out, H, W]; its convolutions are the groups of one."""
    of_frames, of_weights, of_results = (torch.tensor(matrix, dtype=frames.dtype) for matrix in WINOGRAD[m])
    c_out, c_in, taps, kernel_h, kernel_w = weight.shape
    n, (height, width) = (frames.shape[0] - 2) // m, frames.shape[2:]
    own, later = (part.reshape(n, m, c_in * height * width) for part in (frames[:-2], frames[2:]))
    x = of_frames @ torch.cat((own, later[:, m - 2 :]), dim=1)
    taps_first = weight.movedim(2, 0).reshape(taps, -1)
    weights = (of_weights @ taps_first).reshape(m + 2, c_out, c_in, kernel_h, kernel_w)
    weights = F.pad(weights, (0, 0, 0, 0, 0, 0, 0, -c_out % BLOCK)).flatten(0, 1)
    y = F.conv2d(x.reshape(n, (m + 2) * c_in, height, width), weights, None, padding=padding[1:], groups=m + 2)
    y = y.reshape(n, m + 2, -1, height, width)[:, :, :c_out]
    y = of_results @ y.reshape(n, m + 2, c_out * height * width)
    return y.reshape(n * m, c_out, height, width) + bias[:, None, None]
