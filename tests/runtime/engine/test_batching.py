"""Continuous batching: what a request becomes does not depend on its neighbours, whoever joins and leaves."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import CACHES, PROMPTS, SIZES, Recorder, assert_same, draw_request, engine_of, small_request, solo
from compare import relative_l2

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.events import Finished, Progress
from skylapse.runtime.engine import denoise


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", ["wan2.1-t2v", "wan2.2-t2v-a14b"])
def test_results_equal_solo_runs_under_random_join_leave_and_resume(
    variant: str, seed: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(f"{variant} {seed}")
    together = Recorder(engine_of(folders[variant]))
    asked: dict[int, tuple[VideoRequest, int]] = {}
    requests = [draw_request(rng) for _ in range(10)]
    num_aborted = num_resumed = 0
    while requests or together.engine.has_work():
        if requests and rng.random() < 0.5:
            request, every = requests.pop(), rng.choice([0, 0, 2])
            ticket = together.engine.submit(
                request, checkpoint_every=every, checkpoint_dir=tmp_path / str(len(requests))
            )
            asked[ticket] = request, every
        together.step()
        alive = [ticket for ticket in asked if ticket in together.engine._batch.active]
        if alive and num_aborted < 2 and rng.random() < 0.05:
            victim = rng.choice(alive)
            together.engine.abort(victim)
            del asked[victim]
            num_aborted += 1
        saved = [t for t in alive if t in asked and asked[t][1] and together.trajectories[t].steps_done >= 2]
        if saved and num_resumed < 3 and rng.random() < 0.3:
            crashed = rng.choice(saved)
            together.engine.abort(crashed)  # as if its replica had died
            terms = together.trajectories[crashed].terms
            asked[together.engine.resume(terms.checkpoint_dir)] = asked.pop(crashed)
            num_resumed += 1
    assert len(asked) >= 8 - num_aborted
    finished = {event.ticket for event in together.events if isinstance(event, Finished)}
    assert finished == set(asked)
    for ticket, (request, every) in asked.items():
        alone = solo(folders[variant], request, every, tmp_path / "alone")
        assert_same(together, ticket, alone)
    assert any("0" in together.trace(ticket) for ticket in asked), "no cache skipped anything"
    assert len(together.engine._batch) == 0 and len(together.engine._batch.layouts) == 0


def test_given_frames_and_noised_sources_share_packs_with_requests_of_text_alone(folders: dict[str, Path]) -> None:
    folder = folders["wan2.2-ti2v-5b"]
    clip = np.random.default_rng(0).integers(0, 256, (13, 64, 64, 3), dtype=np.uint8)
    shown = [
        (dict(), "none"),
        (dict(image=clip[0]), CACHES[1]),
        (dict(), CACHES[2]),
        (dict(image=clip[0]), "none"),
        (dict(video=clip[:9]), "none"),
        (dict(video=clip[:5], last_image=clip[12]), CACHES[3]),
        (dict(last_image=clip[12]), CACHES[4]),
        (dict(video=clip, strength=0.7), CACHES[1]),
        (dict(video=clip, strength=0.4, image=clip[3]), "none"),
    ]
    asked = [
        VideoRequest(
            prompt=PROMPTS[k % len(PROMPTS)],
            width=64,
            height=64,
            num_frames=13,
            num_inference_steps=6,
            cache=cache,
            seed=k,
            **given,
        )
        for k, (given, cache) in enumerate(shown)
    ]
    together = Recorder(engine_of(folder))
    tickets = [together.engine.submit(request) for request in asked]
    together.run()
    for ticket, request in zip(tickets, asked, strict=True):
        assert_same(together, ticket, solo(folder, request))


def test_one_tick_advances_requests_of_several_shapes(folders: dict[str, Path]) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    for width, height, num_frames in SIZES:
        together.engine.submit(
            VideoRequest(prompt="a star", width=width, height=height, num_frames=num_frames, num_inference_steps=12)
        )
    most = 0
    while together.engine.has_work():
        events = together.step()
        most = max(most, len({event.ticket for event in events if isinstance(event, Progress)}))
    assert most == len(SIZES)


def test_a_one_frame_request_behind_a_50_step_one_finishes_first(folders: dict[str, Path]) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    size = dict(width=64, height=64)
    long = together.engine.submit(VideoRequest(prompt="a star", num_frames=33, num_inference_steps=50, **size))
    while not any(isinstance(event, Progress) for event in together.events):
        together.step()
    short = together.engine.submit(VideoRequest(prompt="a box", num_frames=1, num_inference_steps=4, **size))
    together.run()
    assert [event.ticket for event in together.events if isinstance(event, Finished)] == [short, long]


@pytest.mark.parametrize("cache", ["easy:0", "first_block:0", "teacache:0", "magcache:0", "taylorseer:1", "budget:1"])
def test_a_cache_that_may_not_skip_equals_no_cache_to_the_bit(cache: str, folders: dict[str, Path]) -> None:
    engine = engine_of(folders["wan2.1-t2v"])
    plain = engine.generate_latents(small_request())
    assert torch.equal(engine.generate_latents(small_request(cache)), plain)


@pytest.mark.parametrize("cache", CACHES)
def test_a_replayed_composition_is_bit_identical(cache: str, folders: dict[str, Path]) -> None:
    def run() -> list[torch.Tensor]:
        together = Recorder(engine_of(folders["wan2.1-t2v"]))
        for k in range(3):
            together.engine.submit(small_request(cache, k, prompt=PROMPTS[k]))
            together.step()
        together.run()
        return [together.latents(ticket) for ticket in (1, 2, 3)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_experts_never_share_a_pack_or_a_cache(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = denoise.evaluate
    seen: list[set[int]] = []

    def watched(model, members, layouts, apart=False):  # type: ignore[no-untyped-def]
        seen.append({t.plan.expert for t in members})
        for t in members:
            if t.steps_done and t.plan.expert != t.plans[t.steps_done - 1].expert:
                assert t.cache.must_compute() and t.cache.state is None
        return whole(model, members, layouts, apart)

    monkeypatch.setattr("skylapse.runtime.engine.batch.evaluate", watched)
    together = Recorder(engine_of(folders["wan2.2-t2v-a14b"]))
    for k, cache in enumerate(CACHES):
        together.engine.submit(small_request(cache, k))
        together.step()
    together.run()
    assert all(len(experts) == 1 for experts in seen) and {*seen[0], *seen[-1]} == {0, 1}


def test_bf16_differs_from_its_solo_run_by_rounding_alone(folders: dict[str, Path]) -> None:
    """The floor that packs leave in bf16: products of another shape round otherwise, and nothing else may differ."""

    def run(dtype: str, *asked: VideoRequest) -> Recorder:
        recorder = Recorder(Engine.from_pretrained(str(folders["wan2.1-t2v"]), device="cpu", dtype=dtype))
        for request in asked:
            recorder.engine.submit(request)
        recorder.run()
        return recorder

    caches = ["none", "easy:threshold=2,warmup=1", "none", "easy:threshold=2,warmup=1"]
    asked = [
        small_request(cache, seed=k, prompt=PROMPTS[k], width=width, height=height, num_frames=num_frames)
        for k, (cache, (width, height, num_frames)) in enumerate(zip(caches, SIZES, strict=False))
    ]
    together = run("bf16", *asked)
    num_evaluations = sum(t.cache.trace.count("1") for t in together.trajectories.values())
    assert together.engine.pack_stats[0] < num_evaluations / 2  # they did share packs
    for ticket, request in enumerate(asked, 1):
        alone, exact = run("bf16", request), run("fp32", request)
        assert together.trace(ticket) == alone.trace(1) == exact.trace(1)
        assert ("0" in alone.trace(1)) == (request.cache != "none")
        floor = relative_l2(alone.latents(1), exact.latents(1))  # what bf16 itself costs
        assert relative_l2(together.latents(ticket), alone.latents(1)) < floor  # measured: 0 and 2e-2


def test_packs_and_their_tokens_are_counted(folders: dict[str, Path]) -> None:
    engine = engine_of(folders["wan2.1-t2v"])
    assert engine.pack_stats == (0, 0)
    together = Recorder(engine)
    ticket = together.engine.submit(small_request("budget:0.5", guidance_interval=(0.3, 0.9)))
    together.run()
    t = together.trajectories[ticket]
    branches = [plan.num_branches for plan, mark in zip(t.plans, t.cache.trace, strict=True) if mark == "1"]
    assert engine.pack_stats == (len(branches), t.num_tokens * sum(branches)) and {*branches} == {1, 2}
