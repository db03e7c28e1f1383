"""Causal 3-D convolutions written as 2-D ones with fewer multiplications, for runtimes whose 3-D convolution is slow.

ONNX Runtime's CPU provider runs a 3-D convolution as im2col + GEMM and a 2-D one directly in blocked memory. A
convolution over three frames is three 2-D ones; Winograd's algorithm over time makes do with less (Lavin & Gray,
arXiv 1509.09308, F(m, 3)): of m + 2 frames it makes m outputs with m + 2 2-D convolutions in place of 3 m. Here m is 4
where the number of frames is known to be a multiple of 4 (half of the multiplications), 2 where it is even (two
thirds), whatever the length of the chunk. Demo decoder, 13 x 128 x 128, one thread of an AVX-512 core: 0.40 s with 3-D
convolutions, 0.35 s with 2-D ones, 0.30 s with m = 2 and 0.26 s with m up to 4; largest error against eager 2.6e-6,
3.1e-6, 3.1e-6 and 3.3e-6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

Matrix = list[list[float]]

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


class Planar(TorchFunctionMode):
    """While it is active, F.conv3d of one clip becomes 2-D convolutions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv3d:
            return planar_conv3d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def planar_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """F.conv3d of x [1, C, T, H, W] with 1 or 3 frames a kernel and no padding in time."""
    taps, height = weight.shape[2:4]
    if stride[0] != 1:
        return F.conv3d(x, weight, bias, stride, padding)
    frames = x.squeeze(0).transpose(0, 1)  # [T, C, H, W]
    if taps == 1:
        y = F.conv2d(frames, weight[:, :, 0], bias, stride[1:], padding[1:])
    else:
        assert taps == 3 and padding[0] == 0 and stride == (1, 1, 1)
        num_frames = x.shape[2] - 2
        m = next((m for m in (4, 2) if height > 1 and statically_known_true(num_frames % m == 0)), 1)
        y = _winograd(frames, weight, bias, padding, m) if m > 1 else _stacked(frames, weight, bias, padding)
    return y.transpose(0, 1).unsqueeze(0)


def _stacked(frames: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int, int]) -> Tensor:
    """The three frames of each output side by side as channels."""
    x = torch.cat((frames[:-2], frames[1:-1], frames[2:]), dim=1)
    return F.conv2d(x, weight.transpose(1, 2).flatten(1, 2), bias, padding=padding[1:])


def _winograd(frames: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int, int], m: int) -> Tensor:
    """F(m, 3): frames [m k + 2, C, H, W] -> [m k, C_out, H, W]; its convolutions are the groups of one."""
    of_frames, of_weights, of_results = (torch.tensor(matrix, dtype=frames.dtype) for matrix in WINOGRAD[m])
    c_out, c_in, taps, kernel_h, kernel_w = weight.shape
    n, (height, width) = (frames.shape[0] - 2) // m, frames.shape[2:]
    own, later = (part.reshape(n, m, c_in * height * width) for part in (frames[:-2], frames[2:]))
    x = of_frames @ torch.cat((own, later[:, m - 2 :]), dim=1)
    taps_first = weight.movedim(2, 0).reshape(taps, -1)
    weights = (of_weights @ taps_first).reshape((m + 2) * c_out, c_in, kernel_h, kernel_w)
    y = F.conv2d(x.reshape(n, (m + 2) * c_in, height, width), weights, None, padding=padding[1:], groups=m + 2)
    y = of_results @ y.reshape(n, m + 2, c_out * height * width)
    return y.reshape(n * m, c_out, height, width) + bias[:, None, None]
