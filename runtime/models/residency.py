"""Which parts of a model are on its device: some always, the others while they are needed, the least recently used out.

A part that may move has a pinned copy in the host's memory, to which its parameters go back when its place is taken:
weights are only read, so nothing is copied back. Copies to the device are queued on a stream of their own, so the next
part can be on its way while the one before it still works.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Copy(Protocol):
    """Tensors on their way to a device."""

    @property
    def tensors(self) -> list[Tensor]: ...

    def arrive(self) -> None:
        """What is queued from now on may read them."""


class Mover(Protocol):
    """What copies weights between host and device."""

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory that `bring` is fast from; the tensor itself where it is one."""

    def bring(self, held: Sequence[Tensor]) -> Copy:
        """Queue copies on the device."""

    def settle(self) -> None:
        """Wait until nothing that was queued reads the device's copies."""


class CudaMover:
    """Pinned memory, and a copy stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def hold(self, tensor: Tensor) -> Tensor:
        held = tensor.cpu()
        return held if held.is_pinned() else held.pin_memory()

    def bring(self, held: Sequence[Tensor]) -> Copy:
        # Of the current stream's memory: what that has freed may still be read by what it has queued, so we wait.
        made = [torch.empty_like(tensor, device=self.device) for tensor in held]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, source in zip(made, held, strict=True):
                target.copy_(source, non_blocking=True)
                target.record_stream(self.stream)
            ready = torch.cuda.Event()
            ready.record(self.stream)
        return _CudaCopy(made, ready, self.device)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)  # rare, and shorter than the copy that it makes room for


@dataclass(frozen=True)
class _CudaCopy:
    tensors: list[Tensor]
    ready: torch.cuda.Event
    device: torch.device

    def arrive(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.ready)


class _Part:
    """Modules that move together."""

    def __init__(self, modules: Sequence[nn.Module], mover: Mover) -> None:
        unique = {id(t): t for module in modules for t in chain(module.parameters(), module.buffers())}
        self.tensors = list(unique.values())
        self.held = [mover.hold(tensor.data) for tensor in self.tensors]
        self.num_bytes = sum(tensor.nbytes for tensor in self.held)
        self.copy: Copy | None = None
        self.used = 0  # the clock at its last use
        self.leave()

    def enter(self, copy: Copy) -> None:
        self.copy = copy
        for tensor, placed in zip(self.tensors, copy.tensors, strict=True):
            tensor.data = placed

    def leave(self) -> None:
        self.copy = None
        for tensor, held in zip(self.tensors, self.held, strict=True):
            tensor.data = held


@dataclass(frozen=True)
class ResidencyReport:
    """What is where, as an engine's sign of life carries it."""

    offload: str
    moved: tuple[str, ...]
    on_device: tuple[str, ...]  # of the moved ones
    num_moves: int  # copies to the device since the start
    moved_bytes: int

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "offload": self.offload,
            "moved": list(self.moved),
            "on_device": list(self.on_device),
            "num_moves": self.num_moves,
            "moved_bytes": self.moved_bytes,
        }


class Residency:
    """The parts of one model that move; a name that was not given is of a part that is always there.

    budget_bytes: what moved parts, requests and their work may take together. One thread steps, others may look on.
    """

    def __init__(self, offload: str = "none", mover: Mover | None = None, budget_bytes: int = 0) -> None:
        self.offload, self.mover, self.budget_bytes = offload, mover, budget_bytes
        self.reserved_bytes = 0
        self._parts: dict[str, _Part] = {}
        self._clock = self._num_moves = self._moved_bytes = 0
        self._lock = threading.RLock()

    def add(self, name: str, *modules: nn.Module) -> None:
        """A part that moves; it is not on the device before it is required."""
        assert self.mover is not None
        self._parts[name] = _Part(modules, self.mover)

    def reserve(self, num_bytes: int) -> None:
        """How much of the budget requests and the work that comes next take."""
        self.reserved_bytes = num_bytes

    def require(self, *names: str) -> None:
        """Have these parts on the device for what is queued from now on."""
        with self._lock:
            self._clock += 1
            wanted = [self._parts[name] for name in names if name in self._parts]
            for part in wanted:
                part.used = self._clock
            coming = [part for part in wanted if part.copy is None]
            self._make_room(sum(part.num_bytes for part in coming), wanted)  # what is reserved may have grown
            for part in coming:
                self._bring(part)
            self._arrive(wanted)

    def prefetch(self, name: str) -> bool:
        """Begin to bring a part, if there is room beside what is there; whether it is there or on its way."""
        with self._lock:
            part = self._parts.get(name)
            if part is None or part.copy is not None:
                return True
            if self.on_device_bytes + part.num_bytes + self.reserved_bytes > self.budget_bytes:
                return False
            part.used = self._clock  # as one that is used now: it is not the first to leave again
            self._bring(part)
            return True

    def is_on_device(self, name: str) -> bool:
        """Whether a part is there, or on its way."""
        part = self._parts.get(name)
        return part is None or part.copy is not None

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing moves meanwhile: for another thread that reads weights wherever they are."""
        with self._lock:
            self._arrive(self._parts.values())
            yield

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(self._parts)

    @property
    def on_device_bytes(self) -> int:
        """Of the moved parts that are there."""
        return sum(part.num_bytes for part in self._parts.values() if part.copy is not None)

    @property
    def report(self) -> ResidencyReport:
        on_device = tuple(name for name, part in self._parts.items() if part.copy is not None)
        return ResidencyReport(self.offload, self.moved, on_device, self._num_moves, self._moved_bytes)

    def _bring(self, part: _Part) -> None:
        assert self.mover is not None
        part.enter(self.mover.bring(part.held))
        self._num_moves += 1
        self._moved_bytes += part.num_bytes

    @staticmethod
    def _arrive(parts: Iterable[_Part]) -> None:
        for part in parts:
            if part.copy is not None:
                part.copy.arrive()

    def _make_room(self, num_bytes: int, wanted: Sequence[_Part]) -> None:
        """For so many bytes more. The least recently used leave first, and all that is not wanted if nothing helps."""
        over = self.on_device_bytes + num_bytes + self.reserved_bytes - self.budget_bytes
        others = [part for part in self._parts.values() if part.copy is not None and part not in wanted]
        leaving = []
        for part in sorted(others, key=lambda part: part.used):
            if over <= 0:
                break
            leaving.append(part)
            over -= part.num_bytes
        if leaving and self.mover is not None:
            self.mover.settle()
        for part in leaving:
            part.leave()
