"""The convolutions that double and halve a frame's sides, as functions that an exporter may replace as a whole.

Nearest-neighbour doubling and the 3 x 3 convolution behind it are four convolutions of 2 x 2 on the small frames.

Of the nine pixels that a window of the doubled frame holds, only four differ: where a pixel and its copy both lie in
the window, their weights add up. That is 4 multiplications an output pixel and pair of channels in place of 9, and the
doubled frame is never made (Shi et al., arXiv 1609.07009, section 2, the other way about: it trains what we sum).
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.weak import WeakIdKeyDictionary

from .tables import send

# Which of a side's three weights each of two pixels is multiplied with: for even outputs, then for odd ones.
TAPS = [[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]


def upsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d(nearest(x, 2), weight, bias, padding 1).

    x: [B, C_in, H, W]; weight: [C_out, C_in, 3, 3] -> [B, C_out, 2 H, 2 W], in x's memory order.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(upsample_conv2d, (x,), x, weight, bias)
    kernels = kernels_of(weight)
    if torch.compiler.is_exporting():  # graphs write into nothing, and their runtimes fold the padding in
        phases = [
            F.conv2d(F.pad(x, (1 - right, right, 1 - low, low)), kernels[low, right], bias)
            for low in (0, 1)
            for right in (0, 1)
        ]
        return F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)
    (batch, _, height, width), c_out = x.shape, weight.shape[0]
    every = F.conv2d(x, kernels.flatten(0, 2), bias.repeat(4), padding=1).unflatten(1, (2, 2, c_out))
    order = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    y = torch.empty((batch, c_out, 2 * height, 2 * width), dtype=x.dtype, device=x.device, memory_format=order)
    for low in (0, 1):
        for right in (0, 1):
            y[:, :, low::2, right::2] = every[:, low, right, :, low : low + height, right : right + width]
    return y


def downsample_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv2d with a stride of 2, behind a row of zeros below and a column to the right of each frame.

    x: [B, C_in, H, W], H and W even; weight: [C_out, C_in, 3, 3] -> [B, C_out, H / 2, W / 2], in x's memory order.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(downsample_conv2d, (x,), x, weight, bias)
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)


@dataclass(frozen=True)
class _Kept:
    """Kernels, and when they are there for other CUDA streams than the one that they were made on."""

    kernels: Tensor
    stream: torch.cuda.Stream | None
    ready: torch.cuda.Event | None

    @staticmethod
    def of(kernels: Tensor) -> _Kept:
        if not kernels.is_cuda:
            return _Kept(kernels, None, None)
        stream, ready = torch.cuda.current_stream(kernels.device), torch.cuda.Event()
        ready.record(stream)
        return _Kept(kernels, stream, ready)

    def here(self) -> Tensor:
        if self.ready is not None and (stream := torch.cuda.current_stream(self.kernels.device)) != self.stream:
            stream.wait_event(self.ready)
            self.kernels.record_stream(stream)
        return self.kernels


# By the memory that a weight lies in, and what of it the weight is, since a file's weights may share one storage. A
# weight that is moved lies in other memory, and what was kept of the old one goes with it.
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lock = Lock()


def kernels_of(weight: Tensor) -> Tensor:
    """The four kernels [2, 2, C_out, C_in, 2, 2] of a weight [C_out, C_in, 3, 3], computed once a weight.

    They take 16/9 of its bytes for as long as its memory lives: of Wan2.1's decoder 10.6 MB in fp32, of Wan2.2-TI2V's
    151. They are computed anew after the weight was written to (but through `.data`, which leaves no trace), moved or
    converted; and each time while a graph is made of the call, or gradients are asked for.
    """
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or capturing or (torch.is_grad_enabled() and weight.requires_grad):
        return _kernels(weight)
    version = 0 if weight.is_inference() else weight._version
    key = (weight.dtype, weight.storage_offset(), weight.shape, weight.stride(), version)
    storage = weight.untyped_storage()
    with _lock:
        of_storage = _kept.setdefault(storage, {})
        if key not in of_storage:
            for stale in [other for other in of_storage if other[:-1] == key[:-1]]:
                del of_storage[stale]
            of_storage[key] = _Kept.of(_kernels(weight).contiguous())
        kept: _Kept = of_storage[key]
    return kept.here()


def _kernels(weight: Tensor) -> Tensor:
    """[C_out, C_in, 3, 3] -> [2, 2, C_out, C_in, 2, 2]: of the lower or upper, left or right one of four outputs."""
    taps = send(torch.tensor(TAPS), weight.device)
    both = (taps[:, None, :, None, :, None] * taps[None, :, None, :, None, :]).flatten(4)  # [2, 2, 2, 2, 9]
    kernels = weight.float().flatten(2) @ both.flatten(0, 3).T  # summed before they are rounded
    return kernels.unflatten(-1, (2, 2, 2, 2)).permute(2, 3, 0, 1, 4, 5).to(weight.dtype)
