"""Notices NaN and infinity in latents without making the device wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .denoise import Taken


class FiniteWatch:
    """One scalar a request and step; on CUDA it is copied behind the step and read once it has arrived."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._pending: list[tuple[list[tuple[int, int]], Tensor, torch.cuda.Event | None]] = []

    def watch(self, stepped: Sequence[Taken]) -> None:
        """Call after a tick, with all of its steps: a request may have skipped several in a row."""
        if not stepped:
            return
        steps = [(taken.trajectory.ticket, taken.step) for taken in stepped]
        flags = torch.stack([taken.total for taken in stepped]).isfinite()
        event = None
        if self.on_cuda:
            flags = flags.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((steps, flags, event))

    def poll(self, wait: bool = False) -> list[tuple[int, int]]:
        """(ticket, step) of the steps found out since the last call, the first first; `wait`: of every step so far."""
        broken = []
        while self._pending:
            steps, flags, event = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    break
                event.synchronize()
            del self._pending[0]
            broken += [step for step, is_finite in zip(steps, flags.tolist(), strict=True) if not is_finite]
        return broken
