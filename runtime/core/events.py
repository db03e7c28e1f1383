"""What an engine tells of its requests, and the errors that have a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .request import Video
    from .usage import Usage

Ticket = int


@dataclass(frozen=True)
class Progress:
    """Step `step` of `num_steps` is done.

    step_s: seconds a step so far, whatever else ran in between. eta_s: at that pace, until the last step.
    num_skipped: steps so far that a cache answered. usage: what the request has used in this engine so far; on a GPU
    without what it is still working on.
    """

    ticket: Ticket
    step: int
    num_steps: int
    step_s: float = field(default=0.0, compare=False)
    eta_s: float = field(default=0.0, compare=False)
    num_skipped: int = field(default=0, compare=False)
    usage: Usage | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Preview:
    """What the clip will look like, as predicted after step `step`: uint8 [latent frames, height / k, width / k, 3]."""

    ticket: Ticket
    step: int
    frames: np.ndarray


@dataclass(frozen=True)
class Checkpointed:
    """The request can be resumed after step `step` from `folder`; usage: what it had used in this engine by then."""

    ticket: Ticket
    step: int
    folder: Path
    usage: Usage | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Finished:
    ticket: Ticket
    video: Video


@dataclass(frozen=True)
class Failed:
    ticket: Ticket
    error: Exception


Event = Progress | Preview | Checkpointed | Finished | Failed


class EngineFull(RuntimeError):
    """More requests wait than `max_queued`; try again later."""


class RequestTooLarge(ValueError):
    """The request can never fit into this engine's memory."""


class DeadlineExceeded(TimeoutError):
    """The request's deadline passed before its video was made."""


class NotFinite(FloatingPointError):
    """NaN or infinity in a request's latents; the message names the step."""


class OutOfMemory(RuntimeError):
    """The device's memory did not suffice for this request alone."""


class DeviceLost(RuntimeError):
    """The device answers no more: every request of this engine is lost, and the process has to be replaced."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on CUDA or on the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether a CUDA context is beyond use (a fault in a kernel, a card that fell off the bus)."""
    import torch

    if is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", ())
    return isinstance(error, kind) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
