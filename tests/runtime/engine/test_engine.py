"""The engine: events, abort, failure, defaults, and what a request may ask of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.events import Failed, Finished, Progress
from skylapse.runtime.layers.pack import TextContext
from skylapse.runtime.models.text_cache import TextCache

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=3)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.from_pretrained(str(save_checkpoint("wan2.2-ti2v-5b", tmp_path_factory.mktemp("ti2v"))), device="cpu")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.from_pretrained(str(save_checkpoint("wan2.1-t2v", tmp_path_factory.mktemp("t2v"))), device="cpu")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.from_pretrained(str(save_checkpoint("wan2.1-i2v", tmp_path_factory.mktemp("i2v"))), device="cpu")


def picture(value: int = 90) -> np.ndarray:
    image = np.full((64, 64, 3), value, dtype=np.uint8)
    image[20:40, 10:30] = (200, 40, 30)
    return image


def test_steps_are_reported_one_by_one_and_then_the_video(t2v: Engine) -> None:
    ticket = t2v.submit(VideoRequest(prompt="a red circle", **SMALL))
    events = []
    while t2v.has_work():
        events += t2v.step()
    assert events[:-1] == [Progress(ticket, step, 3) for step in (1, 2, 3)]
    (finished,) = events[-1:]
    assert isinstance(finished, Finished) and finished.ticket == ticket
    assert finished.video.frames.shape == (5, 64, 64, 3) and finished.video.frames.dtype == np.uint8
    assert set(finished.video.metadata.timings_s) == {"encode", "denoise", "decode"}


def test_the_same_seed_gives_the_same_video_and_another_seed_another(t2v: Engine) -> None:
    first = t2v.generate(VideoRequest(prompt="a star", seed=4, **SMALL)).frames
    again = t2v.generate(VideoRequest(prompt="a star", seed=4, **SMALL)).frames
    other = t2v.generate(VideoRequest(prompt="a star", seed=5, **SMALL)).frames
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_aborted_request_leaves_before_its_next_step(t2v: Engine) -> None:
    ticket = t2v.submit(VideoRequest(prompt="a star", **SMALL))
    other = t2v.submit(VideoRequest(prompt="a square", **SMALL))
    while not t2v.step():
        pass  # until the first step is done
    t2v.abort(ticket)
    tickets = set()
    while t2v.has_work():
        tickets |= {event.ticket for event in t2v.step()}
    assert tickets == {other}


def test_a_failing_request_fails_alone(t2v: Engine) -> None:
    shape = t2v.model.codec.latent_shape(5, 64, 64)
    bad = t2v.submit(VideoRequest(prompt="a star", **SMALL), latents=torch.full(shape, float("nan")))
    good = t2v.submit(VideoRequest(prompt="a star", **SMALL))
    events = []
    while t2v.has_work():
        events += [event for event in t2v.step() if not isinstance(event, Progress)]
    assert [(type(event), event.ticket) for event in events] == [(Failed, bad), (Finished, good)]
    assert "not finite" in str(events[0].error)


def test_generate_raises_what_a_request_fails_with(t2v: Engine) -> None:
    shape = t2v.model.codec.latent_shape(5, 64, 64)
    with pytest.raises(FloatingPointError):
        t2v.generate(VideoRequest(prompt="a star", **SMALL), latents=torch.full(shape, float("inf")))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(4, 2, 8, 9), r"must be \[4, 2, 8, 8\] for this request, got \[4, 2, 8, 9\]"),
        (torch.zeros(4, 2, 8, 8, dtype=torch.int64), "must be floating point, got torch.int64"),
        (np.zeros((4, 2, 8, 8), np.float32), "must be a tensor, got array"),
        ("x", "must be a tensor, got 'x'"),
    ],
    ids=["shape", "whole numbers", "array", "text"],
)
def test_initial_latents_that_are_none_are_refused(latents: Any, message: str, t2v: Engine) -> None:
    with pytest.raises(ValueError, match=f"latents {message}"):
        t2v.submit(VideoRequest(prompt="a star", **SMALL), latents=latents)


def test_a_given_first_frame_is_kept_exactly(ti2v: Engine) -> None:
    request = VideoRequest(prompt="a star", image=picture(), **SMALL)
    assert np.array_equal(ti2v.generate(request).frames[0], picture())
    given = ti2v.encode(picture()[None])
    assert torch.equal(ti2v.generate_latents(request)[:, :1], given)


def test_a_given_frame_changes_the_rest_of_the_clip(ti2v: Engine) -> None:
    one = ti2v.generate(VideoRequest(prompt="a star", image=picture(90), **SMALL)).frames
    other = ti2v.generate(VideoRequest(prompt="a star", image=picture(200), **SMALL)).frames
    assert not np.array_equal(one[1:], other[1:])


@pytest.mark.parametrize(
    ("engine", "fields", "message"),
    [
        ("t2v", dict(image=picture()), "image is not supported by model"),
        ("i2v", dict(), "image is required by model"),
        ("i2v", dict(image=picture(), last_image=picture()), "last_image is not supported by model"),
        ("t2v", dict(guidance_scale_2=2.0), "guidance_scale_2 is only for models with two experts"),
        ("t2v", dict(width=72), "width must be a multiple of 16 for this model, got 72"),
        ("t2v", dict(num_frames=1025, num_inference_steps=10**6), "num_inference_steps"),
        ("ti2v", dict(height=48), "height must be a multiple of 32 for this model, got 48"),
        ("ti2v", dict(image="no/such/file.png"), "file.png"),
    ],
)
def test_what_a_model_cannot_do_is_refused_at_submit(
    engine: str, fields: dict, message: str, request: pytest.FixtureRequest
) -> None:
    owner: Engine = request.getfixturevalue(engine)
    with pytest.raises(ValueError, match=message):
        owner.submit(VideoRequest(**(dict(prompt="a star") | SMALL | fields)))
    assert not owner.has_work()


def test_guidance_of_one_runs_a_single_branch(t2v: Engine) -> None:
    request = dict(prompt="a star", **SMALL)
    plain = t2v.generate_latents(VideoRequest(guidance_scale=1.0, **request))
    ignored = t2v.generate_latents(VideoRequest(guidance_scale=1.0, negative_prompt="a circle", **request))
    guided = t2v.generate_latents(VideoRequest(guidance_scale=3.0, negative_prompt="a circle", **request))
    assert torch.equal(plain, ignored) and not torch.allclose(plain, guided)


def test_requests_with_the_same_prompt_share_its_keys_and_values(t2v: Engine) -> None:
    t2v.generate_latents(VideoRequest(prompt="a huge star falling", **SMALL))
    held = len(t2v.text_cache)
    t2v.generate_latents(VideoRequest(prompt="a huge star falling", seed=9, **SMALL))
    assert len(t2v.text_cache) == held


def test_an_evicted_prompt_is_computed_again_with_the_same_result(t2v: Engine) -> None:
    request = VideoRequest(prompt="a tiny box", **SMALL)
    expected = t2v.generate_latents(request)
    kept, t2v.text_cache = t2v.text_cache, TextCache(0)
    try:
        assert torch.equal(t2v.generate_latents(request), expected)
        assert len(t2v.text_cache) == 0 and t2v.text_cache.num_bytes == 0
    finally:
        t2v.text_cache = kept


def test_the_text_cache_counts_bytes_and_evicts_the_least_recently_used() -> None:
    def context(rows: int) -> TextContext:
        return TextContext(torch.zeros(1, 2, rows, 1, 1), torch.zeros(rows))  # 12 bytes a row

    cache = TextCache(budget_bytes=100)
    computed: list[str] = []

    def get(name: str, rows: int) -> None:
        cache.get(("0", name), lambda: computed.append(name) or context(rows))  # type: ignore[func-returns-value]

    get("a", 4)
    get("b", 4)
    get("a", 4)
    assert (computed, cache.num_bytes) == (["a", "b"], 96)
    get("c", 4)  # b leaves: a was used after it
    get("a", 4)
    get("b", 4)
    assert computed == ["a", "b", "c", "b"] and cache.num_bytes == 96
    get("too large", 100)
    assert cache.num_bytes == 96 and len(cache) == 2


def test_an_unknown_device_or_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be fp32 or bf16, got 'fp8'"):
        Engine.from_pretrained("demo", device="cpu", dtype="fp8")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'toaster'"):
        Engine.from_pretrained("demo", device="toaster")
