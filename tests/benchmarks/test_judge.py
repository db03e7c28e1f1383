"""The demo model's judge reads rendered clips without an error, degraded ones nearly so, and can say no."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skylapse.benchmarks.demo_model.judge import ATTRIBUTES, judge, score
from skylapse.benchmarks.demo_model.scenes import BACKGROUNDS, COLOURS, Scenes, background, draw_scenes, render

Labels = list[dict[str, str]]


def rendered(count: int, num_frames: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Labels]:
    """Clips [B, 3, T, H, W], 0 to 255, and what they show."""
    scenes = draw_scenes(count, torch.Generator().manual_seed(seed))
    return (render(scenes, num_frames, height, width)[0] + 1) * 127.5, [scenes.labels(i) for i in range(count)]


def as_frames(clips: Tensor) -> list[Tensor]:
    return list(clips.round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1))


def degraded(clips: Tensor, seed: int = 1) -> Tensor:
    """Blurred (sigma 0.8), contrast 0.9, colours shifted by up to 10, noise of 6: worse than a generator's faults."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.exp(-torch.arange(-3, 4.0).square() / (2 * 0.8**2))
    kernel /= kernel.sum()
    flat = F.pad(clips.flatten(0, 2)[:, None], (3, 3, 3, 3), mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None])
    blurred = (flat.reshape(clips.shape) - 127.5) * 0.9 + 127.5
    shift = (torch.rand(len(clips), 3, 1, 1, 1, generator=generator) * 2 - 1) * 10
    return blurred + shift + 6 * torch.randn(clips.shape, generator=generator)


@pytest.mark.parametrize(
    ("count", "num_frames", "height", "width"),
    [(160, 17, 64, 64), (120, 17, 64, 96), (120, 17, 96, 64), (40, 9, 64, 64), (20, 33, 64, 64), (40, 2, 64, 64)],
)
def test_rendered_clips_are_read_without_an_error(count: int, num_frames: int, height: int, width: int) -> None:
    clips, labels = rendered(count, num_frames, height, width, seed=num_frames + height)
    assert score(as_frames(clips), labels) == dict.fromkeys(ATTRIBUTES, 1.0)


def test_degraded_clips_are_read_nearly_always() -> None:
    clips, labels = rendered(150, 17, 64, 64, seed=3)
    accuracy = score(as_frames(degraded(clips)), labels)
    assert min(accuracy.values()) >= 0.97, accuracy


def test_all_colours_are_told_apart_on_all_backgrounds() -> None:
    count = len(COLOURS) * len(BACKGROUNDS)
    scenes = draw_scenes(count, torch.Generator().manual_seed(4))
    every = torch.arange(count)
    scenes = replace(scenes, colour=every % len(COLOURS), background=every // len(COLOURS))
    clips = render(scenes, 5, 64, 64)[0]
    labels = [scenes.labels(i) for i in range(count)]
    assert score(as_frames((clips + 1) * 127.5), labels) == dict.fromkeys(ATTRIBUTES, 1.0)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_clip_without_a_shape_has_a_background_and_nothing_else(name: str) -> None:
    clip = ((background(name, 64, 64) + 1) * 127.5)[None, :, None].expand(1, 3, 9, 64, 64)
    assert judge(as_frames(clip)[0]) == {**dict.fromkeys(ATTRIBUTES), "background": name}


def test_noise_is_not_read_at_all() -> None:
    noise = torch.randint(256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert judge(noise) == dict.fromkeys(ATTRIBUTES)


def test_a_shape_of_no_known_form_is_not_named() -> None:
    clip = ((background("on gray", 64, 64) + 1) * 127.5)[None, :, None].repeat(1, 1, 9, 1, 1)
    clip[..., 30:34, 10:54] = 250.0  # a long bar
    reading = judge(as_frames(clip)[0])
    assert (reading["shape"], reading["colour"], reading["direction"]) == (None, "white", "standing still")


def test_a_wrong_label_counts_as_wrong_and_an_absent_one_is_not_asked() -> None:
    clips, labels = rendered(4, 5, 64, 64)
    labels[0] = {**labels[0], "shape": "circle" if labels[0]["shape"] != "circle" else "star"}
    del labels[1]["size"]
    accuracy = score(as_frames(clips), labels)
    assert accuracy == {**dict.fromkeys(ATTRIBUTES, 1.0), "shape": 0.75}


def test_each_attribute_can_be_failed() -> None:
    clips, labels = rendered(30, 5, 64, 64, seed=5)
    shuffled = [labels[(i + 1) % 30] for i in range(30)]  # another clip's prompt
    accuracy = score(as_frames(clips), shuffled)
    assert max(accuracy.values()) < 0.8, accuracy


def still(travel: float) -> Scenes:
    scenes = draw_scenes(6, torch.Generator().manual_seed(6))
    return replace(scenes, direction=torch.full((6,), 4), travel=torch.full((6,), travel))


def test_a_shape_that_drifts_by_a_pixel_stands_still() -> None:
    clips = render(still(0.0), 9, 64, 64)[0]
    frames = [frame.clone() for frame in as_frames((clips + 1) * 127.5)]
    for frame in frames:
        frame[5:] = frame[5:].roll(1, dims=2)
    assert [judge(frame)["direction"] for frame in frames] == ["standing still"] * 6


def test_numpy_and_torch_frames_read_alike() -> None:
    clips, _ = rendered(1, 5, 64, 64)
    frames = as_frames(clips)[0]
    assert judge(frames) == judge(frames.numpy())


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (5, 3, 64, 64), (64, 64, 3)])
def test_what_is_no_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        judge(torch.zeros(shape, dtype=torch.uint8))
