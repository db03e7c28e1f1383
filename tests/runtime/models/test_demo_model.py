"""The model inside the package: diffusers loads the same folder, the judge reads prompts back, given frames stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from skylapse import Engine, VideoRequest
from skylapse.benchmarks.demo_model.evaluate import psnr
from skylapse.benchmarks.demo_model.judge import score
from skylapse.benchmarks.demo_model.scenes import caption, draw_scenes, render


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Engine:
    assert demo_folder.is_dir()
    return Engine.from_pretrained("demo", device="cpu", dtype="fp32")


def test_the_folder_is_small_and_holds_nothing_that_runs(demo_folder: Path) -> None:
    files = [path for path in demo_folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert "Limits" in (demo_folder / "README.md").read_text()


def test_diffusers_gives_the_same_frames_from_the_same_noise(engine: Engine, demo_folder: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(demo_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a small purple star moving left over the sea"
    request = VideoRequest(prompt=prompt, num_inference_steps=12, seed=3).resolved(engine.defaults, engine.limits)
    width, height, num_frames = request.size
    reference = pipeline(
        prompt=prompt,
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=12,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    frames = engine.generate(request).frames
    difference = np.abs(frames.astype(int) - np.rint(reference * 255).astype(int))
    assert (difference <= 1).mean() >= 0.999


@pytest.mark.slow
def test_the_judge_reads_the_prompt_back(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(501)
    scenes = draw_scenes(16, generator)
    labels = [scenes.labels(i) for i in range(16)]
    prompts = [caption(label, generator, omit=0.0, synonyms=0.0) for label in labels]
    clips = [engine.generate(VideoRequest(prompt=prompt, seed=9000 + i)).frames for i, prompt in enumerate(prompts)]
    scores = score(clips, labels)
    # The model card has the figures on 200 prompts; these leave room for what 16 say by chance.
    assert min(scores[name] for name in ("colour", "direction", "background")) >= 0.85, scores
    assert scores["size"] >= 0.75 and scores["shape"] >= 0.5, scores
    shuffled = score(clips, labels[1:] + labels[:1])
    assert sum(shuffled.values()) < sum(scores.values()) - 1, shuffled


def test_a_given_first_frame_is_kept_and_moves_on(engine: Engine) -> None:
    generator = torch.Generator().manual_seed(502)
    scenes = draw_scenes(1, generator)
    frames, _ = render(scenes, 17, 64, 64)
    image = ((frames[0, :, 0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    request = VideoRequest(prompt=caption(scenes.labels(0), generator, 0.0, 0.0), image=image, num_inference_steps=10)
    video = engine.generate(request)
    assert np.array_equal(video.frames[0], image)
    own = next(iter(engine.decode(engine.generate_latents(request))))
    source = next(iter(engine.decode(engine.encode(image[None]))))
    assert psnr(own, source) >= 28
    assert psnr(video.frames[1], image) > 15  # the next frame shows the same scene


@pytest.mark.parametrize(("width", "height", "num_frames"), [(96, 64, 17), (64, 96, 9), (64, 64, 33), (64, 64, 1)])
def test_other_sizes_and_lengths_come_out(engine: Engine, width: int, height: int, num_frames: int) -> None:
    request = VideoRequest(prompt="a star", width=width, height=height, num_frames=num_frames, num_inference_steps=2)
    assert engine.generate(request).frames.shape == (num_frames, height, width, 3)
