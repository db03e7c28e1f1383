"""`bench memory --real-width`: how a process grows with the area at published widths, beside what the shape model says.

Weights are random and clips short, but the channels are those of the checkpoints, so that each tensor is as large a
part of the peak as at 720p. Slopes are compared, bytes a pixel or a token between two areas. What a process takes
whatever the area (libraries, their code and buffers) is no part of a slope; `rest` is what is left of it at each area.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...kernels.fake_cpu import fake_cpu
from ...kernels.live_bytes import LiveBytes
from ...runtime.checkpoints.configs import parse_config
from ...runtime.checkpoints.published import published
from ...runtime.checkpoints.weights import allocate
from ...runtime.families.wan.denoiser import WanConfig, WanDenoiser
from ...runtime.memory.peaks import chunk_shapes, code, step_of
from ...runtime.vae.coders import WanDecoder, WanEncoder
from ...runtime.vae.wan import WanVAE, WanVAEConfig
from ..harness import reason_of
from ..peak import held_bytes, peak_while
from ..sheet import Labels, Sheet
from .apart import Died, run_apart

SMALL, LARGE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
CODINGS = ("encode", "decode")
CPU = torch.device("cpu")
Points = list[tuple[int, int]]  # (pixels of a frame or tokens of a pack, bytes)
CONVOLUTIONS = (torch.ops.aten.mkldnn_convolution.default, torch.ops.aten.convolution.default)
Part = WanDenoiser | WanEncoder | WanDecoder
# glibc's malloc raises its threshold for blocks of their own as such blocks are freed, up to 32 MiB; what lies below it
# stays in the process, with holes. A fixed threshold makes what is freed leave at once: the peak is of what lives.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """One part of a checkpoint, at two areas."""

    name: str
    model: str
    part: str  # encode, decode, or a step with its guided pair together or apart
    sides: tuple[int, int]  # latents a side, or tokens of one branch
    chunk: int = 1  # latent frames at a time

    @property
    def unit(self) -> str:
        return "bytes/pixel" if self.part in CODINGS else "bytes/token"

    @property
    def asked(self) -> dict[str, Any]:
        """Arguments of `told` and `resident`."""
        return {"model": self.model, "part": self.part, "sides": self.sides, "chunk": self.chunk}


CASES = (
    Case("wan2.1/decode", SMALL, "decode", (8, 12)),
    Case("wan2.1/encode", SMALL, "encode", (8, 12)),
    Case("1.3b/step", SMALL, "together", (512, 1536)),
    Case("1.3b/step-apart", SMALL, "apart", (512, 1536)),
    Case("wan2.2/decode", LARGE, "decode", (8, 12)),
)
QUICK = ("wan2.1/encode", "1.3b/step-apart")


def real_width(sheet: Sheet, rounds: int) -> None:
    """Each case in as many fresh processes as there are rounds, and in one with malloc as it is by itself."""
    names = sheet.options.case or (QUICK if sheet.options.quick else [case.name for case in CASES])
    cases = [case for case in CASES if case.name in names]
    with sheet.running(cases=len(cases)):
        for case in cases:
            name = f"memory/{case.name}"
            sheet.check_time(name)
            try:
                _case(sheet, case, name, rounds)
            except Died as error:
                sheet.failed(name, reason_of(error))


def _case(sheet: Sheet, case: Case, name: str, rounds: int) -> None:
    asked = {**case.asked, "seed": sheet.options.seed}
    by_way: dict[str, Any] = run_apart(told, case.asked)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # beside each other: nothing here is a time
        runs = [pool.submit(run_apart, resident, asked, changed) for changed in [GIVES_BACK] * rounds + [{}]]
        *found, kept = [run.result() for run in runs]
    if kept is None or None in found:
        sheet.missing(name, "this system does not count the memory of a process")
        return
    what = case.unit.removeprefix("bytes/") + "s"
    ways = {"resident": found, "malloc-default": [kept], **{way: [points] for way, points in by_way.items()}}
    for way, lines in ways.items():
        labels: Labels = {"model": case.model, "chunk": case.chunk}
        sheet.measured(f"{name}/{way}", case.unit, [slope_of(line) for line in lines], "neither", labels)
        for at, (count, _) in enumerate(lines[0]):
            labels = {"model": case.model, "chunk": case.chunk, what: count}
            peaks = [line[at][1] for line in lines]
            sheet.measured(f"{name}/{way}/{count}", "bytes", peaks, "neither", labels, shown=False)
            if way == "resident":
                rest = [peak - by_way["told"][at][1] for peak in peaks]
                sheet.measured(f"{name}/rest/{count}", "bytes", rest, "neither", labels)
    for way, lines in (("resident", found), ("malloc-default", [kept])):
        for model in by_way:
            over = [slope_of(line) / slope_of(by_way[model]) for line in lines]
            sheet.compared(f"{name}/{way}/of-{model}", way, model, over)


def slope_of(points: Points) -> float:
    """Bytes a pixel or a token, between two areas."""
    (x0, y0), (x1, y1) = points
    return (y1 - y0) / (x1 - x0)


# --- in a process of its own ------------------------------------------------------------------------------------------


def resident(model: str, part: str, sides: Sequence[int], chunk: int, seed: int) -> Points | None:
    """How far this process grows beyond the weights; None where nobody counts it.

    A first run, of a quarter of the smaller side, brings what is made once, which stays counted.
    """
    torch.set_num_threads(1)
    module = _module(model, part)
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.uniform_(-0.02, 0.02, generator=generator)
    held = held_bytes(CPU)
    points = []
    with torch.inference_mode():
        for count, run in _runs(module, part, (sides[0] // 4, *sides), chunk):
            peak = peak_while(run, CPU)
            if held is None or peak is None:
                return None
            points.append((count, peak - held))
    return points[1:]


def told(model: str, part: str, sides: Sequence[int], chunk: int) -> dict[str, Points]:
    """What the shape model says of the same runs, without memory or work.

    `tensors` as sizes are predicted on a device; `told`, told what the CPU's convolutions do beside tensors.
    """
    found: dict[str, Points] = {}
    for name, counter in (("tensors", LiveBytes), ("told", Reordered)):
        with fake_cpu(), torch.no_grad():
            runs = _runs(_module(model, part), part, (sides[0] // 4, *sides), chunk)
            with counter() as live:
                points = []
                for count, run in runs:
                    live.peak_bytes = live.live_bytes
                    run()
                    points.append((count, live.peak_bytes))
        found[name] = points[1:]
    return found


class Reordered(LiveBytes):
    """Beside tensors, what a convolution of oneDNN makes of its weight [C_out, C_in, ...] and frees at its end.

    That is a copy in channels-last order and one in blocks, in each call, however large the frame.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in CONVOLUTIONS:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + 2 * args[1].nbytes)
        return result


def _module(model: str, part: str) -> Part:
    """With the checkpoint's widths and two of the denoiser's blocks, whose weights are not filled."""
    found = published()[model]
    with torch.device("meta"):
        if part in CODINGS:
            vae = WanVAE(parse_config(WanVAEConfig, found["vae"], "vae"))
            module: Part = WanDecoder(vae) if part == "decode" else WanEncoder(vae)
        else:
            fields = {**found["transformers"]["transformer"], "num_layers": 2}
            module = WanDenoiser(parse_config(WanConfig, fields, "transformer"))
    allocate(module, device=CPU, dtype=torch.float32)
    module.requires_grad_(False).eval()
    return module


def _runs(module: Part, part: str, sides: Sequence[int], chunk: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Pixels or tokens, and what is to be run."""
    for side in sides:
        if isinstance(module, WanDenoiser):
            yield 2 * side, step_of(module, 2, side, "cpu", part == "apart")
        else:
            shapes = chunk_shapes(module.config, part == "decode", side, side, chunk)
            yield (side * module.config.scale_factor_spatial) ** 2, partial(code, module, shapes, torch.zeros(1))
