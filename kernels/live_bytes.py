"""Bytes of the tensors that are alive, and their peak: exact for tensors, blind to what libraries allocate inside."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make and drop, of tensors on any device, `meta` and fake ones included.

    Only what is made inside counts: a view on a weight, or an operation in place, makes nothing. Where operations
    allocate what they do not return (cuBLAS's and cuDNN's workspaces, oneDNN's reordered weights), nobody sees it here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, int] = {}  # address of a storage's own record -> its bytes

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_record(item) for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor) and (record := _record(item)) not in given:
                self._count(record, item.untyped_storage())
        return result

    def _count(self, record: int, storage: torch.UntypedStorage) -> None:
        if record in self._known or not storage.nbytes():
            return
        self._known[record] = storage.nbytes()
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, record)

    def _drop(self, record: int) -> None:
        self.live_bytes -= self._known.pop(record, 0)


def _record(tensor: Tensor) -> int:
    """What tells a storage from others while it lives: data pointers are 0 without memory."""
    return int(tensor.untyped_storage()._cdata)
