"""Decoding beside denoising: chunks on a CUDA stream of their own, each fetched while the next one is decoded.

The engine's loop asks for a chunk a tick. With a lane the next chunk is queued before the last one is waited for, so
that between two ticks the device decodes while it denoises other requests. Not run on a GPU yet; tests run the order
of the calls on a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, cuda

Fetch = Callable[[], np.ndarray]


class Lane(Protocol):
    """Where chunks are decoded."""

    def follow(self, *inputs: Tensor) -> None:
        """What is queued here from now on may read `inputs`, and all else that the caller has queued so far."""

    def section(self) -> AbstractContextManager[None]:
        """What is done inside is queued here."""

    def fetch(self, tensor: Tensor) -> Fetch:
        """Queue a tensor's way to the host, inside a section; the result waits for it and for nothing else."""


class CudaLane:
    """A stream. Its memory is the allocator's pool of that stream, so nothing of it is reused across streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = cuda.Stream(device)

    def follow(self, *inputs: Tensor) -> None:
        ready = cuda.Event()
        ready.record(cuda.current_stream(self.device))
        self.stream.wait_event(ready)
        for tensor in inputs:
            if tensor.is_cuda:
                tensor.record_stream(self.stream)  # or its memory is somebody else's as soon as the caller drops it

    @contextmanager
    def section(self) -> Iterator[None]:
        with cuda.stream(self.stream):
            yield

    def fetch(self, tensor: Tensor) -> Fetch:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        done = cuda.Event()
        done.record(self.stream)

        def wait() -> np.ndarray:
            done.synchronize()
            return host.numpy().copy()  # a clip's frames are kept, and pinned memory is scarce

        return wait


def overlapped(chunks: Iterator[Tensor], lane: Lane, *inputs: Tensor) -> Iterator[np.ndarray]:
    """Each of `chunks` on the host, in order; made on the lane, one ahead of who asks."""
    lane.follow(*inputs)

    def queue() -> Fetch | None:
        with lane.section():  # never across a yield: the caller would go on here
            chunk = next(chunks, None)
            return None if chunk is None else lane.fetch(chunk)

    waiting = queue()
    while waiting is not None:
        following = queue()
        yield waiting()
        waiting = following
