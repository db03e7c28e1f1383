"""skylapse against diffusers' WanPipeline: same checkpoint, prompt, noise, steps, dtype and threads, pair by pair.

Each pair has a new prompt and seed, so that nothing is reused between pairs; the order within a pair alternates.
Ratios are taken pair by pair and their median and spread reported, so a noisy machine slows both sides of a pair. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...runtime.engine import Engine
from ...runtime.models.registry import resolve_folder
from ...runtime.request import VideoRequest
from ..demo_model.scenes import caption, draw_scenes

STAGES = ("encode", "denoise", "decode", "whole")
Timed = tuple[np.ndarray, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="demo or a diffusers folder")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--size", default=None, help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=None)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="write the JSON object to this file too")
    parser.add_argument("--only", choices=("skylapse", "diffusers"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        side = load_skylapse if args.only == "skylapse" else load_diffusers
        side(args.model, args.dtype)(requests(args, 1)[0])
        status = Path("/proc/self/status").read_text()  # ru_maxrss would inherit the parent's peak
        print(json.dumps({"peak_bytes": int(status.split("VmHWM:")[1].split()[0]) * 1024}))
        return
    result = compare(args) | {"peak_bytes": {name: peak_memory(args, name) for name in ("skylapse", "diffusers")}}
    print(json.dumps(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs, print a table, return the figures."""
    ours, theirs = load_skylapse(args.model, args.dtype), load_diffusers(args.model, args.dtype)
    warm, *asked = requests(args, args.pairs + 1)
    ours(warm), theirs(warm)
    seconds: dict[str, list[dict[str, float]]] = {"skylapse": [], "diffusers": []}
    largest, unequal = 0, []
    for index, request in enumerate(asked):
        gc.collect()
        sides: list[tuple[str, Callable[[VideoRequest], Timed]]] = [("skylapse", ours), ("diffusers", theirs)]
        frames = {}
        for name, run in sides if index % 2 == 0 else reversed(sides):
            frames[name], timing = run(request)
            seconds[name].append(timing)
        difference = np.abs(frames["skylapse"].astype(int) - frames["diffusers"])
        largest = max(largest, int(difference.max()))
        unequal.append(float((difference > 1).mean()))
    print(f"{'stage':<10}{'skylapse s':>12}{'diffusers s':>13}{'ratio':>9}   spread")
    ratios = {}
    for stage in STAGES:
        pairs = [b[stage] / a[stage] for a, b in zip(seconds["skylapse"], seconds["diffusers"], strict=True)]
        middle = {name: statistics.median(t[stage] for t in timings) for name, timings in seconds.items()}
        ratios[stage] = {
            "median": round(statistics.median(pairs), 3),
            "min": round(min(pairs), 3),
            "max": round(max(pairs), 3),
        }
        print(
            f"{stage:<10}{middle['skylapse']:>12.4f}{middle['diffusers']:>13.4f}"
            f"{ratios[stage]['median']:>8.2f}x   {min(pairs):.2f} to {max(pairs):.2f}"
        )
    first = asked[0]
    return {
        "benchmark": "peers.diffusers_pipeline",
        "model": args.model,
        "dtype": args.dtype,
        "pairs": args.pairs,
        "size": list(first.size),
        "num_inference_steps": first.num_inference_steps,
        "ratio": ratios,
        "seconds": {
            name: {stage: round(statistics.median(t[stage] for t in timings), 5) for stage in STAGES}
            for name, timings in seconds.items()
        },
        "frames": {"largest_difference": largest, "share_off_by_more_than_1": max(unequal)},
        "versions": {
            "torch": torch.__version__,
            "diffusers": _diffusers_version(),
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def requests(args: argparse.Namespace, count: int) -> list[VideoRequest]:
    """Resolved requests with different prompts and seeds."""
    engine = Engine.from_pretrained(args.model)
    width, height = map(int, args.size.split("x")) if args.size else (None, None)
    generator = torch.Generator().manual_seed(77)
    scenes = draw_scenes(count, generator)
    return [
        VideoRequest(
            prompt=caption(scenes.labels(i), generator, omit=0.0),
            width=width,
            height=height,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            seed=100 + i,
        ).resolved(engine.defaults, engine.limits)
        for i in range(count)
    ]


def load_skylapse(model: str, dtype: str) -> Callable[[VideoRequest], Timed]:
    engine = Engine.from_pretrained(model, device="cpu", dtype=dtype)

    def run(request: VideoRequest) -> Timed:
        began = time.perf_counter()
        video = engine.generate(request)
        whole = time.perf_counter() - began
        return video.frames, dict(video.metadata.timings_s) | {"whole": whole}

    return run


def load_diffusers(model: str, dtype: str) -> Callable[[VideoRequest], Timed]:
    """WanPipeline on the same folder, VAE in fp32 as ours, per-token timesteps off (the same function, slower)."""
    from diffusers import AutoencoderKLWan, WanPipeline

    folder = resolve_folder(model)
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
    pipeline = WanPipeline.from_pretrained(folder, vae=vae, dtype=precision)
    pipeline.register_to_config(expand_timesteps=False)
    pipeline.set_progress_bar_config(disable=True)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)

    @torch.inference_mode()
    def run(request: VideoRequest) -> Timed:
        width, height, num_frames = request.size
        began = time.perf_counter()
        prompt, negative = pipeline.encode_prompt(request.prompt, request.negative_prompt, max_sequence_length=512)
        encoded = time.perf_counter()
        latents = pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            width=width,
            height=height,
            num_frames=num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        ).frames
        denoised = time.perf_counter()
        video = vae.decode(latents.float() * std + mean, return_dict=False)[0]
        frames = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        frames = (frames * 255).round().astype(np.uint8)
        done = time.perf_counter()
        stages = dict(encode=encoded - began, denoise=denoised - encoded, decode=done - denoised, whole=done - began)
        return frames, stages

    return run


def peak_memory(args: argparse.Namespace, side: str) -> int:
    """Peak resident bytes of a process of its own that makes one clip with one engine."""
    kept = {name: getattr(args, name) for name in ("model", "steps", "size", "frames", "dtype", "threads")}
    options = [word for name, value in kept.items() if value is not None for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "skylapse.benchmarks.peers.diffusers_pipeline", *options, "--only", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1])["peak_bytes"])


def _diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)


def _commit() -> str | None:
    """The commit of the tree that this file lies in, "+" behind it where the tree differs; None outside git."""
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        return None
    status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


if __name__ == "__main__":
    main()
