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

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.overrides import TorchFunctionMode

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


class Planar(TorchFunctionMode):
    """While it is active, a clip x [1, C, T, H, W] is worked on as its frames [T, C, H, W], and F.conv3d as 2-D ones.

    Every tensor that is made of frames by views alone has them noted beside it, so that what comes next starts from
    them: or each convolution would turn the clip around twice. What is not known here is done as it is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, str, Tensor]] = {}  # id -> (it, which of VIEWS, its frames)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lowered = LOWERED.get(func)
        result = lowered(self, *args, **(kwargs or {})) if lowered else None
        return func(*args, **(kwargs or {})) if result is None else result

    def frames(self, x: Tensor, view: str = "clip") -> Tensor | None:
        """Of a tensor that is known as this view of them."""
        _, known, frames = self._known.get(id(x), (None, None, None))
        return frames if known == view else None

    def frames_of(self, x: Tensor) -> Tensor:
        """Of any clip."""
        frames = self.frames(x)
        return x.squeeze(0).transpose(0, 1) if frames is None else frames

    def view(self, frames: Tensor, view: str = "clip") -> Tensor:
        x = VIEWS[view](frames)
        self._known[id(x)] = (x, view, frames)
        return x

    # Each of these returns None where the call is none that it knows.

    def conv3d(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: Triple = (1, 1, 1), padding: Triple = (0, 0, 0)
    ) -> Tensor | None:
        if stride[0] != 1:
            return None
        return self.view(planar_conv3d(self.frames_of(x), weight, bias, stride, padding))

    def rms_norm(self, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor | None:
        frames = self.frames(x, "channels last")
        return None if frames is None else self.view(planar_rms_norm(frames, weight, eps), "channels last")

    def silu(self, x: Tensor, inplace: bool = False) -> Tensor | None:
        frames = self.frames(x)
        return None if frames is None else self.view(F.silu(frames))

    def add(self, a: Tensor, b: Tensor) -> Tensor | None:
        if not isinstance(b, Tensor) or (self.frames(a) is None and self.frames(b) is None) or b.dim() != a.dim():
            return None
        return self.view(self.frames_of(a) + self.frames_of(b))

    def cat(self, clips: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        if dim != 2 or all(self.frames(clip) is None for clip in clips):
            return None
        return self.view(torch.cat([self.frames_of(clip) for clip in clips]))

    def take(self, x: Tensor, index: Any) -> Tensor | None:
        frames = self.frames(x)
        if frames is None or not isinstance(index, tuple) or len(index) != 3 or index[:2] != (slice(None),) * 2:
            return None
        return self.view(frames[index[2]]) if isinstance(index[2], slice) else None

    def turn(self, x: Tensor, source: int, target: int) -> Tensor | None:
        """movedim and transpose between the views."""
        _, view, frames = self._known.get(id(x), (x, "none", x))
        to = TURNS.get((view, source, target))
        return None if to is None else self.view(frames, to)

    def flatten(self, x: Tensor, *dims: int) -> Tensor | None:
        return self.frames(x, "frames first") if dims == (0, 1) else None

    def unflatten(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor | None:
        return self.view(x, "frames first") if (x.dim(), dim, tuple(sizes)) == (4, 0, (1, -1)) else None


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda frames: frames.transpose(0, 1).unsqueeze(0),
    "frames first": lambda frames: frames.unsqueeze(0),
    "channels last": lambda frames: frames.movedim(1, -1).unsqueeze(0),
}
TURNS = {
    ("clip", 1, 2): "frames first",
    ("frames first", 1, 2): "clip",
    ("clip", 1, -1): "channels last",
    ("channels last", -1, 1): "clip",
}
LOWERED: dict[Any, Callable[..., Tensor | None]] = {
    F.conv3d: Planar.conv3d,
    F.rms_norm: Planar.rms_norm,
    F.silu: Planar.silu,
    torch.cat: Planar.cat,
    Tensor.add: Planar.add,
    Tensor.__getitem__: Planar.take,
    Tensor.transpose: Planar.turn,
    Tensor.movedim: Planar.turn,
    Tensor.flatten: Planar.flatten,
    Tensor.unflatten: Planar.unflatten,
}


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
