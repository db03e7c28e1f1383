"""Requests: bounds, errors that name the field, defaults and limits of a model."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from skylapse.runtime.core.request import ModelDefaults, ModelLimits, Video, VideoRequest, longest_seconds

DEFAULTS = ModelDefaults(width=64, height=48, num_frames=17, fps=8, num_inference_steps=30, guidance_scale=4.0)
LIMITS = ModelLimits(size_multiple=16, max_num_frames=81, max_pixels=128 * 128)
PIXELS = np.zeros((32, 48, 3), np.uint8)


def test_prompt_alone_is_a_request() -> None:
    request = VideoRequest(prompt="a red circle")
    assert (request.negative_prompt, request.seed, request.cache, request.width) == ("", 0, "none", None)


def test_request_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VideoRequest(prompt="a red circle").seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x" * 10_000},
        {"width": 16, "height": 4096},
        {"num_frames": 1},
        {"num_frames": 1025},
        {"fps": 120},
        {"num_inference_steps": 1000},
        {"guidance_scale": 0},
        {"guidance_scale": 100.0, "guidance_scale_2": 1},
        {"solver": "dpmpp"},
        {"shift": 1e-3},
        {"seed": 2**63 - 1},
        {"image": "first.png", "last_image": Path("last.png")},
        {"image": PIXELS},
        {"image": Image.fromarray(PIXELS)},
        {"video": PIXELS[None], "strength": 1.0},
        {"cache": None},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_every_bound_itself_is_allowed(fields: dict[str, Any]) -> None:
    VideoRequest(**{"prompt": "a red circle", **fields})


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": ""}, "prompt must not be empty, got ''"),
        ({"prompt": " \n"}, r"prompt must not be empty, got ' \n'"),
        ({"prompt": None}, "prompt must be a string, got None"),
        ({"prompt": "x" * 10_001}, "prompt must have at most 10000 characters, got 10001"),
        ({"prompt": "a\0b"}, "prompt must not contain NUL, got one at character 1"),
        ({"prompt": "caf\udce9"}, "prompt must be valid Unicode, got a broken character at 3"),
        ({"negative_prompt": "x" * 10_001}, "negative_prompt must have at most 10000 characters, got 10001"),
        ({"width": 8}, "width must be from 16 to 4096, got 8"),
        ({"width": 70}, "width must be a multiple of 8 (of 32 to suit every model), got 70"),
        ({"height": 4104}, "height must be from 16 to 4096, got 4104"),
        ({"height": 64.0}, "height must be a whole number, got 64.0"),
        ({"height": True}, "height must be a whole number, got True"),
        ({"num_frames": 0}, "num_frames must be from 1 to 1025, got 0"),
        ({"num_frames": 1029}, "num_frames must be from 1 to 1025, got 1029"),
        ({"num_frames": 16}, "num_frames must be 4k+1, got 16"),
        ({"num_frames": "17"}, "num_frames must be a whole number, got '17'"),
        ({"fps": 0}, "fps must be from 1 to 120, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 1000, got 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be from 1 to 1000, got 1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be from 0 to 100, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be from 0 to 100, got inf"),
        ({"guidance_scale": -1}, "guidance_scale must be from 0 to 100, got -1"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number, got '4'"),
        ({"guidance_scale_2": 101}, "guidance_scale_2 must be from 0 to 100, got 101"),
        ({"shift": 0.0}, "shift must be above 0 and at most 100, got 0.0"),
        ({"shift": float("nan")}, "shift must be above 0 and at most 100, got nan"),
        ({"solver": "ddim"}, "solver must be unipc or euler or dpmpp, got 'ddim'"),
        ({"solver": ["unipc"]}, "solver must be unipc or euler or dpmpp, got ['unipc']"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be from 0 to 9223372036854775807, got 9223372036854775808"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"image": 7}, "image must be a path, a PIL image or a uint8 array, got 7"),
        ({"image": PIXELS / 255}, "image must be uint8 [height, width, 3], got float64 [32, 48, 3]"),
        ({"last_image": PIXELS[None]}, "last_image must be uint8 [height, width, 3], got uint8 [1, 32, 48, 3]"),
        ({"video": PIXELS}, "video must be uint8 [frames, height, width, 3], got uint8 [32, 48, 3]"),
        ({"video": 7}, "video must be a path or a uint8 array, got 7"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.01}, "strength must be above 0 and at most 1, got 1.01"),
        (
            {"cache": "faster"},
            "cache must be high, balanced, fast, none, easy, first_block, teacache, magcache, taylorseer, budget, "
            "got 'faster'",
        ),
        ({"cache": "easy:-1"}, "threshold of cache policy easy must be from 0 to 10, got -1"),
        ({"cache": "easy:much"}, "threshold of cache policy easy must be a number, got 'much'"),
        ({"cache": "easy:max_skips=1.5"}, "max_skips of cache policy easy must be a whole number, got '1.5'"),
        (
            {"cache": "first_block:width=3"},
            "cache policy first_block has no parameter 'width' (it has: threshold, depth, order, max_skips, warmup)",
        ),
        ({"cache": "budget:2"}, "share of cache policy budget must be from 0.05 to 1, got 2"),
        ({"cache": 3}, "cache must be a string, got 3"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval must be (low, high), got (0.8, 0.2)"),
        ({"guidance_interval": 0.5}, "guidance_interval must be a pair of noise levels (low, high), got 0.5"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_field_out_of_bounds_is_named_with_its_value_and_what_is_allowed(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        VideoRequest(**{"prompt": "a red circle", **fields})
    assert str(caught.value) == error


def test_a_huge_wrong_value_is_shown_short() -> None:
    with pytest.raises(ValueError) as caught:
        VideoRequest(prompt=["a red circle"] * 100_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_resolved_request_has_the_models_defaults_where_nothing_was_asked() -> None:
    request = VideoRequest(prompt="a red circle", width=96, guidance_scale=0.0, cache=None).resolved(DEFAULTS, LIMITS)
    assert request.size == (96, 48, 17)
    assert (request.fps, request.num_inference_steps, request.guidance_scale, request.cache) == (8, 30, 0.0, "none")
    assert request.resolved(DEFAULTS, LIMITS) == request


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"width": 72}, "width must be a multiple of 16 for this model, got 72 (nearest: 64 or 80)"),
        ({"height": 88}, "height must be a multiple of 16 for this model, got 88 (nearest: 80 or 96)"),
        ({"num_frames": 85}, "num_frames must be at most 81 for this model, got 85"),
        (
            {"width": 256, "height": 80},
            "width x height must be at most 16384 pixels for this model, got 256x80 (20480)",
        ),
    ],
)
def test_request_beyond_the_model_is_refused(fields: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError) as caught:
        VideoRequest(prompt="a red circle", **fields).resolved(DEFAULTS, LIMITS)  # type: ignore[arg-type]
    assert str(caught.value) == error


def test_only_possible_sizes_are_called_nearest() -> None:
    limits = dataclasses.replace(LIMITS, size_multiple=32)
    with pytest.raises(ValueError, match=r"\(nearest: 32\)$"):
        VideoRequest(prompt="a red circle", width=24).resolved(DEFAULTS, limits)


@pytest.mark.parametrize("limits", [LIMITS, dataclasses.replace(LIMITS, size_multiple=32, temporal_multiple=8)])
def test_whatever_is_called_nearest_is_taken(limits: ModelLimits) -> None:
    """Every side and length that a model refuses as no multiple; what it names instead it then makes."""
    named = 0
    for field, values in (
        ("width", range(16, 4097, 8)),
        ("height", range(16, 300, 8)),
        ("num_frames", range(1, 99, 4)),
    ):
        for value in values:
            fields = {"width": 64, "height": 64, "num_frames": 17, field: value}
            with suppress(ValueError):
                VideoRequest(prompt="a red circle", **fields).resolved(DEFAULTS, limits)
                continue
            with pytest.raises(ValueError) as caught:
                VideoRequest(prompt="a red circle", **fields).resolved(DEFAULTS, limits)
            _, _, nearest = str(caught.value).partition("(nearest: ")
            for near in nearest.rstrip(")").split(" or ") if nearest else ():
                VideoRequest(prompt="a red circle", **fields | {field: int(near)}).resolved(DEFAULTS, limits)
                named += 1
    assert named > 10


@pytest.mark.parametrize(("num_frames", "fps"), [(1025, 30), (81, 16), (81, 7), (33, 8), (1025, 120)])
def test_the_longest_clip_that_is_told_is_not_too_long(num_frames: int, fps: int) -> None:
    told = float(longest_seconds(num_frames, fps))
    assert num_frames / fps - 0.001 < told <= num_frames / fps


def test_num_frames_follow_the_models_temporal_compression() -> None:
    limits = dataclasses.replace(LIMITS, temporal_multiple=8)
    with pytest.raises(ValueError, match=r"num_frames must be 8k\+1 for this model, got 13 \(nearest: 9 or 17\)"):
        VideoRequest(prompt="a red circle", num_frames=13).resolved(DEFAULTS, limits)


def test_video_knows_its_shape_and_duration() -> None:
    video = Video(np.zeros((17, 32, 48, 3), np.uint8), fps=8)
    assert (video.num_frames, video.width, video.height, video.duration_s) == (17, 48, 32, 2.125)


def test_saved_video_is_where_it_was_asked_for(tmp_path: Path) -> None:
    path = Video(np.zeros((5, 32, 48, 3), np.uint8), fps=8).save(tmp_path / "black.mp4")
    assert path == tmp_path / "black.mp4"
    assert list(tmp_path.iterdir()) == [path]
