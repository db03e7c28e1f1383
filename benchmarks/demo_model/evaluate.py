"""Judge a demo checkpoint: prompts with unseen seeds at default settings, and given first frames."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from ...runtime.commands.options import size_of
from ...runtime.core.request import VideoRequest
from ...runtime.engine.engine import Engine
from ...runtime.media.writer import contact_sheet
from ..sheet import Sheet, suite_parser
from .judge import score
from .scenes import caption, draw_scenes, render


def main() -> None:
    parser = suite_parser("demo_model", "Judge a demo checkpoint.")
    option = parser.add_argument
    option("--prompts", type=int, default=200, metavar="N", help="text-to-video clips; default: 200")
    option("--images", type=int, default=20, metavar="N", help="image-to-video clips; default: 20")
    option("--steps", type=int, metavar="N")
    option("--guidance", type=float, metavar="G")
    option("--size", type=size_of, metavar="WxH")
    option("--frames", type=int, metavar="N")
    option("--sheet", type=Path, metavar="PNG", help="the first 16 clips as a contact sheet")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    width, height = args.size or (engine.defaults.width, engine.defaults.height)
    options = dict(
        width=width, height=height, num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=args.guidance
    )
    asked = {name: value for name, value in options.items() if value is not None}
    sheet = Sheet("demo_model", args, {"prompts": args.prompts, "images": args.images} | asked)
    with sheet.running():
        for name, value in judge_prompts(engine, args.prompts, options, args.sheet).items():
            sheet.measured(f"demo_model/prompts/{name}", "share", [value], "higher")
        if args.images:
            scores, kept_db = judge_images(engine, args.images, options)
            for name, value in scores.items():
                sheet.measured(f"demo_model/images/{name}", "share", [value], "higher")
            sheet.measured("demo_model/images/first_frame_psnr", "dB", kept_db, "higher")
    sys.exit(sheet.status)


def judge_prompts(
    engine: Engine, count: int, options: dict[str, int | float | None], sheet: Path | None
) -> dict[str, float]:
    """Share of clips in which each attribute of the full canonical prompt is read back."""
    generator = torch.Generator().manual_seed(20_000)
    scenes = draw_scenes(count, generator)
    labels = [scenes.labels(i) for i in range(count)]
    clips = []
    for i, label in enumerate(labels):
        prompt = caption(label, generator, omit=0.0, synonyms=0.0)
        clips.append(engine.generate(VideoRequest(prompt=prompt, seed=1_000_000 + i, **options)).frames)  # type: ignore[arg-type]
    if sheet:
        rows = [np.concatenate(list(clip[:: max(1, len(clip) // 8)]), axis=1) for clip in clips[:16]]
        contact_sheet(np.stack(rows), columns=1).save(sheet)
    return score(clips, labels)


def judge_images(
    engine: Engine, count: int, options: dict[str, int | float | None]
) -> tuple[dict[str, float], list[float]]:
    """The judge's scores, and each clip's PSNR in dB of the first frame against the given one as the VAE decodes it."""
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
    return score(clips, labels), kept


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, 255 the peak; 99 for equal pictures."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if error == 0 else 10 * float(np.log10(255**2 / error))


if __name__ == "__main__":
    main()
