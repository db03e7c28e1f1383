"""What codes this process's clips: compiled where something is built that is right and faster, eager until then."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...compile import footprint
from ...compile.backend import Backend
from ...compile.cache import EngineCache
from ...compile.select import Selector
from ...compile.stream import DTYPES, Coder, Plan
from ..core.config import Settings
from .codec import VideoCodec
from .coders import decoder_of, encoder_of

logger = logging.getLogger(__name__)
NICE = 19  # of a build beside a running service
BUILD_TIMEOUT_S = 3600.0
ASK_AGAIN_S = 600.0  # for the memory of a build that a busy GPU had none for
ENCODER_ERROR = 1e-2  # of the narrowest channel's standard deviation: fp32 convolutions in TF32 differ by a tenth of it


@dataclass(frozen=True)
class DecoderReport:
    """What decodes and encodes, why, and what has been demoted."""

    backend: str
    why: str
    demotions: list[str]
    encoder: str = "eager"
    encoder_why: str = "as configured"

    @property
    def facts(self) -> dict[str, Any]:
        """As an engine's sign of life carries them."""
        told = {"decoder": self.backend, "decoder_why": self.why, "decoder_demotions": len(self.demotions)}
        told |= {"encoder": self.encoder, "encoder_why": self.encoder_why}
        return told | ({"decoder_demoted": self.demotions} if self.demotions else {})


def backends(device: torch.device, memory_bytes: int | None = None) -> list[Backend]:
    """All that a coder can be built for; by default the first is built that a device has.

    memory_bytes: what the operator lets this process take of the device; None is all that is free.
    """
    from ...compile.inductor import Inductor
    from ...compile.onnxruntime import OnnxRuntime
    from ...compile.tensorrt import TensorRT

    return [TensorRT(device, memory_bytes), OnnxRuntime(device), Inductor(device)]


def cache_of(settings: Settings) -> EngineCache:
    """Where what is built lies: the operator's own folder, and one that may be read-only."""
    root = settings.compiled_dir or settings.profile_dir / "compiled"
    shared = [settings.compiled_shared_dir] if settings.compiled_shared_dir else []
    return EngineCache(root, shared, settings.compiled_bytes)


class Decoders:
    """Of one model, and its encoder. Nothing is read, digested or loaded before the first clip is coded.

    size: (width, height) of the clips that are likeliest.
    """

    def __init__(self, model: str, codec: VideoCodec, size: tuple[int, int], settings: Settings) -> None:
        self.model, self.codec, self.settings, self.size = model, codec, settings, size
        self.default_size = self.latent_size(*size)
        self.wanted = {"decoder": settings.decoder, "encoder": settings.encoder or settings.decoder}
        self._building: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._closing = threading.Event()
        self._waiting: dict[str, str] = {}  # part -> why its build has not begun
        self._builds: dict[str, str] = {}  # part -> the backend that is being built for it, or waits for its turn

    @cached_property
    def selector(self) -> Selector:
        """Of the decoder."""
        codec = self.codec
        dtype = next(name for name, dtype in DTYPES.items() if dtype == codec.decoder_dtype)
        return self._selector("decoder", decoder_of(codec.vae), dtype, eager=codec.decoder)

    @cached_property
    def encoder(self) -> Selector:
        """Of the encoder, in fp32 always: in bf16 a given picture is visibly another."""
        allowed = ENCODER_ERROR * min(self.codec.vae.config.latents_std)
        return self._selector("encoder", encoder_of(self.codec.vae), "fp32", allowed)

    def _selector(
        self, part: str, coder: Coder, dtype: str, max_error: float | None = None, eager: nn.Module | None = None
    ) -> Selector:
        device = self.codec.device
        return Selector(
            coder,
            backends(device, self.settings.memory_bytes),
            cache_of(self.settings),
            device=device,
            dtype=dtype,
            wanted=self.wanted[part],
            max_error=max_error,
            eager=eager,
        )

    def selector_of(self, part: str) -> Selector:
        """Of the "decoder" or the "encoder"."""
        return self.selector if part == "decoder" else self.encoder

    @property
    def plan(self) -> Plan:
        """Of the decoder, where nothing else is said."""
        return self.selector.plan_for(self.default_size)

    @property
    def _compiled(self) -> list[str]:
        """The parts that anything but eager may run."""
        return [part for part, wanted in self.wanted.items() if wanted != "eager"]

    def attach(self) -> None:
        """Let the model's codec ask here; ValueError where the backend that is configured cannot be had."""
        for part in self._compiled:
            selector, wanted = self.selector_of(part), self.wanted[part]
            if wanted != "auto" and (reason := selector.backend(wanted).missing(Plan(selector.dtype))):
                variable = "SKYLAPSE_DECODER" if wanted == self.settings.decoder else "SKYLAPSE_ENCODER"
                raise ValueError(f"{variable}={wanted}: {reason}")
        if "decoder" in self._compiled:
            self.codec.choose_decoder = lambda height, width: self.selector.choose(height, width).run
        if "encoder" in self._compiled:
            self.codec.choose_encoder = lambda height, width: self.encoder.choose(height, width).run

    @property
    def report(self) -> DecoderReport:
        """Of clips of the default size; never waits for anything, so that a sign of life may carry it."""
        decoder, encoder = self._stands("decoder"), self._stands("encoder")
        demotions = self.selector.demotions if "decoder" in self._compiled else []
        if "encoder" in self._compiled:
            demotions = demotions + [f"encoder: {told}" for told in self.encoder.demotions]
        return DecoderReport(*decoder, demotions, *encoder)

    def _stands(self, part: str) -> tuple[str, str]:
        """Which backend, and why; and why what is missing is not being built."""
        if part not in self._compiled:
            return "eager", "as configured"
        chosen = self.selector_of(part).chosen(*self.default_size)
        backend, why = (chosen.backend, chosen.why) if chosen else ("eager", "the next clip chooses")
        if (building := self._builds.get(part)) is not None:
            why = f"{building} is being built in the background"
        return backend, "; ".join(filter(None, (why, self._waiting.get(part))))

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """(h, w) in latents that frames of width x height pixels, or their tiles, are coded at."""
        factor = self.codec.spatial_factor
        return self.codec.tiling.size(height // factor, width // factor, factor)

    def footprint(self, width: int, height: int) -> tuple[int, int]:
        """Bytes that compiled parts hold, and that the work of one takes on top, of frames of width x height pixels.

        Of what has been chosen so far: it never waits.
        """
        size, held, work = self.latent_size(width, height), 0, 0
        for part in self._compiled:
            choice = self.selector_of(part).chosen(*size)
            if choice is not None and choice.footprint is not None:
                held, work = held + choice.footprint.held_bytes, max(work, choice.footprint.work_at(*size))
        return held, work

    def prepare(self) -> None:
        """Load what clips of the default size will be coded by, before the first of them waits for it."""
        for part in self._compiled:
            self.selector_of(part).choose(*self.default_size)

    # --- building beside a running service ------------------------------------------------------------------------

    def build_in_background(self) -> bool:
        """Build what is missing in a process of its own, which gives way to everything else; False where nothing is.

        Clips that begin after it has ended may use it. On a GPU nothing gives way: a build that needs more memory than
        is free there is not begun, and asked for again every ten minutes.
        """
        if self._building is not None:
            return False
        wanting = [(part, name) for part in self._compiled if (name := self._missing(part)) is not None]
        if not wanting:
            return False
        self._building = threading.Thread(target=self._build_all, args=(wanting,), name="skylapse-build", daemon=True)
        self._building.start()
        return True

    def _missing(self, part: str) -> str | None:
        """The first backend that this machine has and that has not failed, if it is not built yet."""
        selector, wanted = self.selector_of(part), self.wanted[part]
        demoted = selector.ledger.demoted()
        for backend in selector.backends:
            if wanted not in ("auto", backend.name):
                continue
            plan = selector.plan_for(self.default_size, backend)
            key = selector.key(backend, plan)
            failure = selector.cache.failure(key)
            told = demoted[key.id]["reason"] if key.id in demoted else None
            if reason := backend.missing(plan) or (failure.reason if failure else None) or told:
                logger.info("%s: no %s is built in the background: %s", backend.name, part, reason)
            elif selector.find(backend, plan) is None:
                return backend.name
            else:
                return None
        return None

    def command(self, part: str, name: str) -> list[str]:
        """What builds a backend for this model in a process of its own."""
        arguments = [self.model, "--part", part, "--backend", name, "--device", self.codec.device.type]
        selector = self.selector_of(part)
        if selector.plan_for(self.default_size, selector.backend(name)).size is not None:
            arguments += ["--size", "{}x{}".format(*self.size)]
        arguments += ["--dtype", selector.dtype, "--threads", str(torch.get_num_threads())]
        return [sys.executable, "-m", __package__.partition(".")[0], "compile", *arguments]

    def _build_all(self, wanting: Sequence[tuple[str, str]]) -> None:
        remaining = list(wanting)
        self._builds = {part: name for part, name in wanting}
        while True:
            for part, name in [*remaining]:
                if not self._closing.is_set() and self._has_room(part, name):
                    remaining.remove((part, name))
                    try:
                        self._build(part, name)
                    finally:
                        del self._builds[part]
            if not remaining or self._closing.wait(ASK_AGAIN_S):
                return

    def _has_room(self, part: str, name: str) -> bool:
        """Whether the device has now what a build takes at its most; else the log and the report say how much that is.

        The build is another process: what this one's allocator keeps unused is not there for it.
        """
        selector = self.selector_of(part)
        free = footprint.free_bytes(self.codec.device)
        if free is None:
            return True
        backend = selector.backend(name)
        plan = backend.plans(selector.plan_for(self.default_size, backend))[0]
        chunk, dtype = plan.chunk or self.codec.chunk, DTYPES[plan.dtype]
        needed = footprint.build_bytes(selector.coder, self.default_size, chunk, dtype, backend.workspace_bytes)
        needed_gib, free_gib = footprint.gib(needed), footprint.gib(free)
        told = f"building {name}'s {part} takes about {needed_gib} of the device's memory, and {free_gib} are free"
        if needed <= free:
            logger.info("%s", told)
            self._waiting.pop(part, None)
            return True
        if self._waiting.get(part, "").partition(",")[0] != told.partition(",")[0]:  # once, not every ten minutes
            logger.warning("%s: eager goes on, and it is asked again every %g s", told, ASK_AGAIN_S)
        self._waiting[part] = told
        return False

    def _build(self, part: str, name: str) -> None:
        selector = self.selector_of(part)
        backend = selector.backend(name)
        key = selector.key(backend, selector.plan_for(self.default_size, backend))
        logger.info("%s's %s is built in the background; eager serves until then", name, part)
        status, said = self._finish(self.command(part, name))
        if status == 0:
            selector.refresh()
            selector.choose(*self.default_size)
            logger.info("%s's %s is built", name, part)
            return
        if self._closing.is_set():
            return
        if status is None:
            selector.cache.fail(key, f"not built within {BUILD_TIMEOUT_S:g} s")
        elif status < 0:  # a signal: the kernel's, when memory runs out
            selector.cache.fail(key, f"the build was killed by signal {-status}, as happens when memory runs out")
        words = (said.strip().splitlines() or ["killed"])[-1]
        logger.warning("%s's %s could not be built (%s): eager goes on", name, part, words)

    def _finish(self, command: Sequence[str]) -> tuple[int | None, str]:
        """Exit status and stderr of a niced process; None where it took too long."""
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        self._process = process
        try:
            os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
            _, said = process.communicate(timeout=BUILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None, "timed out"
        return process.returncode, said

    def close(self) -> None:
        """End a build that is running."""
        self._closing.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._building is not None:
            self._building.join(timeout=10.0)
