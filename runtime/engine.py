"""The engine: requests in, events out, one bounded work item a step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import Settings, load_settings
from .models.model import Model, load_model
from .models.text_cache import TextCache
from .request import ModelDefaults, ModelLimits, Video, VideoRequest
from .trajectory import Trajectory, check_supported

Ticket = int
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Progress:
    """Step `step` of `num_steps` is done."""

    ticket: Ticket
    step: int
    num_steps: int


@dataclass(frozen=True)
class Finished:
    ticket: Ticket
    video: Video


@dataclass(frozen=True)
class Failed:
    ticket: Ticket
    error: Exception


Event = Progress | Finished | Failed


class Engine:
    """Owns a model on a device and makes videos with it, one request after the other."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.text_cache = TextCache(settings.text_cache_bytes)
        self._queue: deque[Trajectory] = deque()
        self._tickets = itertools.count(1)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache_dir: str | Path | None = None,
    ) -> Engine:
        """An engine for "demo", a local diffusers folder, or a hub id.

        device: default cuda where there is one. dtype: of text encoder and denoiser, "fp32" or "bf16"; default bf16 on
        cuda and fp32 on the CPU. Raises ValueError for an unknown model or a checkpoint that does not fit its config.
        """
        settings = load_settings()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        where = _device(device)
        precision = _dtype(dtype) or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        directory = Path(cache_dir) if cache_dir is not None else None
        return cls(load_model(name, device=where, dtype=precision, settings=settings, cache_dir=directory), settings)

    @property
    def defaults(self) -> ModelDefaults:
        return self.model.defaults

    @property
    def limits(self) -> ModelLimits:
        return self.model.limits

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: VideoRequest, latents: Tensor | None = None) -> Ticket:
        """Queue a request. Raises ValueError at once where the model cannot do it.

        latents: initial noise [C, T, H, W] instead of the seed's.
        """
        request = request.resolved(self.defaults, self.limits)
        check_supported(self.model, request)
        ticket = next(self._tickets)
        self._queue.append(Trajectory(ticket, self.model, request, self.text_cache, latents))
        return ticket

    def has_work(self) -> bool:
        return bool(self._queue)

    def step(self) -> list[Event]:
        """One work item of the oldest request: encode it, one denoising step, or decode one chunk."""
        if not self._queue:
            return []
        trajectory = self._queue[0]
        try:
            trajectory.advance()
        except Exception as error:  # a request that fails, fails alone; the caller is told by event
            self.abort(trajectory.ticket)
            return [Failed(trajectory.ticket, error)]
        if trajectory.video is not None:
            self.abort(trajectory.ticket)
            return [Finished(trajectory.ticket, trajectory.video)]
        if trajectory.just_stepped:
            return [Progress(trajectory.ticket, trajectory.steps_done, trajectory.num_steps)]
        return []

    def abort(self, ticket: Ticket) -> None:
        """Forget a request before its next work item; what it held is freed. An unknown ticket is no error."""
        self._queue = deque(t for t in self._queue if t.ticket != ticket)

    # --- whole videos and parts of the way ------------------------------------------------------------------------

    def generate(self, request: VideoRequest, latents: Tensor | None = None) -> Video:
        """Make one video, after everything already queued."""
        ticket = self.submit(request, latents)
        while True:
            for event in self.step():
                if isinstance(event, Finished) and event.ticket == ticket:
                    return event.video
                if isinstance(event, Failed) and event.ticket == ticket:
                    raise event.error

    def generate_latents(self, request: VideoRequest, latents: Tensor | None = None) -> Tensor:
        """Final normalised latents [C, T, H, W] fp32 of a request, undecoded; outside the queue."""
        request = request.resolved(self.defaults, self.limits)
        check_supported(self.model, request)
        trajectory = Trajectory(0, self.model, request, self.text_cache, latents)
        while trajectory.steps_done < trajectory.num_steps:
            trajectory.advance()
        return trajectory.final_latents()

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """uint8 frames [n, H, W, 3] of normalised latents [C, T, H, W], chunk by chunk, the first frame first."""
        return self.model.codec.decode(latents)

    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Normalised latents [C, T, H, W] fp32 of 4k+1 uint8 frames [F, H, W, 3]."""
        return self.model.codec.encode(frames)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda, got {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds none")
    return where


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    return dtype
