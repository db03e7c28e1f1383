"""`skylapse bench peers`: whole requests beside diffusers and its caches, pair by pair, in one process.

All have the same checkpoint, prompt, noise, steps, dtype and threads. Each round has a new prompt and seed, so nothing
is reused between rounds, and within a round everyone encodes its prompts anew; the order turns round with each. Ratios
are taken round by round: a noisy machine slows all of a round. Each is compared with its own uncached clip, and our
exact clips with diffusers'. Peak memory is of processes of their own. On a GPU our whole requests are timed to their
last frame, but our stages end when they have been launched.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.checkpoints.hub import resolve_folder
from ...runtime.checkpoints.registry import read_folder
from ...runtime.core.config import load_settings
from ...runtime.core.device import DTYPES, parse_device
from ...runtime.core.request import VideoRequest
from ..demo_model.scenes import caption, draw_scenes
from ..harness import Missing, ratios, reason_of
from ..metrics import UNITS, compare_clips
from ..peak import resident_bytes
from ..record import Better, SuiteReport, read
from ..sheet import Labels, Sheet, note, suite_parser
from ..suites.clips import size_of, words_of
from .contestants import ALL, EAGER, OURS, QUICK, Contestants, uncached
from .diffusers_wan import STAGES, Run, Timed
from .table import markdown

__all__ = ["markdown", "peers"]
GOALS = {"exact": 2.0, "high": 2.8, "balanced": 3.5}  # times as fast as diffusers eager, whole requests, on a CPU
QUALITY: dict[str, Better] = {
    "psnr_pooled": "higher",
    "psnr_worst": "higher",
    "ssim_mean": "higher",
    "flicker": "neither",
    "spectrum": "lower",
}
NO_FRAMES = np.empty((0, 0, 0, 3), np.uint8)
APART_S = 300.0  # for one clip in a process of its own, which may compile first


def peers(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.show:
        print(markdown(_read(options)))
        return 0
    options.device = parse_device(options.device)
    options.dtype = options.dtype or ("bf16" if options.device.type == "cuda" else "fp32")
    if options.only:  # we are the process apart
        return _alone(options)
    names = list(dict.fromkeys(options.contestants or (QUICK if options.quick else ALL)))
    rounds = options.rounds or (3 if options.quick else 9)
    warm, *asked = requests(options, rounds + 1)
    sheet = Sheet("peers", options, _settings(options, names, rounds, warm))
    weighs = not (options.no_memory or options.quick)
    with sheet.running(cases=len(names) + rounds + (len(names) if weighs else 0)):
        race = Race(sheet, Contestants(options.model, options.dtype, options.device), case_of(warm))
        race.line_up(names, warm)
        try:
            for request in asked:
                race.round(request)
        finally:  # what there is of a run that ends early
            race.record()
        if weighs:
            race.weigh(list(race.runs), options)
    print(markdown(sheet.report()))
    for name, goal in GOALS.items():
        if (ratio := race.whole_ratio(name)) is not None:
            note(
                f"{name}: {ratio:.2f}x as fast as diffusers, goal {goal:g}x: {'reached' if ratio >= goal else 'missed'}"
            )
    return sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("peers", "Whole requests beside diffusers and its caches, pair by pair.")
    option = parser.add_argument
    option("--contestants", nargs="+", choices=ALL, metavar="NAME", help=f"default: all, of {', '.join(ALL)}")
    option("--rounds", type=_count, metavar="N", help="default: 9, with --quick 3; fewer than 6 give no interval")
    option("--size", type=size_of, metavar="WxHxF", help="default: the model's own")
    option("--steps", type=_count, metavar="N", help="default: the model's own")
    option("--dtype", choices=tuple(DTYPES), help="default: fp32 on the CPU, bf16 on CUDA")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    option("--no-memory", action="store_true", help="leave out the processes of their own, as --quick does")
    option("--show", type=Path, metavar="FILE", help="print the table of an earlier run and end")
    option("--only", choices=ALL, help=argparse.SUPPRESS)
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, got {text!r}")
    return int(text)


def _read(options: argparse.Namespace) -> SuiteReport:
    report = read(options.show, SuiteReport)
    if report.benchmark != "peers":
        raise ValueError(f"{options.show.name} must be a result of peers, got one of {report.benchmark}")
    return report


def _settings(options: argparse.Namespace, names: list[str], rounds: int, request: VideoRequest) -> dict[str, Any]:
    return {
        "contestants": names,
        "rounds": rounds,
        "size": list(request.size),
        "steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "dtype": options.dtype,
        "device": options.device.type,
        "goals": GOALS,
        "of_contestants": {},  # what a peer's cache is set to
    }


def requests(options: argparse.Namespace, count: int) -> list[VideoRequest]:
    """Resolved, with different prompts and seeds; of the folder's own defaults, so that no model is loaded for it."""
    folder = read_folder(resolve_folder(options.model, load_settings().cache_dir))
    width, height, num_frames = options.size or (None, None, None)
    generator = torch.Generator().manual_seed(77 + options.seed)
    scenes = draw_scenes(count, generator)
    return [
        VideoRequest(
            prompt=caption(scenes.labels(i), generator, omit=0.0),
            width=width,
            height=height,
            num_frames=num_frames,
            num_inference_steps=options.steps,
            seed=100 + 1000 * options.seed + i,
        ).resolved(folder.defaults, folder.limits)
        for i in range(count)
    ]


def case_of(request: VideoRequest) -> str:
    """Of names: a clip of another size or length is another figure."""
    return f"{words_of(request.size)},{request.num_inference_steps}"


class Race:
    """Rounds of whole requests, and what they gave."""

    def __init__(self, sheet: Sheet, contestants: Contestants, case: str) -> None:
        self.sheet, self.contestants, self.group = sheet, contestants, f"peers/{case}"
        self.runs: dict[str, Run] = {}
        self.made: dict[str, list[Timed]] = {}  # without their frames
        self.quality: dict[str, list[dict[str, float]]] = {}
        self.apart: list[tuple[int, float]] = []  # of our exact and diffusers' frames: levels at most, share above 1
        self._rounds = 0

    def line_up(self, names: Sequence[str], warm: VideoRequest) -> None:
        """Load and warm up; who cannot take part is told with the reason."""
        for name in names:
            self.sheet.check_time(f"{name}, warming up")
            try:
                self.runs[name] = self.contestants.ready(name, warm)
            except Missing as reason:
                self.sheet.missing(f"{self.group}/{name}", str(reason))
            except Exception as error:
                self.sheet.failed(f"{self.group}/{name}", reason_of(error))
        self.made = {name: [] for name in self.runs}
        self.sheet.settings["of_contestants"] = self.contestants.settings

    def round(self, request: VideoRequest) -> None:
        """Everyone once. Who raises is out, with all its figures: a ratio needs both sides of every round."""
        self._rounds += 1
        self.sheet.check_time(f"round {self._rounds}")
        order = list(self.runs) if self._rounds % 2 else list(reversed(self.runs))
        made: dict[str, Timed] = {}
        gc.collect()
        gc.disable()  # or whoever happens to allocate most pays for everyone
        try:
            for name in order:
                try:
                    made[name] = self.runs[name](request)
                except Exception as error:  # a peer's own result
                    self.sheet.failed(f"{self.group}/{name}", reason_of(error))
                    for kept in (self.runs, self.made, self.quality):
                        kept.pop(name, None)
        finally:
            gc.enable()
        for name, timed in made.items():  # only now: a round that is interrupted counts for nobody
            self.made[name].append(replace(timed, frames=NO_FRAMES))
            reference = uncached(name)
            if reference in made:
                found = compare_clips(timed.frames, made[reference].frames)
                self.quality.setdefault(name, []).append({metric: found[metric] for metric in QUALITY})
        if "exact" in made and EAGER in made:
            difference = np.abs(made["exact"].frames.astype(int) - made[EAGER].frames)
            self.apart.append((int(difference.max()), float((difference > 1).mean())))

    def record(self) -> None:
        told = {name: self._figures(made) for name, made in self.made.items() if made}
        for name, figures in told.items():
            for stage, samples in figures.items():
                place, unit = _place(self.group, stage, name), "cpu_s" if stage == "cpu" else "s"
                self.sheet.measured(place, unit, samples, labels=self._labels(name), shown=stage == "whole")
        for name, figures in told.items():
            if name == EAGER or EAGER not in told:
                continue
            for stage, samples in figures.items():
                pairs = ratios(told[EAGER][stage], samples)
                self.sheet.compared(_place(self.group, stage, name), EAGER, name, pairs, shown=stage == "whole")
        for name, found in self.quality.items():
            for metric, better in QUALITY.items():
                samples = [one[metric] for one in found]
                labels: Labels = {"reference": uncached(name) or ""}
                unit = UNITS[metric]
                self.sheet.measured(f"{self.group}/{metric}/{name}", unit, samples, better, labels, shown=False)
        if self.apart:
            levels, shares = zip(*self.apart, strict=True)
            labels = {"reference": EAGER}
            self.sheet.measured(f"{self.group}/largest_difference/exact", "of 255", levels, labels=labels)
            self.sheet.measured(f"{self.group}/off_by_more_than_1/exact", "share", shares, labels=labels)

    def _figures(self, made: Sequence[Timed]) -> dict[str, list[float]]:
        """Seconds of each stage, and the CPU seconds of the whole, a sample a round."""
        return {stage: [one.seconds[stage] for one in made] for stage in STAGES} | {"cpu": [one.cpu_s for one in made]}

    def weigh(self, names: Sequence[str], options: argparse.Namespace) -> None:
        """Peak bytes of a process that makes one clip."""
        for name in names:
            self.sheet.check_time(f"{name}, memory")
            try:
                peak = peak_of(name, options)
            except Missing as reason:
                self.sheet.missing(f"{self.group}/peak_bytes/{name}", str(reason))
                continue
            except (subprocess.SubprocessError, ValueError, LookupError) as error:
                self.sheet.failed(f"{self.group}/peak_bytes/{name}", reason_of(error))
                continue
            self.sheet.measured(f"{self.group}/peak_bytes/{name}", "bytes", [peak], shown=False)

    def whole_ratio(self, name: str) -> float | None:
        """How many times as fast as diffusers eager."""
        wanted = f"{self.group}/whole/{name}"
        return next((one.spread.median for one in self.sheet.comparisons if one.name == wanted), None)

    def _labels(self, name: str) -> Labels:
        """What decodes our clips here: it is faster where `skylapse compile` has been run."""
        if name not in OURS:
            return {}
        report = asdict(self.contestants.engine.decoders.report)
        return {"decoder": str(report["backend"]), "decoder_why": str(report["why"])}


def _place(group: str, stage: str, name: str) -> str:
    return f"{group}/whole/{name}/cpu" if stage == "cpu" else f"{group}/{stage}/{name}"


def peak_of(name: str, options: argparse.Namespace) -> int:
    """Of a process of its own with one contestant and one clip."""
    size = options.size and words_of(options.size)
    given = {
        "model": options.model,
        "size": size,
        "steps": options.steps,
        "threads": options.threads or torch.get_num_threads(),
    }
    given |= {"dtype": options.dtype, "device": options.device.type, "only": name}
    words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "skylapse.benchmarks", "peers", *words]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=APART_S).stdout
    told: dict[str, Any] = json.loads(output.splitlines()[-1])
    if "missing" in told:
        raise Missing(told["missing"])
    return int(told["peak_bytes"])


def _alone(options: argparse.Namespace) -> int:
    """One clip by one contestant; the last line is one JSON object."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        Contestants(options.model, options.dtype, options.device).ready(options.only, requests(options, 1)[0])
        on_gpu = options.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
        told = {"missing": "nobody counts memory here"} if peak is None else {"peak_bytes": peak}
    except Missing as reason:
        told = {"missing": str(reason)}
    print(json.dumps(told))
    return 0
