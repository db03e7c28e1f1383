"""Which clips of a model fit on a device, with which parts there all the time, which moved, and at which price.

A request goes through four stages: text (prompts to rows), encode (given frames to latents), step and decode. Each
needs some of the model's parts, its own activations, and what the request holds all the while. A resident part stays on
the device; a moved one has a pinned copy in the host's memory and is on the device while a stage needs it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from ..checkpoints.registry import EXPERTS
from ..core.request import MIN_SIDE, ModelLimits
from ..vae.tiling import Tiling
from .peaks import Peaks

Guidance = Literal["together", "apart"]
STAGES = ("text", "encode", "step", "decode")

# Seconds by arithmetic, for the order of choices alone: a copy from pinned memory at 50 GB/s (PCIe 5 x16), decoding at
# 604 TFLOP a clip of 1280x720x81 and 300 TFLOP/s, and what is lost where guidance branches do not share a pack.
COPIED_BYTES_A_SECOND = 50e9
DECODE_S_A_PIXEL = 604 / 300 / (1280 * 720 * 81)
APART_S = 0.02
CHUNK_1_PRICE, TILES_PRICE = 0.1, 0.7  # of decoding; the latter is of pixels that are coded twice


@dataclass(frozen=True)
class Size:
    """A clip, in pixels and frames."""

    width: int
    height: int
    num_frames: int

    @property
    def volume(self) -> int:
        return self.width * self.height * self.num_frames

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True)
class Needs:
    """What a request takes on the device beside the model's parts."""

    size: Size
    held_bytes: int  # between two steps
    num_tokens: int  # of one branch
    num_branches: int
    encodes: bool  # whether frames are given

    @property
    def stages(self) -> list[str]:
        """The ones that it goes through."""
        return [stage for stage in STAGES if stage != "encode" or self.encodes]


@dataclass(frozen=True)
class Way:
    """How a request is run."""

    moved: tuple[str, ...]
    guidance: Guidance
    chunk: int  # latent frames that are coded at a time
    tiling: Tiling
    factor: int  # pixels a side of one latent

    def tile(self, size: Size) -> int | None:
        """Side in pixels of the tiles that frames of this size are coded in; None where they are whole."""
        whole = size.height // self.factor, size.width // self.factor
        return None if self.tiling.size(*whole, self.factor) == whole else self.tiling.tile


@dataclass(frozen=True)
class Fit:
    """Whether a request fits, and how.

    Bytes on the device: always_bytes of the parts that stay, the request, caches and workspaces; then, by stage, of the
    parts that are brought for it and of its activations.
    """

    needs: Needs
    way: Way
    budget_bytes: int
    host_bytes: int  # pinned
    always_bytes: int
    brought_bytes: Mapping[str, int]
    work_bytes: Mapping[str, int]
    kept_bytes: int  # between two chunks, by what encodes or decodes: other requests' work finds them there
    blocked_by: str | None  # the stage that needs most of what is too little, or "host"

    @property
    def fits(self) -> bool:
        return self.blocked_by is None

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Of all that is on the device meanwhile, by stage."""
        return {stage: self.always_bytes + self.brought_bytes[stage] + self.work_bytes[stage] for stage in STAGES}

    @property
    def most_bytes(self) -> int:
        """Of the most expensive stage, what it takes beside what is always there."""
        return max(self.brought_bytes[stage] + self.work_bytes[stage] for stage in self.needs.stages)

    @property
    def overlaps(self) -> bool:
        """Whether a chunk may be decoded beside a step."""
        brought = sum(self.brought_bytes[stage] for stage in ("step", "decode"))
        work = sum(self.work_bytes[stage] for stage in ("step", "decode"))
        return self.always_bytes + brought + work <= self.budget_bytes


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """The rule, for one model on one device.

    parts: bytes on the device of text_encoder, image_encoder, transformer, transformer_2, encoder and decoder.
    fixed_bytes: of caches. coder_bytes: of a compiled coder's work, where that is more than eager's. host_bytes: what
    may be pinned; None: any. moved: the parts that do not stay, where that is settled; None leaves it to each clip.
    """

    peaks: Peaks
    parts: Mapping[str, int]
    budget_bytes: int
    factor: int  # pixels a side of one latent
    fixed_bytes: int = 0
    coder_bytes: int = 0
    host_bytes: int | None = None
    offload: str = "auto"
    moved: tuple[str, ...] | None = None
    chunks: Sequence[int] = (4, 1)
    tilings: Sequence[Tiling] = (Tiling(), Tiling(threshold=0))

    def best(self, needs: Needs) -> Fit:
        """The cheapest way that fits; where none does, one that the host lacks memory for, or the closest."""
        tried = []
        for way in sorted(self._ways, key=lambda way: self._price(needs, way)):
            fit = self.of(needs, way)
            if fit.fits:
                return fit
            tried.append(fit)
        return next((fit for fit in tried if fit.blocked_by == "host"), None) or _closest(tried)

    def closest(self, needs: Needs) -> Fit:
        """The way that takes least of the device, of those that the host has the memory for."""
        fits = [self.of(needs, way) for way in self._ways]
        return _closest([fit for fit in fits if self.host_bytes is None or fit.host_bytes <= self.host_bytes] or fits)

    def of(self, needs: Needs, way: Way) -> Fit:
        """One way of running a request."""
        fixed = needs.held_bytes + self.fixed_bytes + self.peaks.workspace
        always = self.resident_bytes(way.moved) + fixed
        fit = Fit(
            needs,
            way,
            self.budget_bytes,
            host_bytes=sum(self.parts[part] for part in way.moved),
            always_bytes=always,
            brought_bytes=self._brought_bytes(needs, way),
            work_bytes=self._work_bytes(needs, way),
            kept_bytes=self._kept_bytes(needs, way),
            blocked_by=None,
        )
        peaks = fit.peak_bytes
        worst = max(needs.stages, key=lambda stage: peaks[stage])
        if peaks[worst] > self.budget_bytes:
            return replace(fit, blocked_by=worst)
        if self.host_bytes is not None and fit.host_bytes > self.host_bytes:
            return replace(fit, blocked_by="host")
        return fit

    def resident_bytes(self, moved: Sequence[str]) -> int:
        """Of the parts that stay."""
        return sum(num_bytes for part, num_bytes in self.parts.items() if part not in moved)

    def brought_bytes(self, moved: Sequence[str], *parts: str) -> int:
        """Of the largest of these parts, if they move: a stage needs one at a time."""
        return max((self.parts[part] for part in parts if part in moved), default=0)

    def _brought_bytes(self, needs: Needs, way: Way) -> dict[str, int]:
        images = ("image_encoder",) if self.peaks.image else ()
        return {
            "text": self.brought_bytes(way.moved, "text_encoder"),
            "encode": self.brought_bytes(way.moved, "encoder", *images),
            "step": self.brought_bytes(way.moved, *EXPERTS),
            "decode": self.brought_bytes(way.moved, "decoder"),
        }

    def _work_bytes(self, needs: Needs, way: Way) -> dict[str, int]:
        size, peaks = needs.size, self.peaks
        encode, decode = (
            max(self.coder_bytes, half.at(size.height, size.width, way.chunk, way.tiling, self.factor))
            for half in (peaks.encode, peaks.decode)
        )
        curve = peaks.apart if way.guidance == "apart" else peaks.step
        step = curve.at(needs.num_tokens * needs.num_branches)
        return {"text": peaks.text, "encode": max(peaks.image, encode), "step": step, "decode": decode}

    def _kept_bytes(self, needs: Needs, way: Way) -> int:
        size, halves = needs.size, (self.peaks.decode, *([self.peaks.encode] if needs.encodes else []))
        return max(half.kept(size.height, size.width, way.tiling, self.factor) for half in halves)

    @cached_property
    def _ways(self) -> list[Way]:
        guidance: tuple[Guidance, ...] = ("together", "apart")
        parts = product(self._moves(), guidance, self.chunks, self.tilings)
        return [Way(*part, self.factor) for part in parts]

    def _moves(self) -> Iterator[tuple[str, ...]]:
        """Sets of parts to be moved, each with the next one that is needed least."""
        if self.moved is not None:
            yield self.moved
            return
        experts = tuple(part for part in EXPERTS if part in self.parts)
        several = (experts,) if len(experts) > 1 else ()
        single = (experts,) if len(experts) == 1 else ()
        order = (("text_encoder",), ("image_encoder",), ("encoder",), *several, ("decoder",), *single)
        moved: tuple[str, ...] = ()
        if self.offload != "all":
            yield moved
        for group in order:
            moved += tuple(part for part in group if part in self.parts)
            if self.offload == "auto" and group[0] in self.parts:
                yield moved
        if self.offload == "all":
            yield moved

    def _price(self, needs: Needs, way: Way) -> float:
        """Seconds that this way costs a request."""
        copied = sum(self.parts[part] for part in way.moved) / COPIED_BYTES_A_SECOND
        decoding = DECODE_S_A_PIXEL * needs.size.volume
        slower = CHUNK_1_PRICE * (way.chunk == 1) + TILES_PRICE * (way.tile(needs.size) is not None)
        return copied + APART_S * (way.guidance == "apart") + slower * decoding


def _closest(fits: Sequence[Fit]) -> Fit:
    return min(fits, key=lambda fit: fit.always_bytes + fit.most_bytes)


def longest_of(fits: Callable[[Size], bool], size: Size, limits: ModelLimits) -> Size | None:
    """The longest clip of these pixels that fits, if any does."""
    step = limits.temporal_multiple
    lengths = range(1, limits.max_num_frames + 1, step)
    sizes = [Size(size.width, size.height, length) for length in lengths]
    at = bisect_left(sizes, True, key=lambda shorter: not fits(shorter))
    return sizes[at - 1] if at else None


def nearest_of(fits: Callable[[Size], bool], size: Size, limits: ModelLimits) -> list[Size]:
    """The next shorter clip of these pixels and the next smaller one of this length, as far as they fit."""
    shorter = longest_of(fits, size, limits)
    multiple = limits.size_multiple
    least = math.ceil(MIN_SIDE / multiple) * multiple

    def side(whole: int, k: int) -> int:
        return max(least, whole * k // 32 // multiple * multiple)

    scaled = {Size(side(size.width, k), side(size.height, k), size.num_frames) for k in range(1, 32)}
    smaller = [other for other in sorted(scaled, key=lambda other: -other.volume) if other.volume < size.volume]
    found = next((other for other in smaller if fits(other)), None)
    return [other for other in (shorter, found) if other is not None]
