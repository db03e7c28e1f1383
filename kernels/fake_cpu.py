"""Fake CPU tensors: shapes, strides, dtypes and bytes of what would run on a CPU, without memory or work.

torch's FakeTensorMode does it, but for oneDNN's convolution, which knows no tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@contextmanager
def fake_cpu() -> Iterator[FakeTensorMode]:
    """Tensors made inside have no memory. Use `torch.no_grad` with it, as with `fake_cuda`."""
    with FakeTensorMode() as mode, _OneDNN():
        yield mode


class _OneDNN(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten.mkldnn_convolution.default:
            return _convolution(*args)
        return func(*args, **(kwargs or {}))


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Its result, in channels-last order where x or the weight is."""
    zeros = [0] * len(padding)
    y: Tensor = aten.convolution.default(x, weight, bias, stride, padding, dilation, False, zeros, groups)
    order = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    if not any(one.is_contiguous(memory_format=order) and not one.is_contiguous() for one in (x, weight)):
        return y
    return torch.empty_like(y, memory_format=order)
