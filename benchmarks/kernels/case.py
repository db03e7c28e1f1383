"""What is compared: one operation at one shape, and everyone who computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...kernels.roofline import Cost
from ..harness import Run

Make = Callable[[], Run]  # may raise Missing, or whatever a peer raises that cannot be made


@dataclass(frozen=True)
class Case:
    """`build` makes the inputs, and whom to make of them, ours first; it is called when the case's turn has come."""

    op: str
    name: str
    cost: Cost
    dtype: torch.dtype  # of the products, whose rate bounds
    build: Callable[[], Mapping[str, Make]]


@dataclass(frozen=True)
class Suite:
    """Where it is measured, and how large."""

    device: torch.device
    dtype: torch.dtype
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers in the suite's dtype."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def compiled(run: Run) -> Run:
    """The same lines by torch.compile, compiled here and not while others wait."""
    torch._dynamo.reset()  # each case is a shape of its own, and dynamo gives up at the eighth of one function
    fast: Run = torch.compile(run, dynamic=False)
    with torch.inference_mode():
        fast()
    return fast


def beside_torch(run: Run, lines: Run, cost: Cost, device: torch.device) -> dict[str, Make]:
    """Ours, torch's lines, the same compiled, and a copy that moves as many bytes."""
    return {
        "skylapse": lambda: run,
        "torch": lambda: lines,
        "torch.compile": lambda: compiled(lines),
        "copy": lambda: copy_of(cost.num_bytes, device),
    }


def copy_of(num_bytes: int, device: torch.device) -> Run:
    """Reads half of the bytes and writes half."""
    source = torch.zeros(max(16, num_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
