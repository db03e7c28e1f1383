"""Ways of making a clip, to be compared with the exact one: caches, quantised weights, fewer steps, company."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.cache.spec import PRESETS, check_cache
from ...runtime.core.config import QUANTIZE
from ...runtime.core.device import DTYPES
from ...runtime.core.events import Failed, Finished
from ...runtime.core.request import Video, VideoRequest
from ...runtime.engine.engine import Engine
from ..metrics import Clip, Metric, compare_clips

POLICIES = (
    *(f"easy:{threshold}" for threshold in (0.02, 0.05, 0.1, 0.2)),
    *(f"first_block:threshold={t},order={order}" for order in (0, 1) for t in (0.04, 0.08, 0.16)),
    *(f"teacache:{threshold}" for threshold in (0.05, 0.1, 0.2)),
    *(f"magcache:{threshold}" for threshold in (0.03, 0.06, 0.12)),
    *(f"taylorseer:interval={interval},order={order}" for order in (1, 2) for interval in (2, 3, 4)),
    *(f"budget:share={share},order={order}" for order in (1, 2) for share in (0.6, 0.43, 0.3)),
)
Asked = Mapping[str, Any]  # of a VideoRequest: what is the same for all ways


@dataclass(frozen=True, order=True)
class Way:
    """kind: cache, quantize, dtype, steps or batch. value: as a request or an engine takes it."""

    kind: str
    value: str

    @property
    def name(self) -> str:
        return f"{self.kind}={self.value}"

    @property
    def loads(self) -> tuple[str | None, str | None]:
        """(quantize, dtype) of the engine that it needs; None: as the exact one."""
        return (self.value if self.kind == "quantize" else None, self.value if self.kind == "dtype" else None)


EXACT = Way("exact", "")
MIXED = Way("batch", "mixed")  # the floor: the exact request beside others of other shapes, steps and caches
SETS = {
    "presets": tuple(Way("cache", preset) for preset in PRESETS),
    "policies": tuple(Way("cache", policy) for policy in POLICIES),
    "quantized": tuple(Way("quantize", kind) for kind in QUANTIZE if kind != "none"),
}


def parse_way(text: str) -> Way:
    """KIND=VALUE; ValueError says what may be asked for."""
    kind, _, value = text.partition("=")
    if kind == "cache":
        check_cache(value)
        return Way(kind, value)
    allowed = {"quantize": QUANTIZE[1:], "dtype": tuple(DTYPES), "batch": ("mixed",)}
    if kind == "steps" and value.isdecimal() and value.isascii() and int(value):
        return Way(kind, str(int(value)))
    if kind not in allowed or value not in allowed[kind]:
        kinds = ", ".join(f"{name}={'|'.join(values)}" for name, values in allowed.items())
        raise ValueError(f"a way must be cache=POLICY, steps=N, {kinds}, got {text[:80]!r}")
    return Way(kind, value)


@dataclass(frozen=True)
class Made:
    """A clip and the work that it took; seconds, tokens: None where others' work is among it."""

    frames: Clip
    seconds: float | None  # of denoising; on a GPU of the whole request, whose stages end before the device has
    evaluations: int
    tokens: int | None  # through the denoiser, all branches
    state_bytes: int
    close_calls: int


class Makers:
    """Makes a request's clip in each way; engines are loaded once."""

    def __init__(self, model: str, device: str | None, ways: Sequence[Way]) -> None:
        self.engines = {
            loads: Engine.from_pretrained(model, device=device, quantize=loads[0] or "none", dtype=loads[1])
            for loads in sorted({way.loads for way in (EXACT, *ways)}, key=str)
        }

    def engine(self, way: Way) -> Engine:
        return self.engines[way.loads]

    @property
    def exact(self) -> Engine:
        return self.engines[EXACT.loads]

    def warm_up(self, asked: Asked) -> None:
        for engine in self.engines.values():
            engine.generate(VideoRequest(**{**asked, "num_inference_steps": 2}))

    def make(self, way: Way, asked: Asked) -> Made:
        fields = dict(asked)
        if way.kind == "cache":
            fields["cache"] = way.value
        elif way.kind == "steps":
            fields["num_inference_steps"] = int(way.value)
        engine, request = self.engine(way), VideoRequest(**fields)
        if way == MIXED:
            return _made(_beside(engine, request), None, None)
        before, began = engine.pack_stats[1], time.perf_counter()
        video = engine.generate(request)
        whole_s, denoise_s = time.perf_counter() - began, video.metadata.timings_s["denoise"]
        return _made(video, whole_s if engine.device.type == "cuda" else denoise_s, engine.pack_stats[1] - before)


@dataclass
class Row:
    """One way's figures, a sample a prompt."""

    way: Way
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # those beside compare_clips'
    made: list[Made] = field(default_factory=list)
    quality: dict[str, list[float]] = field(default_factory=dict)
    speed_ups: list[float] = field(default_factory=list)  # the exact clip's seconds over this one's

    def add(self, made: Made, exact: Clip, exact_s: float | None) -> None:
        """exact_s: of an exact clip of the same prompt, made just before."""
        found = compare_clips(made.frames, exact)
        found |= {name: metric(made.frames, exact) for name, metric in self.metrics.items()}
        self.made.append(made)
        for name, value in found.items():
            self.quality.setdefault(name, []).append(value)
        if made.seconds is not None and exact_s is not None:
            self.speed_ups.append(exact_s / made.seconds)

    @property
    def evaluations(self) -> float:
        """The mean over prompts."""
        return sum(made.evaluations for made in self.made) / len(self.made)


def neighbours(engine: Engine, request: VideoRequest) -> list[VideoRequest]:
    """Two short clips, one of them cached and of fewer steps."""
    width, height, _ = request.size
    frames, steps = engine.limits.temporal_multiple + 1, request.num_inference_steps or 2
    size: dict[str, Any] = dict(width=width, height=height, num_frames=frames)
    return [
        VideoRequest(prompt="a blue star moving up", seed=request.seed + 1, num_inference_steps=steps, **size),
        VideoRequest(
            prompt="a green square", seed=request.seed + 2, num_inference_steps=max(1, steps - 5), cache="easy", **size
        ),
    ]


def _beside(engine: Engine, request: VideoRequest) -> Video:
    """The clip of a request that shares its steps with its neighbours."""
    resolved = request.resolved(engine.defaults, engine.limits)
    others = [engine.submit(other) for other in neighbours(engine, resolved)]
    ticket, video = engine.submit(request), None
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.ticket == ticket:
                video = event.video
                for other in others:
                    engine.abort(other)
    assert video is not None
    return video


def _made(video: Video, seconds: float | None, tokens: int | None) -> Made:
    report = video.metadata.cache
    assert report is not None
    return Made(
        frames=video.frames,
        seconds=seconds,
        evaluations=report.num_evaluations,
        tokens=tokens,
        state_bytes=report.peak_state_bytes,
        close_calls=len(report.close_calls),
    )
