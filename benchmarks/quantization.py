"""Quantised weights on a model: distance from the exact clip and the judge, beside fewer steps.

Every prompt is made with exact weights, with each quantisation, and with exact weights in fewer steps (the control: how
many steps left out move a clip as far). All runs of a prompt follow each other. Times are of this CPU and tell nothing
of a GPU.
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

from ..runtime.config import QUANTIZE
from ..runtime.engine import Engine
from ..runtime.request import Video, VideoRequest
from .demo_model.judge import score
from .demo_model.scenes import caption, draw_scenes
from .machine import describe
from .metrics import compare_clips

FEWER_STEPS = (29, 25, 20, 15)


@dataclass
class Row:
    """One way of making the clips."""

    name: dict[str, Any]
    clips: list[np.ndarray] = field(default_factory=list)
    denoise_ratios: list[float] = field(default_factory=list)  # of exact weights' time to this one's, prompt by prompt
    quality: list[dict[str, float]] = field(default_factory=list)

    def add(self, video: Video, exact: Video) -> None:
        self.clips.append(video.frames)
        self.denoise_ratios.append(exact.metadata.timings_s["denoise"] / video.metadata.timings_s["denoise"])
        self.quality.append(compare_clips(video.frames, exact.frames))

    def summary(self, labels: list[dict[str, str]]) -> dict[str, Any]:
        low, high = np.percentile(self.denoise_ratios, (5, 95))
        return {
            **self.name,
            "cpu_speedup": round(statistics.median(self.denoise_ratios), 3),
            "cpu_speedup_p5_p95": [round(float(low), 3), round(float(high), 3)],
            **{name: round(statistics.mean(q[name] for q in self.quality), 4) for name in self.quality[0]},
            "judge": score(self.clips, labels),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of an earlier run instead")
    args = parser.parse_args()
    if args.show:
        print(markdown(json.loads(args.show.read_text())))
        return
    result = run(args.model, args.prompts)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def run(
    model: str, num_prompts: int, steps: int | None = None, fewer_steps: tuple[int, ...] = FEWER_STEPS
) -> dict[str, Any]:
    """steps: of all but the controls; None for the model's own."""
    exact, *quantised = (Engine.from_pretrained(model, device="cpu", quantize=kind) for kind in QUANTIZE)
    generator = torch.Generator().manual_seed(50_000)
    scenes = draw_scenes(num_prompts, generator)
    labels = [scenes.labels(i) for i in range(num_prompts)]
    rows = [Row({"quantize": engine.quantize, "weights_bytes": engine.model.num_bytes}) for engine in quantised]
    controls = [Row({"steps": fewer}) for fewer in fewer_steps]
    clips = []
    for index, label in enumerate(labels):
        asked: dict[str, Any] = dict(prompt=caption(label, generator, 0.0, 0.0), seed=3_000_000 + index)
        if index == 0:  # warms up
            for engine in (exact, *quantised):
                engine.generate(VideoRequest(**asked, num_inference_steps=2))
        plain = exact.generate(VideoRequest(**asked, num_inference_steps=steps))
        clips.append(plain.frames)
        for row, engine in zip(rows, quantised, strict=True):
            row.add(engine.generate(VideoRequest(**asked, num_inference_steps=steps)), plain)
        for row, fewer in zip(controls, fewer_steps, strict=True):
            row.add(exact.generate(VideoRequest(**asked, num_inference_steps=fewer)), plain)
        print(f"prompt {index + 1} of {num_prompts}", flush=True)
    return {
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "model": exact.model.name,
        "dtype": exact.model.precision,
        "steps": steps or exact.defaults.num_inference_steps,
        "weights_bytes": exact.model.num_bytes,
        "prompts": num_prompts,
        "judge_exact": score(clips, labels),
        "rows": [row.summary(labels) for row in rows],
        "fewer_steps": [row.summary(labels) for row in controls],
    }


def markdown(result: dict[str, Any]) -> str:
    """The table as the documents show it; judge, worst: points that the worst of its scores lies above the exact."""
    titles = ("PSNR dB", "mean frame", "worst frame", "of motion", "SSIM", "judge, worst", "weights MiB")
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (1 + len(titles)) + "|"]
    for row in (*result["rows"], *result["fewer_steps"]):
        worst = min(row["judge"][name] - score for name, score in result["judge_exact"].items())
        cells = (
            f"`{row['quantize']}`" if "quantize" in row else f"exact, {row['steps']} of {result['steps']} steps",
            *(f"{row[name]:.1f}" for name in ("psnr_pooled", "psnr_mean", "psnr_worst", "psnr_motion")),
            f"{row['ssim_mean']:.4f}",
            f"{100 * worst:+.1f}",
            f"{row.get('weights_bytes', result['weights_bytes']) / 2**20:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
