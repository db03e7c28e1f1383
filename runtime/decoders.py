"""What decodes this process's clips: compiled where something is built that is right and faster, eager until then."""

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

from ..compile.backend import Backend
from ..compile.cache import EngineCache
from ..compile.select import Selector
from ..compile.stream import Plan, Run
from .config import Settings
from .vae.codec import VideoCodec
from .vae.coders import decoder_of

logger = logging.getLogger(__name__)
NICE = 19  # of a build beside a running service
BUILD_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class DecoderReport:
    """What decodes, why, and what has been demoted."""

    backend: str
    why: str
    demotions: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """As an engine's sign of life carries them."""
        told = {"decoder": self.backend, "decoder_why": self.why, "decoder_demotions": len(self.demotions)}
        return told | ({"decoder_demoted": self.demotions} if self.demotions else {})


def backends(device: torch.device) -> list[Backend]:
    """All that a decoder can be built for; by default the first is built that a device has."""
    from ..compile.inductor import Inductor
    from ..compile.onnxruntime import OnnxRuntime
    from ..compile.tensorrt import TensorRT

    return [TensorRT(device), OnnxRuntime(device), Inductor(device)]


def cache_of(settings: Settings) -> EngineCache:
    """Where built decoders lie: the operator's own folder, and one that may be read-only."""
    root = settings.compiled_dir or settings.profile_dir / "compiled"
    shared = [settings.compiled_shared_dir] if settings.compiled_shared_dir else []
    return EngineCache(root, shared, settings.compiled_bytes)


class Decoders:
    """Of one model. Nothing is read, digested or loaded before the first clip is decoded.

    size: (width, height) of the clips that are likeliest.
    """

    def __init__(self, model: str, codec: VideoCodec, size: tuple[int, int], settings: Settings) -> None:
        self.model, self.codec, self.settings = model, codec, settings
        self.default_size = self.latent_size(*size)
        self._building: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    @cached_property
    def selector(self) -> Selector:
        device = self.codec.device
        return Selector(
            decoder_of(self.codec.vae),
            backends(device),
            cache_of(self.settings),
            device=device,
            dtype=self.settings.decoder_dtype,
            wanted=self.settings.decoder,
        )

    @property
    def plan(self) -> Plan:
        """What is built where nothing else is said: for any size."""
        return Plan(self.settings.decoder_dtype)

    def attach(self) -> None:
        """Let the model's codec ask here; ValueError where the backend that is configured cannot be had."""
        wanted = self.settings.decoder
        if wanted == "eager":
            return
        if wanted != "auto" and (reason := self.selector.backend(wanted).missing(self.plan)):
            raise ValueError(f"SKYLAPSE_DECODER={wanted}: {reason}")
        self.codec.choose_decoder = self._choose

    def _choose(self, height: int, width: int) -> Run:
        return self.selector.choose(height, width).run

    @property
    def report(self) -> DecoderReport:
        """Of clips of the default size; never waits for anything, so that a sign of life may carry it."""
        if self.settings.decoder == "eager":
            return DecoderReport("eager", "as configured", [])
        chosen = self.selector.chosen(*self.default_size)
        if chosen is None:
            return DecoderReport("eager", "the next clip chooses", self.selector.demotions)
        return DecoderReport(chosen.backend, chosen.why, self.selector.demotions)

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """(h, w) in latents that frames of width x height pixels, or their tiles, are decoded at."""
        factor = self.codec.spatial_factor
        return self.codec.tiling.size(height // factor, width // factor, factor)

    def prepare(self) -> None:
        """Load what clips of the default size will be decoded by, before the first of them waits for it."""
        if self.settings.decoder != "eager":
            self.selector.choose(*self.default_size)

    # --- building beside a running service ------------------------------------------------------------------------

    def build_in_background(self) -> bool:
        """Build what is missing in a process of its own, which gives way to everything else; False where nothing is.

        Clips that begin after it has ended may use it.
        """
        if self.settings.decoder == "eager" or self._building is not None:
            return False
        wanted = self.settings.decoder
        plan = self.plan
        fitting = [backend for backend in self.selector.backends if wanted in ("auto", backend.name)]
        if not fitting:
            return False
        backend = next((backend for backend in fitting if backend.missing(plan) is None), fitting[0])
        name = backend.name
        key = self.selector.key(backend, plan)
        failure = self.selector.cache.failure(key)
        if reason := backend.missing(plan) or (failure.reason if failure else None):
            logger.info("no decoder is built in the background: %s", reason)
            return False
        if self.selector.cache.find(key) is not None or key.id in self.selector.ledger.demoted():
            return False
        self._building = threading.Thread(target=self._build, args=(name,), name="skylapse-build", daemon=True)
        self._building.start()
        return True

    def command(self, name: str) -> list[str]:
        """What builds a backend for this model in a process of its own."""
        arguments = [self.model, "--backend", name, "--device", self.codec.device.type]
        arguments += ["--dtype", self.settings.decoder_dtype, "--threads", str(torch.get_num_threads())]
        return [sys.executable, "-m", __package__.partition(".")[0], "compile", *arguments]

    def _build(self, name: str) -> None:
        key = self.selector.key(self.selector.backend(name), self.plan)
        logger.info("%s is built in the background; eager decodes until then", name)
        status, said = self._finish(self.command(name))
        if status == 0:
            self.selector.refresh()
            self.prepare()
            logger.info("%s is built", name)
            return
        if status is None:
            self.selector.cache.fail(key, f"not built within {BUILD_TIMEOUT_S:g} s")
        elif status < 0:  # a signal: the kernel's, when memory runs out
            self.selector.cache.fail(key, f"the build was killed by signal {-status}, as happens when memory runs out")
        logger.warning("%s could not be built (%s): eager goes on", name, (said.strip().splitlines() or ["killed"])[-1])

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
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._building is not None:
            self._building.join(timeout=10.0)
