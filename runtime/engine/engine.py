"""The engine: requests in, events out; every step of it advances many requests by one denoising step."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ...kernels.backends import Backends
from ..checkpoints.registry import EXPERTS
from ..core.config import OFFLOAD, Settings, load_settings
from ..core.device import expand_segments, parse_device, parse_dtype, text_cache_bytes
from ..core.events import DeviceLost, EngineFull, Event, Failed, Finished, Ticket, is_device_lost
from ..core.request import ModelDefaults, ModelLimits, Video, VideoRequest
from ..core.submit_options import Terms
from ..core.threads import choose_threads
from ..core.usage import Account
from ..families.wan.compiled import compile_trunk
from ..layers.quantization import parse_quantize
from ..models.model import Model, load_model
from ..models.text_cache import TextCache
from ..vae.backends import Decoders
from ..vae.preview import AnyPreviewer, load_previewer
from .batch import Batch
from .denoise import evaluate, measured_step, skip_ahead, take
from .memory import MemoryBudget, load_budget
from .meter import Meter
from .pack_cache import Layouts
from .request_checkpoint import load_trajectory
from .scheduler import Scheduler, SchedulerConfig
from .step_loop import StepLoop
from .trajectory import Trajectory
from .validate import check_supported

logger = logging.getLogger(__name__)
# From here on a larger pack gains little. A CPU core steps the demo model at 4,200 tokens/s with 96 tokens a pack,
# 5,400 with 384 and 5,900 with 768, while everyone in a pack waits for all of it. CUDA's is not measured yet.
MAX_BATCH_TOKENS = {"cpu": 384, "cuda": 32768}
# The cost of bringing an expert, by arithmetic: b bytes at 50 GB/s, in which time b FLOP a token pass at 400 TFLOP/s.
SWITCH_TOKENS = 8192


class Engine:
    """Owns a model on a device. `submit` and `abort` may be called from any thread, `step` from one at a time."""

    def __init__(self, model: Model, settings: Settings, backends: Backends | None = None) -> None:
        self.model = model
        self.settings = settings
        self.backends = backends or Backends(settings.kernels)  # of this engine alone, active while it works
        self.text_cache = TextCache(text_cache_bytes(model.device, settings))
        tokens = settings.max_batch_tokens or MAX_BATCH_TOKENS[model.device.type]
        config = SchedulerConfig(
            policy=settings.scheduler,
            max_batch_tokens=tokens,
            tenant_weights=settings.tenant_weights,
            switch_tokens=SWITCH_TOKENS if set(EXPERTS) <= set(model.residency.moved) else 0,
        )
        self.threads = choose_threads(model.device, model.dtype, model.quantize)
        self._batch = Batch(model, Scheduler(config), lambda: self.memory, lambda: self.previewer, self.threads)
        self._tickets = itertools.count(1)
        self._joining: deque[Trajectory] = deque()  # submitted, not yet seen by a step
        self._aborted: deque[Ticket] = deque()
        self._listeners: dict[Ticket, Callable[[Event], None]] = {}
        self._kept: list[Event] = []  # events that nobody has asked for yet
        self._stepping = threading.RLock()
        self._lost: DeviceLost | None = None
        for expert in model.experts if settings.compile else ():
            compile_trunk(expert)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        quantize: str | None = None,
        offload: str | None = None,
        revision: str | None = None,
    ) -> Engine:
        """Load an engine for "demo", a local diffusers folder, or a hub id.

        device: default cuda where there is one. dtype: of text encoder and denoiser, "fp32" or "bf16"; default bf16 on
        cuda and fp32 on the CPU. quantize: "fp8", "int8" or "none", of the weights of the denoiser's blocks; default
        SKYLAPSE_QUANTIZE's. offload: "auto", "none" or "all", the parts that leave a GPU while nothing needs them;
        default SKYLAPSE_OFFLOAD's. revision: a branch, a tag or a commit of a hub id. Raises ValueError for an unknown
        model, a checkpoint that does not fit its config, or a backend of SKYLAPSE_KERNELS that the device cannot run.
        """
        settings = load_settings()
        if offload is not None:
            if offload not in OFFLOAD:
                raise ValueError(f"offload must be {', '.join(OFFLOAD[:-1])} or {OFFLOAD[-1]}, got {offload!r}")
            settings = replace(settings, offload=offload)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        where = parse_device(device)
        expand_segments(where)
        backends = Backends(settings.kernels)
        backends.prepare(where)
        precision = parse_dtype(dtype) or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        directory = Path(cache_dir) if cache_dir is not None else None
        kept_in = parse_quantize(quantize or settings.quantize, where)
        model = load_model(
            name,
            device=where,
            dtype=precision,
            settings=settings,
            cache_dir=directory,
            quantize=kept_in,
            revision=revision,
        )
        engine = cls(model, settings, backends)
        # Loaded in 0.7 ms. Measured at the first start of all, which the first request would wait for instead: the
        # demo model's in 0.14 s by one thread, in 3.8 s by two that wait for each other on cores that others keep busy.
        _ = engine.memory
        engine.decoders.attach()  # after it: what is measured is eager's memory
        if settings.preview_decoder is not None:
            _ = engine.previewer  # a file that does not fit is told now, not at the first preview
        return engine

    @property
    def defaults(self) -> ModelDefaults:
        return self.model.defaults

    @property
    def limits(self) -> ModelLimits:
        return self.model.limits

    @property
    def max_batch_tokens(self) -> int:
        """Return the most tokens of one pack, all branches of all requests together."""
        return self._batch.scheduler.config.max_batch_tokens

    @property
    def pack_stats(self) -> tuple[int, int]:
        """Return (num_packs, num_tokens) that have been through the denoiser since the start."""
        return self._batch.num_packs, self._batch.num_pack_tokens

    @property
    def meter(self) -> Meter:
        return self._batch.meter

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def quantize(self) -> str | None:
        return self.model.quantize

    @cached_property
    def memory(self) -> MemoryBudget:
        """The memory that requests may take; the profile behind it is measured at the first start and stored."""
        with self.backends.active():
            return load_budget(self.model, self.settings, lambda width, height: self.decoders.footprint(width, height))

    @cached_property
    def decoders(self) -> Decoders:
        """The decoders of this engine, which also build a faster one."""
        model, defaults = self.model, self.defaults
        return Decoders(model.name, model.codec, (defaults.width, defaults.height), self.settings)

    @cached_property
    def previewer(self) -> AnyPreviewer:
        with self.model.residency.still():  # it is fitted by who submits, while another thread may step
            return load_previewer(self.model.folder.path, self.model.codec, self.settings.preview_decoder)

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: VideoRequest, latents: Tensor | None = None, **terms: Any) -> Ticket:
        """Queue a request. latents: initial noise [C, T, H, W] instead of the seed's; terms: see `Terms`.

        Raises ValueError at once where the model cannot do it, RequestTooLarge where it can never fit into memory,
        EngineFull while `max_queued` requests are there, DeviceLost after the device was lost.
        """
        return self._join(self._trajectory(next(self._tickets), request, latents, Terms(**terms)))

    def resume(self, folder: str | Path, deadline_s: float | None = None) -> Ticket:
        """Continue a request from its checkpoint. ValueError names what is broken or made for another engine."""
        return self._join(load_trajectory(Path(folder), next(self._tickets), self.model, self.text_cache, deadline_s))

    def has_work(self) -> bool:
        return bool(self._kept) or self.is_busy

    @property
    def is_busy(self) -> bool:
        """Return whether there is work for a tick."""
        return bool(self._joining or len(self._batch))

    def abort(self, ticket: Ticket) -> None:
        """Forget a request before the next step; what it held is freed. An unknown ticket is no error."""
        self._aborted.append(ticket)
        if self._stepping.acquire(blocking=False):  # else the running step does it at its end
            try:
                self._update()
            finally:
                self._stepping.release()

    def step(self) -> list[Event]:
        """Do one tick: a chunk of encoding, a chunk of decoding, and a denoising step of as many requests as fit.

        Returns the events of requests that neither a stream nor `generate` waits for. Raises DeviceLost, after which
        the engine does nothing more.
        """
        with self._stepping:
            self.advance()
            events, self._kept = self._kept, []
            return events

    def advance(self) -> None:
        """Do one tick; the next `step` returns its events that no listener takes."""
        with self._stepping, self._running():
            if self._lost is not None:
                raise self._lost
            self._update()
            try:
                events = self._batch.tick()
            except Exception as error:
                if is_device_lost(error):
                    self._lose(error)
                logger.exception("a tick failed, and with it every request that was under way")
                events = self._batch.fail_all(error)
            self._kept += [event for event in events if not self._heard(event)]
            self._update()

    @contextmanager
    def listening(self, ticket: Ticket, listener: Callable[[Event], None]) -> Iterator[None]:
        """Give a request's events to `listener`, in the thread that steps, instead of returning them."""
        self._listeners[ticket] = listener
        try:
            yield
        finally:
            del self._listeners[ticket]

    def stream(
        self, request: VideoRequest, latents: Tensor | None = None, account: Account | None = None, **terms: Any
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of one request as they happen; leaving the loop early aborts it.

        Steps run in a thread of their own, shared by all streams of the engine, so the event loop never waits for the
        device. The first event raises what `submit` raises. account: what the request uses is added to it.
        """
        ticket = next(self._tickets)
        return self._loop.events(
            ticket,
            lambda: self._join(self._trajectory(ticket, request, latents, Terms(**terms)).charged_to(account)),
        )

    def stream_resumed(
        self, folder: str | Path, deadline_s: float | None = None, account: Account | None = None
    ) -> AsyncGenerator[Event, None]:
        """Do as `stream` for a request resumed from its checkpoint. The first event raises what `resume` raises."""
        ticket, of = next(self._tickets), (self.model, self.text_cache)
        return self._loop.events(
            ticket, lambda: self._join(load_trajectory(Path(folder), ticket, *of, deadline_s).charged_to(account))
        )

    def start_stepping(self) -> None:
        """Start the thread of all streams now: it has the priority of the thread that calls this."""
        _ = self._loop

    def weigh_tenants(self, weights: Mapping[str, float]) -> None:
        """Take an operator's weights of tenants; they replace SKYLAPSE_TENANT_WEIGHTS where both name one."""
        self._batch.scheduler.weigh({**self.settings.tenant_weights, **weights})

    def close(self) -> None:
        """Stop the thread that streams have started, if any, and a build; requests stay where they are."""
        if "decoders" in self.__dict__:
            self.decoders.close()
        if "_loop" in self.__dict__:
            self._loop.close()
            del self.__dict__["_loop"]

    # --- whole videos and parts of the way ------------------------------------------------------------------------

    def generate(self, request: VideoRequest, latents: Tensor | None = None) -> Video:
        """Make one video beside everything already queued, whose events the next `step` returns."""
        ticket = next(self._tickets)
        ended = self._end_of(ticket, lambda: self._join(self._trajectory(ticket, request, latents, Terms())))
        if isinstance(ended, Failed):
            raise ended.error
        return ended.video

    def generate_latents(self, request: VideoRequest, latents: Tensor | None = None) -> Tensor:
        """Return the final normalised latents [C, T, H, W] fp32 of a request, undecoded; outside the queue."""
        t, layouts = self.prepare(request, latents), Layouts(self.model)
        with self._stepping, self._running():
            self.model.residency.reserve(self.model.residency.budget_bytes)  # nobody has counted what this takes
            while t.stage == "encode":
                t.work()
            while t.stage == "denoise":
                stepped, failed = skip_ahead([t])
                if failed:
                    raise failed[t.ticket]
                if not stepped:
                    with measured_step(self.threads, [t], is_first=not t.steps_done):
                        outcomes = evaluate(self.model, [t], layouts)
                    take(t, outcomes[0])
            return t.final_latents()

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Yield uint8 frames [n, H, W, 3] of normalised latents [C, T, H, W], chunk by chunk, the first frame first."""
        return self.model.codec.decode(latents)

    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Return normalised latents [C, T, H, W] fp32 of F = 4k+1 uint8 frames [F, H, W, 3] or floats [3, F, H, W].

        Floats are in [-1, 1]. For Wan's VAE T is k + 1, H and W the frames' sides / 8 (Wan2.2-TI2V's: / 16). Uses a
        compiled encoder if one was built, is right and faster. ValueError for another number of frames.
        """
        return self.model.codec.encode(frames)

    # --- what they use --------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Hold the contexts that work on requests runs under."""
        threads = self.threads.in_use() if self.threads else nullcontext()
        with self.backends.active(), torch.inference_mode(), threads:
            yield

    @cached_property
    def _loop(self) -> StepLoop:
        return StepLoop(self)

    def prepare(self, request: VideoRequest, latents: Tensor | None = None) -> Trajectory:
        """Return a trajectory outside the queue, to be measured."""
        return self._trajectory(0, request, latents, Terms())

    def _trajectory(self, ticket: Ticket, request: VideoRequest, latents: Tensor | None, terms: Terms) -> Trajectory:
        request = request.resolved(self.defaults, self.limits)
        check_supported(self.model, request)
        return Trajectory(ticket, self.model, request, self.text_cache, latents, terms)

    def _end_of(self, ticket: Ticket, join: Callable[[], object]) -> Finished | Failed:
        """Submit by `join` and wait for the request's end, stepping unless a stream's thread does."""
        ends: SimpleQueue[Finished | Failed] = SimpleQueue()
        with self.listening(ticket, lambda event: ends.put(event) if isinstance(event, Finished | Failed) else None):
            join()
            while True:
                if not self._streams:
                    self.advance()
                with suppress(Empty):
                    return ends.get(timeout=0.05 if self._streams else 0)

    def _lose(self, error: Exception) -> NoReturn:
        """Tell everyone who waits that the device is lost, and never step again."""
        self._lost = DeviceLost(f"the device of this engine is lost: {error}")
        for ticket, listener in list(self._listeners.items()):
            listener(Failed(ticket, self._lost))
        raise self._lost from error

    def _heard(self, event: Event) -> bool:
        listener = self._listeners.get(event.ticket)
        if listener is not None:
            listener(event)
        return listener is not None

    @property
    def _streams(self) -> bool:
        """Return whether a stream's thread is stepping."""
        return "_loop" in self.__dict__ and self._loop.is_running

    def _join(self, trajectory: Trajectory) -> Ticket:
        if self._lost is not None:
            raise self._lost
        if len(self._joining) + len(self._batch) >= self.settings.max_queued:
            raise EngineFull(f"{self.settings.max_queued} requests are queued or running, all that this engine takes")
        trajectory.fit = self.memory.check(trajectory)
        if trajectory.terms.preview_every:
            _ = self.previewer  # fitted here where no file beside the model has the map, rather than between two steps
        trajectory.account.enter()
        self._joining.append(trajectory)
        if self._streams:
            self._loop.notify()
        return trajectory.ticket

    def _update(self) -> None:
        """Let submitted requests join and aborted ones leave, with the events nobody asked for; between two ticks."""
        while self._joining:
            self._batch.join(self._joining.popleft())
        while self._aborted:
            self._batch.leave(ticket := self._aborted.popleft())
            self._kept = [event for event in self._kept if event.ticket != ticket]
