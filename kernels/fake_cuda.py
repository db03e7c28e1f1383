"""Fake CUDA tensors on any machine: shapes, strides, dtypes and bytes of what would run on a GPU, without one.

torch's FakeTensorMode does it, but for three things that a CPU build lacks: some of Python's bindings ask the CUDA
runtime for a device guard (`UNGUARDED` goes around them), an operation with a kernel for CUDA alone is taken apart
(`_rms_norm` and `Whole` answer for it), and there are no streams and events (`STREAMS` are such that never wait).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .toolchain import told_capability

aten = torch.ops.aten
_patching = RLock()


@contextmanager
def fake_cuda(capability: int) -> Iterator[FakeTensorMode]:
    """Tensors made inside have no memory, and those on `cuda` count as a device's of this capability (90: sm_90).

    Use `torch.no_grad` with it rather than inference mode, which hides what composite operations allocate. Tensors made
    outside are errors inside, but for those that `FakeTensorMode.from_tensor` was given. One thread at a time.
    """
    streams, norm = patch.multiple(torch.cuda, **STREAMS), patch.object(F, "rms_norm", _rms_norm)
    with _patching, _unguarded(), streams, norm, told_capability(capability), FakeTensorMode() as mode, Whole():
        yield mode


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel on CUDA, which writes the result and a scale a row; in a CPU build autograd's dispatch takes it apart.

    A copy of rows that do not lie behind each other is not counted: of cuDNN's channels-last convolutions they do, but
    fake convolutions of a CPU build lose that order.
    """
    made = x.new_empty(x.shape)
    x.new_empty(x.shape[: -len(normalized_shape)], dtype=torch.float32)
    return made


class Whole(TorchDispatchMode):
    """Operations that are one call on CUDA and several in FakeTensorMode."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is aten.empty.memory_format and kwargs and kwargs.get("pin_memory"):
            return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _unguarded() -> Iterator[None]:
    """Fake tensors answer by operations that need no device guard; real tensors do as ever."""
    before: dict[str, Any] = {name: FakeTensor.__dict__.get(name) for name in UNGUARDED}
    for name, method in UNGUARDED.items():
        setattr(FakeTensor, name, method)
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(FakeTensor, name)
            else:
                setattr(FakeTensor, name, method)


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _set(x: Tensor, index: Any, value: Any) -> None:
    place = _get(x, index)
    if isinstance(value, Tensor):
        aten.copy_.default(place, value)
    else:
        place.fill_(value)


def _get(x: Tensor, index: Any) -> Tensor:
    """x[index]; a view unless a tensor or a list is in the index."""
    items = list(index) if isinstance(index, tuple) else [index]
    if (at := next((at for at, item in enumerate(items) if item is Ellipsis), None)) is not None:
        named = sum(1 for item in items if item is not None and item is not Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.dim() - named)
    gathered: list[Tensor | None] = []
    dim = 0
    for item in items:
        if item is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(item, slice):
            x, dim = aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1), dim + 1
        elif isinstance(item, int):
            x = aten.select.int(x, dim, item)
        else:
            gathered += [None] * (dim - len(gathered))
            gathered.append(item if isinstance(item, Tensor) else torch.tensor(item, device=x.device))
            dim += 1
    result: Tensor = aten.index.Tensor(x, gathered) if gathered else x
    return result


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    result: Tensor = aten.copy_.default(x, source, non_blocking)
    return result


def _to(x: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
    parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, _, memory_format = parsed
    if not copy and (device or x.device) == x.device and (dtype or x.dtype) == x.dtype and memory_format is None:
        return x
    options = {"dtype": dtype or x.dtype, "device": device or x.device, "memory_format": memory_format}
    result: Tensor = aten._to_copy.default(x, non_blocking=non_blocking, **options)
    return result


def _pin_memory(x: Tensor) -> Tensor:
    return _pinned(x.clone())


def _pinned(x: Tensor) -> Tensor:
    x.is_pinned = lambda: True  # type: ignore[assignment, method-assign, misc]
    return x


def _record_stream(x: Tensor, stream: Stream) -> None:
    pass


class Event:
    """Of a device on which everything is done as soon as it is queued."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Stream:
    """A queue of such a device."""

    def __init__(self, device: torch.device | str | int | None = None, priority: int = 0) -> None:
        self.device, self.priority = device, priority

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass


_default = Stream()
_current: ContextVar[Stream] = ContextVar("fake_stream", default=_default)


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    token = _current.set(stream)
    try:
        yield
    finally:
        _current.reset(token)


STREAMS: dict[str, Any] = {
    "Event": Event,
    "Stream": Stream,
    "stream": _stream,
    "current_stream": lambda device=None: _current.get(),
    "is_current_stream_capturing": lambda: False,
}


UNGUARDED = {
    "__getitem__": _get,
    "__setitem__": _set,
    "contiguous": _contiguous,
    "copy_": _copy,
    "to": _to,
    "pin_memory": _pin_memory,
    "record_stream": _record_stream,
}
