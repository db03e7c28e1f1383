"""An engine takes requests that fit and refuses others with a reason; deadlines, previews, bytes that come back."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_checkpoint, with_room

from skylapse import Engine, VideoRequest
from skylapse.kernels.live_bytes import LiveBytes
from skylapse.runtime.commands.calibrate import calibrate
from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import (
    DeadlineExceeded,
    EngineFull,
    Failed,
    Finished,
    Preview,
    Progress,
    RequestTooLarge,
)
from skylapse.runtime.memory.peaks import coding_bytes, step_bytes
from skylapse.runtime.models.model import load_model
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.preview import SCALE, Previewer, fit

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-t2v", tmp_path_factory.mktemp("t2v"))


def engine_of(folder: Path, **settings: object) -> Engine:
    chosen = dataclasses.replace(load_settings(), **settings)  # type: ignore[arg-type]
    model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=chosen)
    return Engine(model, chosen)


def test_a_request_that_can_never_fit_is_refused_with_the_reason(folder: Path) -> None:
    engine = engine_of(folder, memory_bytes=64 * 2**20)
    engine.submit(VideoRequest(prompt="a star", **SMALL))
    with pytest.raises(
        RequestTooLarge, match=r"num_frames x height x width = 81 x 480 x 832 \(32760 tokens a branch\)"
    ):
        engine.submit(VideoRequest(prompt="a star", width=832, height=480, num_frames=81))


def test_requests_wait_for_memory_and_all_finish(folder: Path) -> None:
    roomy = engine_of(folder)
    trajectory = roomy.prepare(VideoRequest(prompt="a star", **SMALL))
    two = roomy.memory.work_bytes([roomy.memory.fit(trajectory.needs)] * 2) + 2 * trajectory.resident_bytes
    engine = engine_of(folder)
    engine.memory = with_room(engine.memory, two)
    tickets = [engine.submit(VideoRequest(prompt="a star", seed=k, **SMALL)) for k in range(5)]
    finished, most = set(), 0
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Finished):
                finished.add(event.ticket)
        most = max(most, len(engine._batch.active))
    assert finished == set(tickets) and most == 2


def test_more_than_max_queued_is_engine_full(folder: Path) -> None:
    engine = engine_of(folder, max_queued=2)
    first = engine.submit(VideoRequest(prompt="a star", **SMALL))
    engine.submit(VideoRequest(prompt="a star", **SMALL))
    with pytest.raises(EngineFull, match="2 requests are queued or running"):
        engine.submit(VideoRequest(prompt="a star", **SMALL))
    engine.abort(first)
    engine.submit(VideoRequest(prompt="a star", **SMALL))


def test_a_passed_deadline_fails_the_request_and_nobody_else(folder: Path) -> None:
    engine = engine_of(folder)
    late = engine.submit(VideoRequest(prompt="a star", **SMALL), deadline_s=1e-9)
    good = engine.submit(VideoRequest(prompt="a star", **SMALL))
    events = []
    while engine.has_work():
        events += [event for event in engine.step() if not isinstance(event, Progress)]
    assert [event.ticket for event in events] == [late, good]
    assert isinstance(events[0], Failed) and isinstance(events[0].error, DeadlineExceeded)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (dict(deadline_s=0), "deadline_s must be above 0, got 0"),
        (dict(preview_every=-1), "preview_every must not be negative, got -1"),
        (dict(checkpoint_every=2), "checkpoint_every needs a checkpoint_dir"),
        (dict(deadline_s="5"), "deadline_s must be above 0, got '5'"),
        (dict(deadline_s=float("nan")), "deadline_s must be above 0, got nan"),
        (dict(preview_every=1.5), r"preview_every must be a whole number, got 1\.5"),
        (dict(priority="high"), "priority must be a whole number, got 'high'"),
        (dict(tenant=["a"]), r"tenant must be a string, got \['a'\]"),
        (dict(checkpoint_dir=3), "checkpoint_dir must be a folder, got 3"),
    ],
)
def test_wrong_terms_are_refused_at_submit(terms: dict, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(folder).submit(VideoRequest(prompt="a star", **SMALL), **terms)


def test_a_checkpoint_folder_may_be_text(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    engine.submit(VideoRequest(prompt="a star", **SMALL), checkpoint_every=4, checkpoint_dir=str(tmp_path / "state"))
    while engine.has_work():
        engine.step()
    assert (tmp_path / "state" / "state.json").exists()


@pytest.mark.parametrize("cache", ["teacache", "magcache"])
def test_a_policy_without_its_calibration_is_refused_at_submit(cache: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"cache policy {cache} needs a calibration of .* 9 steps.*there: none"):
        engine_of(folder).submit(VideoRequest(prompt="a star", cache=cache, **SMALL))


def test_a_probe_deeper_than_the_model_is_refused_at_submit(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"depth of cache policy first_block must be below this model's 2 blocks, got 5"
    ):
        engine_of(folder).submit(VideoRequest(prompt="a star", cache="first_block:depth=5", **SMALL))


def test_a_preset_with_few_steps_says_in_the_result_that_it_did_nothing(folder: Path) -> None:
    asked = SMALL | dict(num_inference_steps=4)
    report = engine_of(folder).generate(VideoRequest(prompt="a star", cache="high", **asked)).metadata.cache
    assert report is not None and (report.requested, report.policy, report.trace) == ("high", "none", "1111")
    assert report.reason == "4 steps are too few to skip any (fewest: 9)"


def test_calibration_writes_what_the_policies_need_and_other_weights_make_it_stale(tmp_path: Path) -> None:
    folder = save_checkpoint("wan2.1-t2v", tmp_path / "model")
    engine = engine_of(folder)
    calibrate(engine, VideoRequest(prompt="x", **SMALL), prompts=("a star",), report=lambda line: None)
    for cache in ("teacache:0.3", "magcache", "budget:0.6"):
        report = engine_of(folder).generate(VideoRequest(prompt="a box", cache=cache, **SMALL)).metadata.cache
        assert report is not None and report.num_evaluations == report.trace.count("1")
    with pytest.raises(ValueError, match=r"for unipc, 8 steps, shift 5 .there: unipc 9 steps shift 5."):
        engine_of(folder).submit(VideoRequest(prompt="x", cache="magcache", **(SMALL | dict(num_inference_steps=8))))
    weights = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"cache.json of .* was made for other weights"):
        engine_of(folder).submit(VideoRequest(prompt="x", cache="magcache", **SMALL))


@pytest.mark.parametrize("ending", ["finish", "abort", "fail"])
@pytest.mark.parametrize("cache", ["easy:threshold=2,warmup=1", "first_block:threshold=1.2,order=1,warmup=1"])
def test_nothing_of_a_request_is_held_after_its_end(cache: str, ending: str, folder: Path) -> None:
    engine = engine_of(folder)
    ticket = engine.submit(VideoRequest(prompt="a star", cache=cache, **SMALL))
    while not engine._batch.active or engine._batch.active[ticket].steps_done < 4:
        engine.step()
    t = engine._batch.active[ticket]
    assert t.cache.num_bytes > 0 and t.num_bytes <= t.resident_bytes
    held = [weakref.ref(tensor) for tensor in (t.current, *t.cache.policy.state_tensors(t.cache.state))]
    if ending == "fail":
        t.latents = torch.full_like(t.current, float("inf"))
    del t
    if ending == "abort":
        engine.abort(ticket)
    while engine.has_work():
        engine.step()
    gc.collect()
    assert [tensor() for tensor in held] == [None] * len(held) and len(engine._batch.layouts) == 0


def test_previews_come_when_asked_for_and_show_the_clip(folder: Path) -> None:
    engine = engine_of(folder)
    request = VideoRequest(prompt="a star", **SMALL)
    engine.submit(request, preview_every=4)
    previews = []
    while engine.has_work():
        previews += [event for event in engine.step() if isinstance(event, Preview)]
    assert [event.step for event in previews] == [4, 8]
    assert previews[0].frames.shape == (2, 8 * SCALE, 8 * SCALE, 3) and previews[0].frames.dtype == np.uint8


def test_a_preview_map_is_fitted_at_submission_and_for_who_asks_for_previews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint("wan2.1-t2v", tmp_path / "model")
    fitted: list[VideoCodec] = []

    def watched(codec: VideoCodec) -> Previewer:
        fitted.append(codec)
        return fit(codec)

    monkeypatch.setattr("skylapse.runtime.vae.preview.fit", watched)
    engine = engine_of(folder)
    engine.submit(VideoRequest(prompt="a star", **SMALL))
    assert not fitted
    engine.submit(VideoRequest(prompt="a star", **SMALL), preview_every=4)
    assert fitted == [engine.model.codec] and (folder / "preview.safetensors").exists()
    while engine.has_work():
        engine.step()
    assert len(fitted) == 1


def test_the_preview_map_of_the_demo_model_shows_what_its_decoder_shows(demo_folder: Path) -> None:
    engine = Engine.from_pretrained("demo", device="cpu")
    latents = engine.generate_latents(VideoRequest(prompt="a large red circle at night", num_inference_steps=8, seed=1))
    shown = engine.previewer(latents).astype(float)
    frames = np.concatenate(list(engine.decode(latents)))[::4].astype(float)
    small = frames.reshape(*frames.shape[:1], 32, 2, 32, 2, 3).mean(axis=(2, 4))
    error = ((shown - small) ** 2).mean() ** 0.5
    assert error < 0.5 * small.std(), (error, small.std())


def test_a_preview_map_is_the_same_each_time_it_is_fitted(folder: Path) -> None:
    codec = engine_of(folder).model.codec
    assert torch.equal(fit(codec).weight, fit(codec).weight)


def test_live_bytes_counts_what_is_held_at_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
    assert live.peak_bytes == 8000 and live.live_bytes == 0


def test_peaks_foretell_a_larger_step_and_a_larger_frame(folder: Path) -> None:
    """Measures packs of 128 and 512 tokens and frames of 4 x 4 and 8 x 8 latents; foretells 2,048 and 16 x 16."""
    engine = engine_of(folder)
    peaks, codec = engine.memory.fitter.peaks, engine.model.codec
    for apart, curve in ((False, peaks.step), (True, peaks.apart)):
        assert curve.at(2048) == pytest.approx(step_bytes(engine.model.experts[0], 2, 1024, "cpu", apart), rel=0.1)
    for half, module, scale in ((peaks.decode, codec.decoder, 1), (peaks.encode, codec.encoder, codec.spatial_factor)):
        channels, frames = (codec.num_channels, 4) if scale == 1 else (3, 16)
        shapes = [(1, channels, n, 16 * scale, 16 * scale) for n in (1, frames, frames)]
        found = coding_bytes(module, shapes, torch.zeros(1))
        assert half.chunks[4].at((16 * codec.spatial_factor) ** 2) == pytest.approx(found, rel=0.1)


def test_guidance_outside_its_interval_costs_no_second_branch(folder: Path) -> None:
    engine = engine_of(folder)
    t = engine.prepare(VideoRequest(prompt="a star", guidance_scale=3.0, guidance_interval=(0.4, 0.9), **SMALL))
    guided = [plan.guidance_scale is not None for plan in t.plans]
    assert guided == [0.4 <= plan.sigma <= 0.9 for plan in t.plans] and any(guided) and not all(guided)
    asked = VideoRequest(prompt="a star", guidance_scale=3.0, **SMALL)
    whole = engine.generate_latents(dataclasses.replace(asked, guidance_interval=(0.0, 1.0)))
    assert torch.equal(whole, engine.generate_latents(asked))
