"""`skylapse bench quality`: how far caches, quantised weights and fewer steps move a clip, and what they save.

Each prompt is made exactly, then in every way, then (the control) exactly in as many steps as each cache computes: a
cache that does not beat it is of no use. The floor is the exact request again, beside others in one batch. Speeds are
of denoising, each beside an exact clip of the same prompt made just before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...runtime.media.writer import write_video
from ..demo_model.judge import judge
from ..demo_model.scenes import caption, draw_scenes
from ..harness import Missing
from ..metrics import EXTRA, UNITS, Clip, Metric
from ..record import Better, SuiteReport, read
from ..sheet import Labels, Sheet, note, suite_parser
from .quality_table import markdown
from .quality_ways import EXACT, MIXED, SETS, Made, Makers, Row, Way, parse_way

__all__ = ["markdown", "quality"]
Labelled = dict[str, str]
BESIDE = 4  # ways that one exact clip's time is compared with: a machine that grows slow must slow both
FEWER = (29 / 30, 25 / 30, 20 / 30, 15 / 30)  # of the steps, whatever caches compute: a scale for quantised weights
QUICK = (*SETS["presets"], Way("quantize", "int8"))


def quality(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.show:
        print(markdown(_read(options.show)))
        return 0
    ways = _ways(options)
    prompts = options.prompts or (2 if options.quick else 24)
    makers = Makers(options.model, options.device, ways)
    steps = options.steps or makers.exact.defaults.num_inference_steps
    if any(way.kind == "steps" and int(way.value) > steps for way in ways):
        raise ValueError(f"steps of a way must be at most the exact clip's {steps}")
    settings = {"prompts": prompts, "steps": steps, "ways": [way.name for way in ways], **_facts(makers)}
    sheet = Sheet("quality", options, settings)
    with sheet.running(cases=prompts * (1 if options.no_control else 2)):
        metrics = _metrics(sheet, options.metric)
        run = Run(sheet, makers, [Row(way, metrics) for way in ways], _asked(prompts, steps, options.seed))
        try:
            run.through(run.rows)
            if not options.no_control:
                run.through(
                    run.controls(steps, scale=not options.quick and any(way.kind == "quantize" for way in ways))
                )
        finally:  # what there is of a run that ends early
            run.record()
        if options.clips:
            run.save(options.clips)
    print(markdown(sheet.report()))
    return sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser(
        "quality", "How far caches, quantised weights and fewer steps move a clip, and what they save."
    )
    option = parser.add_argument
    option("--prompts", type=_count, metavar="N", help="default: 24, with --quick 2")
    option(
        "--set",
        nargs="+",
        choices=tuple(SETS),
        metavar="SET",
        help=f"of ways: {', '.join(SETS)}; default: all but policies",
    )
    option(
        "--ways", nargs="+", type=_way, metavar="WAY", help="instead: cache=POLICY, quantize=int8, dtype=bf16, steps=20"
    )
    option("--steps", type=_count, metavar="N", help="of the exact clip; default: the model's own")
    option("--no-control", action="store_true", help="leave out the runs with fewer steps")
    option("--metric", action="append", default=[], choices=tuple(EXTRA), help="one that needs a pretrained network")
    option("--clips", type=Path, metavar="DIR", help="keep all clips as mp4, and their prompts, for VBench and others")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    option("--show", type=Path, metavar="FILE", help="print the table of an earlier run and end")
    return parser


def _count(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and 1 <= int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 1000, got {text!r}")
    return int(text)


def _way(text: str) -> Way:
    try:
        return parse_way(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ways(options: argparse.Namespace) -> list[Way]:
    """What is compared; the floor always."""
    if options.ways:
        ways = list(options.ways)
    elif options.set:
        ways = [way for name in options.set for way in SETS[name]]
    else:
        ways = list(QUICK) if options.quick else [*SETS["presets"], *SETS["quantized"]]
    return list(dict.fromkeys((*ways, MIXED)))


def _read(path: Path) -> SuiteReport:
    report = read(path, SuiteReport)
    if report.benchmark != "quality":
        raise ValueError(f"{path.name} must be a result of quality, got one of {report.benchmark}")
    return report


def _facts(makers: Makers) -> dict[str, Any]:
    """What the names do not say."""
    engine = makers.exact
    width, height, frames = engine.defaults.width, engine.defaults.height, engine.defaults.num_frames
    return {
        "size": [width, height, frames],
        "dtype": engine.model.precision,
        "timed": "whole requests" if engine.device.type == "cuda" else "denoising",
        "judged": engine.model.name == "demo",  # the judge knows the demo model's world alone
        "weights_bytes": {loads[0] or loads[1] or "exact": e.model.num_bytes for loads, e in makers.engines.items()},
    }


def _metrics(sheet: Sheet, names: Sequence[str]) -> dict[str, Metric]:
    found = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = EXTRA[name][1]()
        except Missing as reason:
            sheet.missing(f"quality/{name}", str(reason))
    return found


def _asked(count: int, steps: int, seed: int) -> list[tuple[dict[str, Any], Labelled]]:
    """(what is asked, what the judge should read) of each prompt."""
    generator = torch.Generator().manual_seed(40_000 + seed)
    scenes = draw_scenes(count, generator)
    labels = [scenes.labels(i) for i in range(count)]
    first = 2_000_000 + 10_000 * seed
    return [
        (dict(prompt=caption(label, generator, 0.0, 0.0), seed=first + i, num_inference_steps=steps), label)
        for i, label in enumerate(labels)
    ]


class Run:
    """All prompts in all ways."""

    def __init__(
        self, sheet: Sheet, makers: Makers, rows: list[Row], asked: list[tuple[dict[str, Any], Labelled]]
    ) -> None:
        self.sheet, self.makers, self.rows, self.asked = sheet, makers, rows, asked
        self.exact: list[Made] = []
        self.fewer: list[Row] = []
        makers.warm_up(asked[0][0])

    def through(self, rows: Sequence[Row]) -> None:
        """Every prompt in the ways of these rows, the order turned round with each prompt."""
        for index, (asked, _) in enumerate(self.asked):
            self.sheet.check_time(f"prompt {index + 1} of {len(self.asked)}, {len(rows)} ways")
            for group in _groups(rows, backwards=index % 2 == 1):
                beside = self.makers.make(EXACT, asked)
                if index == len(self.exact):
                    self.exact.append(beside)
                for row in group:
                    row.add(self.makers.make(row.way, asked), self.exact[index].frames, beside.seconds)

    def controls(self, steps: int, scale: bool) -> list[Row]:
        """Fewer steps: as many as each cache has computed in the mean; with `scale` FEWER's too."""
        counts = {round(row.evaluations) for row in self.rows if row.way.kind == "cache"}
        counts |= {round(share * steps) for share in FEWER} if scale else set()
        taken = {row.way for row in self.rows}
        ways = [Way("steps", str(count)) for count in sorted(counts) if 0 < count < steps]
        self.fewer = [Row(way, self.rows[0].metrics) for way in ways if way not in taken]
        return self.fewer

    def record(self) -> None:
        """Of every way that has a prompt behind it."""
        if not self.exact:
            return
        self._work("exact", self.exact)
        self._judged("exact", [made.frames for made in self.exact])
        for row in (row for row in (*self.rows, *self.fewer) if row.made):
            name = row.way.name
            for metric, values in row.quality.items():
                unit, shown = UNITS.get(metric) or EXTRA[metric][0], metric == "psnr_pooled"
                self.sheet.measured(f"quality/{metric}/{name}", unit, _short(values), _better(metric), shown=shown)
            self._work(name, row.made)
            if row.speed_ups:
                self.sheet.compared(f"quality/denoise/{name}", "exact", name, _short(row.speed_ups))
            self._judged(name, [made.frames for made in row.made])

    def _work(self, name: str, made: Sequence[Made]) -> None:
        labels: Labels = {"state_bytes": max(one.state_bytes for one in made)}
        labels |= {"close_calls": sum(one.close_calls for one in made)}
        evaluations = [one.evaluations for one in made]
        self.sheet.measured(f"quality/evaluations/{name}", "evaluations", evaluations, labels=labels, shown=False)
        seconds = [one.seconds for one in made if one.seconds is not None]
        tokens = [one.tokens for one in made if one.tokens is not None]
        if seconds and tokens:
            self.sheet.measured(f"quality/denoise/{name}", "s", _short(seconds), shown=False)
            self.sheet.measured(f"quality/tokens/{name}", "tokens", tokens, shown=False)

    def _judged(self, name: str, clips: Sequence[Clip]) -> None:
        """Share of attributes read as asked, clip by clip; labels: of clips, attribute by attribute."""
        if not self.sheet.settings["judged"]:
            return
        right: list[dict[str, bool]] = []
        for clip, (_, wanted) in zip(clips, self.asked, strict=False):  # a run that ended early has fewer clips
            reading = judge(clip)
            right.append({attribute: reading[attribute] == label for attribute, label in wanted.items()})
        shares = [sum(one.values()) / len(one) for one in right]
        labels: Labels = {attribute: sum(one[attribute] for one in right) / len(right) for attribute in right[0]}
        self.sheet.measured(f"quality/judge/{name}", "share", shares, "higher", labels, shown=False)

    def save(self, folder: Path) -> None:
        """mp4, which costs quality: for metrics that read files. prompts.json: file -> prompt, as VBench takes it."""
        made = {"exact": self.exact} | {row.way.name: row.made for row in (*self.rows, *self.fewer)}
        prompts, fps = {}, self.makers.exact.defaults.fps
        for name, clips in made.items():
            for index, (one, (asked, _)) in enumerate(zip(clips, self.asked, strict=True)):
                path = folder / name / f"{index:03d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, one.frames, fps)
                prompts[str(path.relative_to(folder))] = asked["prompt"]
        (folder / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
        note(f"{len(prompts)} clips in {folder}")


def _groups(rows: Sequence[Row], backwards: bool) -> Iterator[list[Row]]:
    order = list(reversed(rows)) if backwards else list(rows)
    for start in range(0, len(order), BESIDE):
        yield order[start : start + BESIDE]


def _better(metric: str) -> Better:
    if metric == "flicker":
        return "neither"  # nearer to 1 is better
    return "higher" if metric.startswith(("psnr", "ssim")) else "lower"


def _short(values: Sequence[float]) -> list[float]:
    """Five digits: a file of dozens of ways is read by people too."""
    return [float(f"{value:.5g}") for value in values]
