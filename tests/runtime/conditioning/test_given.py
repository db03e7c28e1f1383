"""Given frames and noised sources: what is kept to the pixel, what is made of it, and what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import CALIBRATED_STEPS, engine_of, small_request
from tiny import save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.benchmarks.demo_model.judge import score
from skylapse.benchmarks.demo_model.scenes import caption, draw_scenes, render
from skylapse.runtime.core.events import Finished, Preview, Progress
from skylapse.runtime.media.clips import read_video
from skylapse.runtime.media.writer import write_video
from skylapse.runtime.vae.preview import SCALE

SMALL = dict(prompt="a star", width=64, height=64, num_frames=13, num_inference_steps=3)
CLIP = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def t2v(folders: dict[str, Path]) -> Engine:
    return engine_of(folders["wan2.1-t2v"])


@pytest.fixture(scope="module")
def ti2v(folders: dict[str, Path]) -> Engine:
    return engine_of(folders["wan2.2-ti2v-5b"])


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(save_checkpoint("wan2.2-i2v-a14b", tmp_path_factory.mktemp("i2v")))


def request_of(**fields: Any) -> VideoRequest:
    return VideoRequest(**(SMALL | fields))


# ------------------------------------------------------------------------------------------------------ given frames


@pytest.mark.parametrize(
    ("shown", "kept", "latents"),
    [
        (dict(video=CLIP[:5]), [(0, 5)], [0, 1]),
        (dict(video=CLIP[:9]), [(0, 9)], [0, 1, 2]),
        (dict(last_image=CLIP[16]), [(12, 13)], [3]),
        (dict(image=CLIP[0], last_image=CLIP[16]), [(0, 1), (12, 13)], [0, 3]),
        (dict(video=CLIP[:5], last_image=CLIP[16]), [(0, 5), (12, 13)], [0, 1, 3]),
    ],
    ids=["video of 5", "video of 9", "last", "first and last", "video and last"],
)
def test_given_frames_are_kept_to_the_pixel_and_their_latents_stand_at_timestep_0(
    shown: dict, kept: list[tuple[int, int]], latents: list[int], ti2v: Engine
) -> None:
    request = request_of(**shown)
    given = [frames if frames.ndim == 4 else frames[None] for frames in shown.values()]
    frames = ti2v.generate(request).frames
    for (start, stop), expected in zip(kept, given, strict=True):
        assert np.array_equal(frames[start:stop], expected)
    t = ti2v.prepare(request)
    while t.stage == "encode":
        t.work()
    assert [index for index, is_given in enumerate(t.frame_is_given) if is_given] == latents
    encoded = torch.cat([ti2v.encode(piece) for piece in given], dim=1)  # each sees itself alone
    assert torch.equal(ti2v.generate_latents(request)[:, latents], encoded)
    assert t.num_bytes <= t.resident_bytes
    plain = ti2v.prepare(request_of())
    assert t.resident_bytes - plain.resident_bytes == sum(piece.nbytes for piece in given)


def test_a_video_file_is_continued_at_the_requests_size(ti2v: Engine, tmp_path: Path) -> None:
    wide = np.repeat(np.repeat(CLIP[:5], 2, axis=1), 3, axis=2)  # 192x128: cropped to 128x128 and halved
    path = write_video(tmp_path / "context.mp4", wide, fps=24)
    frames = ti2v.generate(request_of(video=path)).frames
    from_array = ti2v.generate(request_of(video=read_video(path, 5, 10**6)[0])).frames
    assert frames.shape == (13, 64, 64, 3) and np.array_equal(frames, from_array)


def test_previews_show_the_given_frames(ti2v: Engine) -> None:
    flat = np.full((5, 64, 64, 3), 200, np.uint8)
    ticket = ti2v.submit(request_of(video=flat), preview_every=1)
    shown = []
    while ti2v.has_work():
        shown += [event.frames for event in ti2v.step() if isinstance(event, Preview) and event.ticket == ticket]
    expected = ti2v.previewer(ti2v.encode(flat))
    assert all(np.array_equal(frames[:2], expected) for frames in shown) and len(shown) == 3
    assert expected.shape == (2, 4 * SCALE, 4 * SCALE, 3)


def test_a_model_with_image_channels_continues_a_video_and_is_shown_every_frame_of_it(i2v: Engine) -> None:
    request = request_of(video=CLIP[:9], last_image=CLIP[16])
    frames = i2v.generate(request).frames
    assert np.array_equal(frames[:9], CLIP[:9]) and not np.array_equal(frames[12], CLIP[16])
    t = i2v.prepare(request)
    while t.stage == "encode":
        t.work()
    assert t.conditioning is not None and t.conditioning.channels is not None
    mask = t.conditioning.channels[:4, :, 0, 0]  # [frames of a group, latent frames]
    assert mask.T.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert t.num_bytes <= t.resident_bytes


def test_the_demo_model_continues_what_a_clip_shows(demo_folder: Path) -> None:
    """Nine rendered frames and eight of its own; the judge sees only the latter."""
    engine, generator = engine_of(demo_folder), torch.Generator().manual_seed(503)
    scenes = draw_scenes(6, generator)
    truth, _ = render(scenes, 17, 64, 64)
    pixels = ((truth.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy()
    labels = [scenes.labels(i) for i in range(6)]
    tails = []
    for i, label in enumerate(labels):
        prompt = caption(label, generator, omit=0.0, synonyms=0.0)
        frames = engine.generate(VideoRequest(prompt=prompt, video=pixels[i, :9], num_inference_steps=6, seed=i)).frames
        assert np.array_equal(frames[:9], pixels[i, :9])
        assert np.abs(frames[9].astype(int) - frames[8]).mean() < 12  # no jump at the seam: 0.7 to 6 were measured
        tails.append(frames[8:])
    assert min(score(tails, labels).values()) >= 5 / 6  # 1.0 was measured, on 8 clips


def test_the_demo_model_finds_the_way_from_a_first_frame_to_a_last_one(demo_folder: Path) -> None:
    """The prompts say nothing of the motion."""
    engine, generator = engine_of(demo_folder), torch.Generator().manual_seed(503)
    scenes = draw_scenes(4, generator)
    truth, _ = render(scenes, 17, 64, 64)
    pixels = ((truth.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy()
    labels = [scenes.labels(i) for i in range(4)]
    clips = []
    for i, label in enumerate(labels):
        prompt = f"a {label['size']} {label['colour']} {label['shape']}"
        ends = dict(image=pixels[i, 0], last_image=pixels[i, -1])
        clips.append(engine.generate(VideoRequest(prompt=prompt, num_inference_steps=6, seed=i, **ends)).frames)
        assert np.array_equal(clips[-1][[0, -1]], pixels[i, [0, -1]])
    assert score(clips, labels)["direction"] == 1  # of 8 measured, 8


# ---------------------------------------------------------------------------------------------------- noised sources


def test_strength_is_the_share_of_the_steps_that_are_taken(t2v: Engine) -> None:
    ticket = t2v.submit(request_of(video=CLIP[:13], strength=0.55, num_inference_steps=10))
    events = []
    while t2v.has_work():
        events += t2v.step()
    assert events[:-1] == [Progress(ticket, step, 5) for step in range(1, 6)]
    assert isinstance(events[-1], Finished) and events[-1].video.metadata.request.num_inference_steps == 10  # type: ignore[union-attr]
    assert t2v.prepare(request_of(video=CLIP[:13], strength=0.01)).num_steps == 1


def test_a_noised_source_is_as_long_as_its_video_unless_said_otherwise(t2v: Engine, tmp_path: Path) -> None:
    path = write_video(tmp_path / "source.mp4", CLIP[:9], fps=8)
    for video in (path, CLIP[:9]):
        request = request_of(video=video, strength=0.5, num_frames=None)
        assert request.resolved(t2v.defaults, t2v.limits).num_frames == 9
    assert t2v.generate(request).frames.shape == (9, 64, 64, 3)


@pytest.mark.parametrize(("solver", "difference"), [("euler", 0.0), ("unipc", 1e-5)])
def test_full_strength_is_text_to_video_but_for_the_first_noise_level(
    solver: str, difference: float, t2v: Engine
) -> None:
    plain = t2v.generate_latents(request_of(solver=solver))
    full = t2v.generate_latents(request_of(solver=solver, video=CLIP[:13], strength=1.0))
    assert float((full - plain).norm() / plain.norm()) <= difference


def test_less_strength_stays_nearer_to_the_source(t2v: Engine) -> None:
    source = t2v.encode(CLIP[:13])

    def distance(strength: float) -> float:
        request = request_of(video=CLIP[:13], strength=strength, num_inference_steps=10)
        return float((t2v.generate_latents(request) - source).norm())

    assert distance(0.1) < distance(0.5) < distance(1.0)


def test_a_source_and_a_given_frame_go_together(ti2v: Engine, i2v: Engine) -> None:
    request = request_of(video=CLIP[:13], strength=0.7, image=CLIP[16])
    assert np.array_equal(ti2v.generate(request).frames[0], CLIP[16])
    assert i2v.generate(request).frames.shape == (13, 64, 64, 3)


def test_a_shortened_schedule_keeps_guidance_experts_and_calibration_at_their_noise_levels(
    folders: dict[str, Path],
) -> None:
    engine = engine_of(folders["wan2.2-t2v-a14b"])
    asked = dict(video=CLIP[:5], guidance_scale=3.0, guidance_interval=(0.3, 0.9))
    whole = engine.prepare(small_request("magcache:threshold=0.3,warmup=1", guidance_interval=(0.3, 0.9)))
    for strength, first in ((0.5, 6), (0.25, 9)):
        t = engine.prepare(small_request("magcache:threshold=0.3,warmup=1", strength=strength, **asked))
        assert (t.num_steps, t.first_step) == (CALIBRATED_STEPS - first, first)
        assert [(plan.sigma, plan.expert) for plan in t.plans] == [(p.sigma, p.expert) for p in whole.plans[first:]]
        assert [plan.num_branches for plan in t.plans] == [p.num_branches for p in whole.plans[first:]]
        calibration = t.cache.run.calibration
        assert calibration is not None and whole.cache.run.calibration is not None
        assert calibration.magnitudes == whole.cache.run.calibration.magnitudes[first:]
        assert t.cache.mask is not None and len(t.cache.mask) == t.num_steps and t.cache.mask[0]


@pytest.mark.parametrize(
    ("cache", "trace"),
    [("fast", "1" * 6), ("budget:0.5", "100101"), ("taylorseer:interval=3,warmup=1", "100101"), ("easy:0", "1" * 6)],
)
def test_caches_count_the_steps_that_are_taken(cache: str, trace: str, t2v: Engine) -> None:
    report = t2v.generate(small_request(cache, video=CLIP[:5], strength=0.5)).metadata.cache
    assert report is not None and (report.trace, report.num_evaluations) == (trace, trace.count("1"))
    assert (report.reason == "6 steps are too few to skip any (fewest: 9)") == (cache == "fast")


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_model_of_first_and_last_frames_is_shown_both_images_by_clip_or_refuses(tmp_path: Path) -> None:
    engine = engine_of(save_checkpoint("wan2.1-flf2v", tmp_path))
    assert engine.generate(request_of(video=CLIP[:5], last_image=CLIP[16])).frames.shape == (13, 64, 64, 3)
    with pytest.raises(ValueError, match="last_image is required by model"):
        engine.submit(request_of(image=CLIP[0]))


@pytest.mark.parametrize(
    ("engine", "fields", "message"),
    [
        ("t2v", dict(video=CLIP[:5]), "video without strength is not supported by model"),
        ("t2v", dict(strength=0.5), "strength needs a video"),
        ("t2v", dict(last_image=CLIP[0]), "last_image is not supported by model"),
        ("i2v", dict(last_image=CLIP[0]), "image is required by model"),
        ("i2v", dict(video=CLIP[:13], strength=0.5), "image is required by model"),
        ("ti2v", dict(video=CLIP[:8]), r"video must have 4k\+1 frames, got 8 \(nearest: 5 or 9\)"),
        ("t2v", dict(video=CLIP[:8], strength=0.5), r"video must have 4k\+1 frames, got 8 \(nearest: 5 or 9\)"),
        ("ti2v", dict(video=CLIP[:13]), "num_frames must be above the 13 frames of video, got 13"),
        ("t2v", dict(video=CLIP[:9], strength=0.5), "num_frames must be that of video beside strength, 9, got 13"),
        ("ti2v", dict(video=CLIP[:5], image=CLIP[0]), "image must not be given beside a video that is continued"),
        (
            "ti2v",
            dict(video=CLIP[:9], last_image=CLIP[0]),
            "num_frames must be at least 17 beside the given frames, got 13",
        ),
        (
            "ti2v",
            dict(image=CLIP[0], last_image=CLIP[0], num_frames=5),
            "num_frames must be at least 9 beside the given frames, got 5",
        ),
        ("ti2v", dict(image=CLIP[0], num_frames=1), "num_frames must be at least 5 beside the given frames, got 1"),
        ("ti2v", dict(last_image=CLIP[0], num_frames=1), "last_image needs num_frames above 1, got 1"),
        ("ti2v", dict(last_image="no/last.png"), "last_image must be an existing file, got 'no/last.png'"),
        ("ti2v", dict(video="no/clip.mp4"), "video must be an existing file, got 'no/clip.mp4'"),
        ("ti2v", dict(video=CLIP[:5, :8]), "video must be at least 16x16 pixels, got 64x8"),
        ("t2v", dict(video=CLIP[:8], strength=0.5, num_frames=None), r"video must have 4k\+1 frames, got 8"),
    ],
)
def test_frames_that_do_not_fit_are_refused_at_submit(
    engine: str, fields: dict, message: str, request: pytest.FixtureRequest
) -> None:
    owner: Engine = request.getfixturevalue(engine)
    with pytest.raises(ValueError, match=message):
        owner.submit(request_of(**fields))
    assert not owner.has_work()


def test_a_video_that_is_replaced_while_its_request_waits_fails_that_request(ti2v: Engine, tmp_path: Path) -> None:
    path = write_video(tmp_path / "context.mp4", CLIP[:5], fps=8)
    ti2v.submit(request_of(video=path))
    write_video(path, CLIP, fps=8)
    events = []
    while ti2v.has_work():
        events += ti2v.step()
    assert str(events[0].error) == "video 'context.mp4' must have from 1 to 13 frames, got more"  # type: ignore[union-attr]
