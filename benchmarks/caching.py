"""Step caches on a model: evaluations, speed, distance from the uncached clip and the judge, beside fewer steps.

Every prompt is made without a cache, with each cache, and with each cache's number of evaluations as its number of
steps (the control: a cache that does not beat it is of no use). Speed-ups are taken prompt by prompt, in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.engine import Engine
from ..runtime.request import Video, VideoRequest
from .demo_model.judge import score
from .demo_model.scenes import caption, draw_scenes
from .machine import describe
from .metrics import compare_clips

PRESETS = ("high", "balanced", "fast")
POLICIES = (
    *(f"easy:{threshold}" for threshold in (0.02, 0.05, 0.1, 0.2)),
    *(f"first_block:threshold={t},order={order}" for order in (0, 1) for t in (0.04, 0.08, 0.16)),
    *(f"teacache:{threshold}" for threshold in (0.05, 0.1, 0.2)),
    *(f"magcache:{threshold}" for threshold in (0.03, 0.06, 0.12)),
    *(f"taylorseer:interval={interval},order={order}" for order in (1, 2) for interval in (2, 3, 4)),
    *(f"budget:share={share},order={order}" for order in (1, 2) for share in (0.6, 0.43, 0.3)),
)


@dataclass
class Row:
    """One way of making the clips: a cache, or fewer steps."""

    cache: str
    steps: int | None = None
    clips: list[np.ndarray] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)
    quality: list[dict[str, float]] = field(default_factory=list)
    state_bytes: int = 0

    def add(self, video: Video, plain: Video) -> None:
        report = video.metadata.cache
        assert report is not None
        self.clips.append(video.frames)
        self.evaluations.append(report.num_evaluations)
        self.speedups.append(plain.metadata.timings_s["denoise"] / video.metadata.timings_s["denoise"])
        self.quality.append(compare_clips(video.frames, plain.frames))
        self.state_bytes = max(self.state_bytes, report.peak_state_bytes)

    def summary(self, labels: list[dict[str, str]]) -> dict[str, Any]:
        low, high = np.percentile(self.speedups, (5, 95))
        means = {name: round(statistics.mean(q[name] for q in self.quality), 4) for name in self.quality[0]}
        return {
            "cache": self.cache,
            **({"steps": self.steps} if self.steps else {}),
            "evaluations": round(statistics.mean(self.evaluations), 2),
            "speedup": round(statistics.median(self.speedups), 3),
            "speedup_p5_p95": [round(float(low), 3), round(float(high), 3)],
            **means,
            "judge": score(self.clips, labels),
            "state_bytes": self.state_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--caches", nargs="+", default=[*PRESETS, *POLICIES], metavar="CACHE")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--no-control", action="store_true", help="leave out the runs with fewer steps")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of an earlier run instead")
    args = parser.parse_args()
    if args.show:
        print(markdown(json.loads(args.show.read_text())))
        return
    engine = Engine.from_pretrained(args.model)
    result = run(engine, args.caches, args.prompts, args.steps, control=not args.no_control)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def run(engine: Engine, caches: list[str], num_prompts: int, steps: int | None, control: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(40_000)
    scenes = draw_scenes(num_prompts, generator)
    labels = [scenes.labels(i) for i in range(num_prompts)]
    rows = {cache: Row(cache) for cache in caches}
    controls: dict[int, Row] = {}
    made: list[tuple[dict[str, Any], Video]] = []  # of each prompt: what was asked, and its clip without a cache
    for index, label in enumerate(labels):
        asked: dict[str, Any] = dict(prompt=caption(label, generator, 0.0, 0.0), seed=2_000_000 + index)
        for _ in range(2 if index == 0 else 1):  # the first one also warms up
            plain = engine.generate(VideoRequest(**asked, num_inference_steps=steps))
        made.append((asked, plain))
        for cache, row in rows.items():
            row.add(engine.generate(VideoRequest(**asked, num_inference_steps=steps, cache=cache)), plain)
        if control:
            # Adaptive caches differ from prompt to prompt; their control has their mean so far, which moves at times.
            # A new one makes up for the prompts before: on the later ones alone, 16 steps came out 3.7 dB above 17.
            counts = {round(statistics.mean(row.evaluations)) for row in rows.values()}
            for count in counts:
                row = controls.setdefault(count, Row("none", count))
                for earlier, uncached in made[len(row.clips) :]:
                    row.add(engine.generate(VideoRequest(**earlier, num_inference_steps=count)), uncached)
            controls = {count: row for count, row in controls.items() if count in counts or index + 1 < num_prompts}
        print(f"prompt {index + 1} of {num_prompts}", flush=True)
    return {
        "machine": describe(),
        "model": engine.model.name,
        "prompts": num_prompts,
        "judge_uncached": score([plain.frames for _, plain in made], labels),
        "rows": [row.summary(labels) for row in rows.values()],
        "fewer_steps": [row.summary(labels) for _, row in sorted(controls.items())],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table as the documents show it; judge, worst: points that the worst of its scores lies above uncached."""
    controls = {row["steps"]: row["psnr_pooled"] for row in result["fewer_steps"]}
    titles = ("evaluations", "speed-up (p5-p95)", "PSNR dB", "fewer steps'", "mean frame", "of motion", "SSIM")
    lines = ["| " + " | ".join(("cache", *titles, "judge, worst", "KiB")) + " |", "|---" * 10 + "|"]
    for row in result["rows"]:
        low, high = row["speedup_p5_p95"]
        control = controls.get(round(row["evaluations"]))
        worst = min(row["judge"][name] - score for name, score in result["judge_uncached"].items())
        cells = (
            f"`{row['cache']}`",
            f"{row['evaluations']:.1f}",
            f"{row['speedup']:.2f}x ({low:.2f}-{high:.2f})",
            f"{row['psnr_pooled']:.1f}",
            "" if control is None else f"{control:.1f}",
            f"{row['psnr_mean']:.1f}",
            f"{row['psnr_motion']:.1f}",
            f"{row['ssim_mean']:.4f}",
            f"{100 * worst:+.1f}",
            f"{row['state_bytes'] / 1024:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
