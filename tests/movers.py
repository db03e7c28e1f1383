"""A mover whose device is the CPU: it counts what is there, and weights read too early or too late are NaN."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def spoilt_like(tensor: Tensor) -> Tensor:
    """Return memory that nobody has filled: NaN, or zeros for integers."""
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else torch.zeros_like(tensor)


@dataclass(eq=False)
class CountedCopy:
    """A copy that is spoilt until it arrives."""

    tensors: list[Tensor]
    sources: list[Tensor]
    num_arrivals: int = 0

    def arrive(self) -> None:
        if not self.num_arrivals:
            for tensor, source in zip(self.tensors, self.sources, strict=True):
                tensor.copy_(source)
        self.num_arrivals += 1


@dataclass
class CountingMover:
    """Counts moves. hides: weights that lie on the host are spoilt for readers there, as if it were another device."""

    hides: bool = True
    num_copies: int = 0
    num_settled: int = 0
    live_bytes: int = 0  # of copies that somebody still holds
    most_bytes: int = 0  # of them at once
    _hidden: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # what is shown on the host, the weights

    def hold(self, tensor: Tensor) -> Tensor:
        shown = spoilt_like(tensor) if self.hides else tensor
        self._hidden[id(shown)] = shown, tensor.clone()
        return shown

    def bring(self, held: Sequence[Tensor]) -> CountedCopy:
        sources = [self._hidden[id(tensor)][1] for tensor in held]
        copy = CountedCopy([spoilt_like(source) for source in sources], sources)
        num_bytes = sum(source.nbytes for source in sources)
        weakref.finalize(copy, self._gone, num_bytes)
        self.num_copies += 1
        self.live_bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self.live_bytes)
        return copy

    def settle(self) -> None:
        self.num_settled += 1

    def _gone(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes
