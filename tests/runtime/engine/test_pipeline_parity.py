"""A whole request through skylapse equals diffusers' pipeline on the same folder, for every variant of Wan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_l2
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanVideoToVideoPipeline
from PIL import Image
from tiny import VARIANTS, build_pipeline

from skylapse import Engine, VideoRequest

PROMPT, NEGATIVE = "a red circle moving left at night", "small green box"
WIDTH, HEIGHT, NUM_FRAMES = 64, 96, 9


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def images(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    first, last = np.random.default_rng(seed).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
    return first, last


def test_latents_and_frames_equal_diffusers(variant: str, tmp_path: Path) -> None:
    pipeline = build_pipeline(variant)
    pipeline.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(str(tmp_path), device="cpu", dtype="fp32")
    noise = torch.randn(
        engine.model.codec.latent_shape(NUM_FRAMES, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(5)
    )
    asked = dict(prompt=PROMPT, negative_prompt=NEGATIVE, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES)
    asked |= dict(num_inference_steps=6, guidance_scale=3.0)
    if len(engine.model.experts) == 2:
        asked["guidance_scale_2"] = 2.0
    shown, ours = {}, {}
    if engine.model.folder.concatenates_image:
        first, last = images()
        shown["image"], ours["image"] = Image.fromarray(first), first
        if variant == "wan2.1-flf2v":
            shown["last_image"], ours["last_image"] = Image.fromarray(last), last
    expected = pipeline(**asked, **shown, latents=noise[None], output_type="latent").frames[0]
    request = VideoRequest(**asked, **ours)
    latents = engine.generate_latents(request, latents=noise)
    assert relative_l2(latents, expected) < 3e-5  # a model noise of 1e-6 grows along a trajectory

    frames = np.concatenate(list(engine.decode(expected)))
    reference = pipeline(**asked, **shown, latents=noise[None], output_type="np").frames[0]
    difference = np.abs(frames.astype(int) - np.rint(reference * 255).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_a_given_first_frame_equals_diffusers_ti2v(tmp_path: Path) -> None:
    source = build_pipeline("wan2.2-ti2v-5b")
    source.save_pretrained(tmp_path)
    parts = {name: part for name, part in source.components.items() if part is not None}
    pipeline = WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine.from_pretrained(str(tmp_path), device="cpu", dtype="fp32")
    noise = torch.randn(
        engine.model.codec.latent_shape(NUM_FRAMES, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(6)
    )
    first, _ = images(1)
    asked = dict(
        prompt=PROMPT, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, num_inference_steps=6, guidance_scale=3.0
    )
    expected = pipeline(**asked, image=Image.fromarray(first), latents=noise[None], output_type="latent").frames[0]
    latents = engine.generate_latents(VideoRequest(**asked, image=first), latents=noise)
    assert relative_l2(latents, expected) < 3e-5


@pytest.mark.parametrize(("solver", "strength"), [("unipc", 0.7), ("unipc", 1.0), ("euler", 0.55)])
def test_a_noised_source_equals_diffusers_video_to_video(solver: str, strength: float, tmp_path: Path) -> None:
    source = build_pipeline("wan2.1-t2v")
    source.save_pretrained(tmp_path)
    pipeline = WanVideoToVideoPipeline(**{name: part for name, part in source.components.items() if part is not None})
    pipeline.set_progress_bar_config(disable=True)
    if solver == "euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    video = np.random.default_rng(2).integers(0, 256, (NUM_FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    asked = dict(prompt=PROMPT, negative_prompt=NEGATIVE, width=WIDTH, height=HEIGHT)
    asked |= dict(num_inference_steps=10, guidance_scale=3.0, strength=strength)
    expected = pipeline(
        **asked,
        video=[Image.fromarray(frame) for frame in video],
        generator=torch.Generator().manual_seed(8),
        output_type="latent",
    ).frames[0]
    engine = Engine.from_pretrained(str(tmp_path), device="cpu", dtype="fp32")
    latents = engine.generate_latents(VideoRequest(**asked, video=video, solver=solver, seed=8))
    assert relative_l2(latents, expected) < 3e-5


def test_solvers_and_shift_of_a_request_override_the_checkpoint(tmp_path: Path) -> None:
    pipeline = build_pipeline("wan2.1-t2v")
    pipeline.save_pretrained(tmp_path)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    engine = Engine.from_pretrained(str(tmp_path), device="cpu", dtype="fp32")
    noise = torch.randn(engine.model.codec.latent_shape(5, 64, 64), generator=torch.Generator().manual_seed(7))
    asked = dict(prompt=PROMPT, width=64, height=64, num_frames=5, num_inference_steps=5, guidance_scale=1.0)
    expected = pipeline(**asked, latents=noise[None], output_type="latent").frames[0]
    latents = engine.generate_latents(VideoRequest(**asked, solver="euler", shift=2.0), latents=noise)
    assert relative_l2(latents, expected) < 1e-5
