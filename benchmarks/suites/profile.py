"""`bench denoise --profile DIR`: where a request's time goes, by our own nouns, beside the trace it was read from.

DIR gets trace.json (Chrome, Perfetto), nouns.md (the table), operators.txt (torch's own), and on a GPU memory.pickle
(for PyTorch's page of memory snapshots). Blocks are profiled in eager mode: compiled ones have no nouns in them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from ...runtime.core.config import load_settings
from ...runtime.core.events import Failed
from ...runtime.core.request import VideoRequest
from ...runtime.engine.engine import Engine
from ...runtime.models.text_cache import TextCache
from ..harness import without_gc
from ..kernels.case import Suite
from ..kernels.suite import clock_of, measure_limits
from ..sheet import Labels, Sheet
from .clips import Size, clip_request, words_of
from .nouns import PREFIX, Ranges

STEP = "step"
QUICK_STEPS = 10
FIRST_STEP = "first step"
OTHER = "scheduling and the rest"


@dataclass
class Part:
    """One noun's time: seconds and calls of each step in which it stands, in order."""

    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Profile:
    """of_steps: noun -> a value a step, the rest among them; beside: noun -> seconds of the whole request.

    steps: seconds of each step, by the host's clock; on a GPU parts are times of its kernels, and busy is their sum.
    """

    steps: list[float]
    of_steps: dict[str, Part]
    beside: dict[str, float]


def profile(options: argparse.Namespace) -> int:
    folder: Path = options.profile
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--profile must be a folder, got the file {str(folder)!r}")
    if len(options.size or ()) > 1:
        raise ValueError(f"--profile takes one --size, got {len(options.size)}")
    if load_settings().compile:
        raise ValueError("--profile needs blocks in eager mode, got SKYLAPSE_COMPILE=1")
    options.out = options.out or folder / "denoise.json"
    engine = Engine.from_pretrained(options.model)
    d = engine.defaults
    size: Size = options.size[0] if options.size else (d.width, d.height, d.num_frames)
    num_steps = options.steps or (QUICK_STEPS if options.quick else d.num_inference_steps)
    width, height, num_frames = size
    request = clip_request(size, num_steps, options.seed)
    sheet = Sheet("denoise", options, {"profile": True, "steps": num_steps, "dtype": str(engine.dtype)})
    with sheet.running(cases=2):
        sheet.check_time("the same request without the profiler")
        labels: Labels = {"width": width, "height": height, "num_frames": num_frames}
        for _ in range(2):  # the first one warms up
            plain = [seconds for _, seconds in _ticks(engine, request)]
        sheet.measured(f"denoise/profile/{words_of(size)}/unprofiled", "s", plain, labels=labels)
        sheet.check_time("the profile")
        folder.mkdir(parents=True, exist_ok=True)
        ranges = Ranges(nvtx=engine.device.type == "cuda")
        found = record(engine, request, ranges, folder)
        shares = roofline_shares(engine, ranges, found, options.quick)
        _write_down(sheet, f"denoise/profile/{words_of(size)}", found, shares, labels)
        text = table(found, shares, statistics.median(plain))
        (folder / "nouns.md").write_text(text + "\n")
        print(f"\n{text}\n\nin {folder}: trace.json, nouns.md, operators.txt")
    return sheet.status


def record(engine: Engine, request: VideoRequest, ranges: Ranges, folder: Path) -> Profile:
    """One request through the engine under torch's profiler; the files besides."""
    on_gpu = engine.device.type == "cuda"
    engine.text_cache = TextCache(engine.text_cache.budget_bytes)  # or nothing would be seen of the text encoder
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with (
        _memory_history(folder / "memory.pickle", on_gpu),
        ranges.watching(),
        without_gc(),  # the profiler's own objects would make it run, and a step's part would seem to take 5 ms more
        torch.profiler.profile(activities=activities, acc_events=True) as profiler,
    ):
        for _ in _ticks(engine, request, ranges):
            pass
        if on_gpu:
            torch.cuda.synchronize(engine.device)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    (folder / "operators.txt").write_text(profiler.key_averages().table(sort_by=order, row_limit=60) + "\n")
    return read(profiler.events() or [], on_gpu)


def read(events: Iterable[Any], on_gpu: bool) -> Profile:
    """The ranges of ours among a profiler's events, each less those inside it.

    A kernel belongs to the range in which it was launched.
    """
    own: dict[Any, float] = {}
    events = [event for event in events if event.device_type == DeviceType.CPU]
    ours = [event for event in events if event.name.startswith(PREFIX)]
    for event in ours:
        own[event] = 0.0 if on_gpu else own.get(event, 0.0) + event.cpu_time_total / 1e6
        if not on_gpu and (outer := _range_of(event.cpu_parent)) is not None:
            own[outer] = own.get(outer, 0.0) - event.cpu_time_total / 1e6
    if on_gpu:
        for event in events:
            launched = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(PREFIX)) / 1e6
            inside = event if event.name.startswith(PREFIX) else _range_of(event.cpu_parent)
            if launched and inside is not None:
                own[inside] += launched
    steps = sorted((e for e in ours if e.name == PREFIX + STEP), key=lambda e: e.time_range.start)
    number = {step: index for index, step in enumerate(steps)}
    parts: dict[str, Part] = defaultdict(lambda: Part([0.0] * len(steps), [0] * len(steps)))
    beside: dict[str, float] = defaultdict(float)
    for event in ours:
        name = OTHER if event.name == PREFIX + STEP else event.name.removeprefix(PREFIX)
        index = next((number[e] for e in _outwards(event) if e in number), None)
        if index is None:
            beside[name] += own[event]
        else:
            parts[name].seconds[index] += own[event]
            parts[name].calls[index] += 1
    for name in [name for name in beside if name in parts]:  # the tick that ends encoding takes the first step too
        beside[FIRST_STEP] += beside.pop(name)
    return Profile([step.cpu_time_total / 1e6 for step in steps], dict(parts), dict(beside))


def roofline_shares(engine: Engine, ranges: Ranges, found: Profile, quick: bool) -> dict[str, float]:
    """The least time that this device's limits, measured here, allow a noun, over the time that it took."""
    suite = Suite(engine.device, engine.dtype, quick)
    limits = measure_limits(suite, clock_of(suite))
    rates = limits["bytes_per_s"].median, limits["operations_per_s"].median
    shares = {}
    for name, costs in ranges.costs.items():
        least_s = sum(count * cost.seconds(*rates) for cost, count in costs.items())
        if taken_s := sum(found.of_steps[name].seconds if name in found.of_steps else ()):
            shares[name] = least_s / taken_s
    return shares


def table(found: Profile, shares: dict[str, float], unprofiled_s: float) -> str:
    """Markdown, the longest part first; medians over steps."""
    whole = [sum(values) for values in zip(*(part.seconds for part in found.of_steps.values()), strict=True)]
    lines = ["| part of a step | calls | ms | share | of the roofline |", "|---|---|---|---|---|"]
    for name, part in sorted(found.of_steps.items(), key=lambda item: -sum(item[1].seconds)):
        share = sum(part.seconds) / sum(whole)
        roof = f"{100 * shares[name]:.0f} %" if name in shares else ""
        calls = "" if name == OTHER else f"{statistics.median(part.calls):g}"
        lines.append(
            f"| {name} | {calls} | {1e3 * statistics.median(part.seconds):.3f} | {100 * share:.1f} % | {roof} |"
        )
    step_s = statistics.median(found.steps)
    lines += ["", f"{len(found.steps)} steps; a step takes {1e3 * step_s:.2f} ms under the profiler, "]
    lines[-1] += f"{1e3 * unprofiled_s:.2f} ms without it."
    beside = (f"{name} {1e3 * seconds:.2f} ms" for name, seconds in sorted(found.beside.items()))
    lines += ["", f"Beside them: {', '.join(beside)}."]
    return "\n".join(lines)


def _write_down(sheet: Sheet, group: str, found: Profile, shares: dict[str, float], labels: Labels) -> None:
    sheet.measured(f"{group}/profiled", "s", found.steps, labels=labels)
    for name, part in found.of_steps.items():
        slug = f"{group}/{name.replace(', ', '-').replace(' ', '-')}"
        sheet.measured(slug, "s", part.seconds, labels=labels | {"calls": max(part.calls)}, shown=False)
        if name in shares:
            sheet.measured(f"{slug}/roofline", "1", [shares[name]], "higher", labels, shown=False)
    for name, seconds in found.beside.items():
        sheet.measured(f"{group}/beside/{name.replace(' ', '-')}", "s", [seconds], labels=labels, shown=False)


def _ticks(engine: Engine, request: VideoRequest, ranges: Ranges | None = None) -> Iterator[tuple[str, float]]:
    """(step, seconds) of the ticks that are a denoising step and nothing else."""
    ticket = engine.submit(request)
    while engine.has_work():
        stage = next((t.stage for t in engine._batch.active.values()), "encode")
        name = STEP if stage == "denoise" else f"ticks that {stage}"
        began = time.perf_counter()
        if ranges is None:
            events = engine.step()
        else:
            ranges.counts = stage == "denoise"
            with ranges.named(name):
                events = engine.step()
        if engine.device.type == "cuda" and ranges is None:
            torch.cuda.synchronize(engine.device)
        seconds = time.perf_counter() - began
        for event in events:
            if isinstance(event, Failed) and event.ticket == ticket:
                raise event.error
        if stage == "denoise":
            yield name, seconds


def _range_of(event: Any) -> Any:
    """The innermost of our ranges from here outwards, or None."""
    return next((e for e in _outwards(event) if e.name.startswith(PREFIX)), None)


def _outwards(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


@contextmanager
def _memory_history(path: Path, on_gpu: bool) -> Iterator[None]:
    """Every allocation of a GPU's memory meanwhile, as PyTorch's page draws it."""
    if not on_gpu:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
