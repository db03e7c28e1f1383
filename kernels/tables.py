"""What the host tells a device: sent without waiting; tables once a layout, kept while a CUDA graph reads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .toolchain import is_told

T = TypeVar("T")
LATEST = 64  # layouts that are kept without a graph


class PerLayout(Generic[T]):
    """What `build` makes of a layout, made once: a layout lives as long as its requests, some hundred steps.

    The latest are kept, and for good those that a CUDA graph was captured with, since its replays read them. Nothing
    can be uploaded inside a capture, so a layout is served once before it is captured.
    """

    def __init__(self, build: Callable[..., T], latest: int = LATEST) -> None:
        self.build, self.latest = build, latest
        self._kept: OrderedDict[tuple[Hashable, ...], T] = OrderedDict()
        self._captured: dict[tuple[Hashable, ...], T] = {}
        self._lock = Lock()

    def __call__(self, *layout: Hashable) -> T:
        if is_told():  # fake tensors belong to the mode that made them
            return self.build(*layout)
        capturing = torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()
        with self._lock:
            if layout in self._captured:
                return self._captured[layout]
            if layout not in self._kept:
                if capturing:
                    raise RuntimeError(
                        "serve a layout once before it is captured: a CUDA graph cannot upload its table"
                    )
                self._kept[layout] = self.build(*layout)
                while len(self._kept) > self.latest:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(layout)
            if capturing:
                self._captured[layout] = self._kept[layout]
            return self._kept[layout]


def send(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; from pinned memory, since a copy from any other waits for the stream.

    The allocator of pinned memory keeps it until the copy is done, so the caller may drop `host` at once.
    """
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def upload(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int32 [rows, columns], sent."""
    return send(torch.tensor(rows, dtype=torch.int32), device)


def upload_cu_seqlens(cu_seqlens: Sequence[int], device: torch.device) -> Tensor:
    """int32 [sequences + 1], as other libraries want them."""
    return send(torch.tensor(cu_seqlens, dtype=torch.int32), device)
