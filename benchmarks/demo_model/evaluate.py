"""Judge a demo checkpoint: prompts with unseen seeds at default settings, and given first frames."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from ...runtime.engine import Engine
from ...runtime.request import VideoRequest
from ...runtime.video_file import contact_sheet
from .judge import score
from .scenes import caption, draw_scenes, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--images", type=int, default=20, help="image-to-video clips")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--size", default=None, help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--sheet", type=Path, default=None)
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    width, height = map(int, args.size.split("x")) if args.size else (engine.defaults.width, engine.defaults.height)
    options = dict(
        width=width, height=height, num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=args.guidance
    )
    result = {"prompts": args.prompts, **{name: value for name, value in options.items() if value is not None}}
    result |= judge_prompts(engine, args.prompts, options, args.sheet)
    if args.images:
        result |= judge_images(engine, args.images, options)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def judge_prompts(
    engine: Engine, count: int, options: dict[str, int | float | None], sheet: Path | None
) -> dict[str, float]:
    """Share of clips in which each attribute of the full canonical prompt is read back."""
    generator = torch.Generator().manual_seed(20_000)
    scenes = draw_scenes(count, generator)
    labels = [scenes.labels(i) for i in range(count)]
    began = time.perf_counter()
    clips = []
    for i, label in enumerate(labels):
        prompt = caption(label, generator, omit=0.0, synonyms=0.0)
        clips.append(engine.generate(VideoRequest(prompt=prompt, seed=1_000_000 + i, **options)).frames)  # type: ignore[arg-type]
    seconds = (time.perf_counter() - began) / count
    if sheet:
        rows = [np.concatenate(list(clip[:: max(1, len(clip) // 8)]), axis=1) for clip in clips[:16]]
        contact_sheet(np.stack(rows), columns=1).save(sheet)
    return score(clips, labels) | {"seconds_per_clip": round(seconds, 3)}


def judge_images(engine: Engine, count: int, options: dict[str, int | float | None]) -> dict[str, float]:
    """PSNR in dB of the first frame against the given one as the VAE decodes it, and the judge's scores."""
    generator = torch.Generator().manual_seed(30_000)
    scenes = draw_scenes(count, generator)
    width, height = int(options["width"] or 0), int(options["height"] or 0)
    frames, _ = render(scenes, 17, height, width)
    pixels = ((frames[:, :, 0].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    labels = [scenes.labels(i) for i in range(count)]
    clips, kept = [], []
    for i, label in enumerate(labels):
        request = VideoRequest(prompt=caption(label, generator, 0.0, 0.0), image=pixels[i], seed=i, **options)  # type: ignore[arg-type]
        clips.append(engine.generate(request).frames)
        source = next(iter(engine.decode(engine.encode(pixels[i][None]))))
        own = next(
            iter(engine.decode(engine.generate_latents(request)))
        )  # what the model kept, before pixels are pasted
        kept.append(psnr(own, source))
    scores = {f"image_{name}": value for name, value in score(clips, labels).items()}
    return scores | {"image_first_frame_psnr_db": round(min(kept), 2)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, 255 the peak; 99 for equal pictures."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


if __name__ == "__main__":
    main()
