"""Call 6: the engine with Wan2.1-T2V-1.3B's shapes and random weights: admission, peaks, and decoding beside steps.

The checkpoint is a folder in the published format, written where the machine has room. Its text encoder has UMT5-XXL's
width and a few of its layers: it works once a prompt, and its memory is not measured here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ...runtime.checkpoints.configs import parse_config
from ...runtime.checkpoints.published import component
from ...runtime.core.events import Event, Failed, Finished, Progress, RequestTooLarge
from ...runtime.core.request import VideoRequest
from ...runtime.engine.engine import Engine
from ...runtime.families.wan.denoiser import WanConfig
from ...runtime.vae.wan import WanVAEConfig
from ..peak import held_bytes, peak_while
from ..suites.clips import Size, clip_request, words_of
from .case import Case, Context
from .drive import main
from .lines import Line, Note, measured
from .random_weights import VAE_21, write_checkpoint
from .streams import overlap_of
from .vae import NARROW_21

CONFIG = parse_config(WanConfig, component("wan-1.3b"), "transformer")
TEXT = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 2}
TINY_CONFIG = WanConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=64,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
)
TINY_TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2}
NATIVE: Size = (832, 480, 81)
LARGE: Size = (1280, 720, 81)
TINY: Size = (48, 32, 9)
STEPS, FEW, MANY, JOBS = 6, 2, 12, 3


def cases(context: Context) -> Iterator[Case]:
    bench = Bench(context)
    size = TINY if context.dry else NATIVE
    yield Case("load", bench.load)
    yield Case("first request", partial(bench.first, size))
    yield Case("one job", partial(bench.one, size))
    yield Case("decoding beside steps", partial(bench.beside, size))
    yield Case("several jobs", partial(bench.several, size))
    if not context.dry:
        yield Case("one job of 720p", partial(bench.large, LARGE))
    yield Case("streams", partial(bench.streams, size))


@dataclass
class Bench:
    """One engine for all cases; it is loaded when the first case needs it."""

    context: Context
    seconds: dict[str, float] = field(default_factory=dict)  # of making it
    step_s: float = 0.0  # of one job alone, and of its decoding
    decode_s: float = 0.0

    @cached_property
    def folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="skylapse-lease-")

    @cached_property
    def engine(self) -> Engine:
        dry, device = self.context.dry, self.context.device
        began = time.perf_counter()
        config, codec = (TINY_CONFIG, NARROW_21) if dry else (CONFIG, VAE_21)
        path = self._written(config, codec, TINY_TEXT if dry else TEXT)
        self.seconds["written"], began = time.perf_counter() - began, time.perf_counter()
        engine = Engine.from_pretrained(str(path), device=device)
        self.seconds["loaded"] = time.perf_counter() - began
        return engine

    def _written(self, config: WanConfig, codec: WanVAEConfig, text: dict[str, int]) -> Path:
        return write_checkpoint(Path(self.folder.name), config, codec, text, self.context.device)

    # --- cases --------------------------------------------------------------------------------------------------------

    def load(self) -> Iterator[Line]:
        engine = self.engine
        for name, seconds in self.seconds.items():
            yield measured(f"engine/{name}", "s", [seconds])
        yield measured("engine/weights", "bytes", [engine.model.num_bytes], "neither")
        yield measured("engine/available", "bytes", [engine.memory.available_bytes], "neither")
        config = self.engine.model.experts[0].config
        yield Note(name="model", value={"layers": config.num_layers, "dim": config.dim, "text": self._text})

    @property
    def _text(self) -> dict[str, int]:
        return TINY_TEXT if self.context.dry else TEXT

    def first(self, size: Size) -> Iterator[Line]:
        """Measure the first request of a cold engine, which also waits for kernels to be compiled."""
        began = time.perf_counter()
        self._finish(clip_request(size, FEW, 0))
        yield measured("engine/first request", "s", [time.perf_counter() - began])

    def one(self, size: Size) -> Iterator[Line]:
        """Measure ticks, each waited for; then the same request as it is served, its peak beside the prediction."""
        request = clip_request(size, STEPS, 1)
        ticks = self._ticks([request], waits=True)
        steps = [seconds for seconds, events in ticks if any(isinstance(e, Progress) for e in events)][1:]
        last = max(at for at, (_, events) in enumerate(ticks) if any(isinstance(e, Progress) for e in events))
        decode = [seconds for seconds, _ in ticks[last + 1 :]]
        yield measured(f"engine/{words_of(size)}/step", "s", steps)
        yield measured(f"engine/{words_of(size)}/decode", "s", [sum(decode)])
        self.step_s, self.decode_s = sorted(steps)[len(steps) // 2], sum(decode)
        yield from self._peak(f"peaks/1.3B {words_of(size)}, one job/request", [request])

    def large(self, size: Size) -> Iterator[Line]:
        """Measure a request that may be too large; if it is refused, note the words that say what is missing."""
        try:
            yield from self._peak(f"peaks/1.3B {words_of(size)}, one job/request", [clip_request(size, FEW, 2)])
        except RequestTooLarge as refusal:
            yield Note(name=f"refused {words_of(size)}", value=str(refusal))

    def several(self, size: Size) -> Iterator[Line]:
        """Measure jobs that arrive at once: the seconds of them together, and their peak."""
        requests = [clip_request(size, FEW + n, 10 + n) for n in range(JOBS)]
        began = time.perf_counter()
        yield from self._peak(f"peaks/1.3B {words_of(size)}, {JOBS} jobs/request", requests)
        yield measured(f"engine/{words_of(size)}/{JOBS} jobs", "s", [time.perf_counter() - began])

    def beside(self, size: Size) -> Iterator[Line]:
        """Decode one job while another steps. gained: the share of the shorter of the two that ran beside the other."""
        engine = self.engine
        soon, later = (engine.submit(clip_request(size, steps, 20)) for steps in (FEW, MANY))
        began, steps, walls, shares = None, 0, list[float](), list[float]()
        while engine.has_work():
            for event in engine.step():
                _check(event)
                if isinstance(event, Progress) and event.ticket == soon and event.step == event.num_steps:
                    self._wait()  # all that was queued until here is no part of it
                    began, steps = time.perf_counter(), 0
                elif isinstance(event, Progress) and event.ticket == later:
                    steps += 1
                elif isinstance(event, Finished) and event.ticket == soon and began is not None:
                    walls.append(time.perf_counter() - began)
                    alone = self.decode_s, steps * self.step_s
                    shares.append((sum(alone) - walls[-1]) / max(1e-9, min(alone)))
        yield measured(f"engine/{words_of(size)}/decode beside {steps} steps", "s", walls)
        if self.step_s > 0:
            yield measured(f"engine/{words_of(size)}/gained", "of the shorter", shares, "higher")

    def streams(self, size: Size) -> Iterator[Line]:
        """Trace the same: the time that kernels of two streams ran at once, and its share of the less busy one's."""
        requests = [clip_request(size, steps, 30) for steps in (1, 4)]
        if self.context.device.type != "cuda":
            self._ticks(requests, waits=False)
            yield Note(name="streams", value="there are none on a CPU")
            return
        found = overlap_of(lambda: self._ticks(requests, waits=False))
        yield Note(name="streams", value=found.busy_s)
        yield measured(f"engine/{words_of(size)}/streams at once", "s", [found.both_s], "higher")
        if found.less_busy_s > 0:
            share = found.both_s / found.less_busy_s
            yield measured(f"engine/{words_of(size)}/streams at once/share", "of the less busy", [share], "higher")

    # --- what they use ------------------------------------------------------------------------------------------------

    def _peak(self, name: str, requests: list[VideoRequest]) -> Iterator[Line]:
        """Measure the most bytes above the idle engine's, beside those that admission predicts."""
        engine = self.engine
        needs = [engine.prepare(request).needs for request in requests]
        fits = [engine.memory.fit(own) for own in needs]
        predicted = sum(own.held_bytes for own in needs) + engine.memory.work_bytes(fits)
        ways = [{"guidance": fit.way.guidance, "chunk": fit.way.chunk, "moved": fit.way.moved} for fit in fits]
        stages = [{"work": dict(fit.work_bytes), "brought": dict(fit.brought_bytes)} for fit in fits]
        yield Note(name=f"ways, {name}", value=[way | stage for way, stage in zip(ways, stages, strict=True)])
        held = held_bytes(engine.device)
        run: Callable[[], object] = partial(self._ticks, requests, False)
        peak = peak_while(run, engine.device)
        if held is not None and peak is not None:
            yield measured(name, "bytes", [max(0, peak - held)])
        yield measured(f"{name}/predicted", "bytes", [predicted], "neither")
        if engine.device.type == "cuda":
            yield Note(name=f"reserved, {name}", value=torch.cuda.max_memory_reserved(engine.device))

    def _ticks(self, requests: list[VideoRequest], waits: bool) -> list[tuple[float, list[Event]]]:
        """Return the seconds and events of each tick until all requests end; waits: for the device after each tick."""
        engine = self.engine
        for request in requests:
            engine.submit(request)
        found = []
        while engine.has_work():
            began = time.perf_counter()
            events = engine.step()
            if waits:
                self._wait()
            found.append((time.perf_counter() - began, events))
            for event in events:
                _check(event)
        return found

    def _finish(self, request: VideoRequest) -> None:
        self._ticks([request], waits=False)

    def _wait(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)


def _check(event: Event) -> None:
    if isinstance(event, Failed):
        raise event.error


if __name__ == "__main__":
    sys.exit(main("engine"))
