"""Who takes part in `skylapse bench peers`: our modes, and diffusers with all that is there to make it faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch

from ...runtime.cache.spec import PRESETS
from ...runtime.core.device import DTYPES
from ...runtime.core.request import VideoRequest
from ...runtime.engine.engine import Engine
from ...runtime.models.text_cache import TextCache
from ..harness import Missing
from .diffusers_wan import CACHES, DiffusersWan, Run, Timed, cache_dit

OURS = ("exact", *PRESETS)
EAGER, COMPILED, CACHE_DIT = "diffusers", "diffusers-compiled", "cache-dit"
# In a round they stand in this order, so that what is compared most stands together.
ALL = (
    "exact",
    EAGER,
    *PRESETS,
    COMPILED,
    *(f"diffusers-{name}" for name in CACHES),
    CACHE_DIT,
)
QUICK = ("exact", EAGER, *PRESETS, "diffusers-first-block")


def uncached(name: str) -> str | None:
    """Whose clip of the same request shows what a contestant gives up; None: its own is the reference."""
    if name == EAGER:
        return None
    return ("exact" if name != "exact" else None) if name in OURS else EAGER


class Contestants:
    """Loaded when first asked for: ours share an engine, diffusers' caches a pipeline, the others have their own."""

    def __init__(self, model: str, dtype: str, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.settings: dict[str, str] = {}  # of each that has some
        self._makers: dict[str, Callable[[VideoRequest], Run]] = {
            **{name: self._ours(name) for name in OURS},
            EAGER: lambda warm: self._diffusers(),
            COMPILED: self._compiled,
            **{f"diffusers-{name}": self._cached(name) for name in CACHES},
            CACHE_DIT: self._cache_dit,
        }

    @cached_property
    def engine(self) -> Engine:
        return Engine.from_pretrained(self.model, device=self.device, dtype=self.dtype)

    @cached_property
    def hooked(self) -> DiffusersWan:
        return self._diffusers()

    def ready(self, name: str, warm: VideoRequest) -> Run:
        """Warmed up; Missing, with the reason, where a peer is not there or does not run on this model."""
        try:
            run = self._makers[name](warm)
            for _ in range(2 if name == COMPILED else 1):  # compiled again at the second clip's second chunk
                run(warm)
        except Missing:
            raise
        except Exception as error:
            if name in OURS or name == EAGER:
                raise
            words = next(iter(str(error).strip().splitlines()), "")
            raise Missing(f"does not run on this model: {type(error).__name__}: {words[:150]}") from error
        return run

    def _diffusers(self) -> DiffusersWan:
        return DiffusersWan(self.model, DTYPES[self.dtype], self.device)

    def _ours(self, name: str) -> Callable[[VideoRequest], Run]:
        def run(request: VideoRequest) -> Timed:
            engine = self.engine
            engine.text_cache = TextCache(engine.text_cache.budget_bytes)  # diffusers encodes both prompts each time
            asked = replace(request, cache="none" if name == "exact" else name)
            began_cpu, began = time.process_time(), time.perf_counter()
            video = engine.generate(asked)
            whole, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
            return Timed(video.frames, dict(video.metadata.timings_s) | {"whole": whole}, cpu_s)

        return lambda warm: run

    def _compiled(self, warm: VideoRequest) -> Run:
        peer = self._diffusers()
        peer.compile()
        self.settings[COMPILED] = "torch.compile of transformer and vae.decoder"
        return peer

    def _cached(self, name: str) -> Callable[[VideoRequest], Run]:
        def make(warm: VideoRequest) -> Run:
            config = CACHES[name](self.hooked, warm)
            self.settings[f"diffusers-{name}"] = words_of(config)
            return self.hooked.with_cache(config)

        return make

    def _cache_dit(self, warm: VideoRequest) -> Run:
        peer = self._diffusers()
        self.settings[CACHE_DIT] = cache_dit(peer)
        return peer


def words_of(config: Any) -> str:
    """A peer's settings that a reader can judge: all its numbers, and patterns of what it hooks where they are ours."""
    told = {field.name: getattr(config, field.name) for field in fields(config)}
    plain: dict[str, Any] = {name: value for name, value in told.items() if isinstance(value, int | float)}
    if isinstance(patterns := told.get("cache_identifiers"), list):
        plain["cache_identifiers"] = patterns
    return f"{type(config).__name__}({', '.join(f'{name}={value}' for name, value in plain.items())})"
