"""A request that fails, fails alone: poison, out of memory, errors of a request's own and of the engine's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import CACHES, Recorder, assert_same, draw_request, engine_of, small_request, solo

from skylapse import VideoRequest
from skylapse.runtime.core.events import Failed, Finished, NotFinite, OutOfMemory
from skylapse.runtime.engine import denoise
from skylapse.runtime.engine.scheduler import Work


@pytest.mark.parametrize("cache", CACHES)
def test_a_poisoned_request_reaches_no_neighbour(cache: str, folders: dict[str, Path]) -> None:
    """NaN in one request's latents spreads through anything that is shared; its neighbour must not notice."""
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    poisoned = together.engine.submit(small_request(cache, 1, prompt="a box"))
    request = small_request(cache, 2)
    healthy = together.engine.submit(request)
    while healthy not in together.trajectories or together.trajectories[healthy].steps_done < 1:
        together.step()
    assert together.trajectories[poisoned].stage == "denoise"
    together.trajectories[poisoned].latents = torch.full_like(together.trajectories[poisoned].current, float("nan"))
    together.run()
    assert_same(together, healthy, solo(folders["wan2.1-t2v"], request))
    (failed,) = [event for event in together.events if isinstance(event, Failed)]
    assert failed.ticket == poisoned and isinstance(failed.error, NotFinite)
    assert "not finite after step" in str(failed.error)


def test_the_first_of_several_skipped_steps_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    ticket = together.engine.submit(small_request("taylorseer:interval=6,warmup=1"))
    while ticket not in together.trajectories or together.trajectories[ticket].steps_done < 1:
        together.step()
    t = together.trajectories[ticket]
    predict = t.cache.predict

    def poisoned(sigma: float, base: Any) -> Any:
        return tuple(tensor * float("nan" if t.steps_done >= 2 else 1) for tensor in predict(sigma, base))

    monkeypatch.setattr(t.cache, "predict", poisoned)
    together.run()
    (failed,) = [event for event in together.events if isinstance(event, Failed)]
    assert str(failed.error) == "latents are not finite after step 3" and t.cache.trace.startswith("100000")


def test_cached_state_of_a_request_is_its_own_memory(folders: dict[str, Path]) -> None:
    """A view into a pack would keep every neighbour's tokens alive, and show them to whoever reads past it."""
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    for k, cache in enumerate(CACHES * 2):
        together.engine.submit(small_request(cache, k, guidance_scale=1.0 + 2 * (k % 2)))
    checked = 0
    while together.engine.has_work():
        together.step()
        for t in together.engine._batch.active.values():
            if t.cache.state:
                for tensor in (*t.cache.policy.state_tensors(t.cache.state), t.current):
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
                    checked += 1
    assert checked > 100


def test_out_of_memory_splits_the_pack_and_everyone_finishes(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = denoise.evaluate
    refused = []

    def small_device(model, members, layouts, apart=False):  # type: ignore[no-untyped-def]
        if len(members) > 2:
            refused.append(len(members))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(model, members, layouts, apart)

    monkeypatch.setattr("skylapse.runtime.engine.batch.evaluate", small_device)
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    rng = random.Random(5)
    requests = [draw_request(rng) for _ in range(5)]
    tickets = [together.engine.submit(request) for request in requests]
    together.run()
    assert refused and {e.ticket for e in together.events if isinstance(e, Finished)} == set(tickets)
    monkeypatch.undo()
    for ticket, request in zip(tickets, requests, strict=True):
        assert_same(together, ticket, solo(folders["wan2.1-t2v"], request))


def test_who_does_not_fit_alone_fails_alone_with_a_typed_error(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = denoise.evaluate

    def tiny_device(model, members, layouts, apart=False):  # type: ignore[no-untyped-def]
        if any(t.request.prompt == "a box" for t in members):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(model, members, layouts, apart)

    monkeypatch.setattr("skylapse.runtime.engine.batch.evaluate", tiny_device)
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    small = dict(width=64, height=64, num_frames=5, num_inference_steps=3)
    tickets = [together.engine.submit(VideoRequest(prompt=prompt, **small)) for prompt in ("a star", "a box", "a ring")]
    together.run()
    failed = {event.ticket: event.error for event in together.events if isinstance(event, Failed)}
    assert set(failed) == {tickets[1]} and isinstance(failed[tickets[1]], OutOfMemory)
    assert {event.ticket for event in together.events if isinstance(event, Finished)} == {tickets[0], tickets[2]}


@pytest.mark.parametrize("broken", ["predict", "commit", "advance"])
def test_an_error_in_a_requests_own_part_of_a_step_is_its_own(
    broken: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    small = dict(width=64, height=64, num_frames=5, num_inference_steps=8, cache="taylorseer:2")
    bad, good = (together.engine.submit(VideoRequest(prompt=prompt, **small)) for prompt in ("a box", "a star"))
    while bad not in together.engine._batch.active:
        together.step()

    def fails(*arguments: object) -> None:
        raise RuntimeError("this request is cursed")

    t = together.engine._batch.active[bad]
    monkeypatch.setattr(t if broken == "advance" else t.cache, broken, fails)
    together.run()
    failed = {event.ticket: str(event.error) for event in together.events if isinstance(event, Failed)}
    assert failed == {bad: "this request is cursed"}
    assert [event.ticket for event in together.events if isinstance(event, Finished)] == [good]


def test_the_engine_survives_an_error_of_its_own(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    small = dict(width=64, height=64, num_frames=5, num_inference_steps=3)
    first = together.engine.submit(VideoRequest(prompt="a box", **small))
    scheduler = together.engine._batch.scheduler
    pick = scheduler.pick

    def fails_once(*arguments: object) -> None:
        monkeypatch.setattr(scheduler, "pick", pick)
        raise KeyError("a bug")

    monkeypatch.setattr(scheduler, "pick", fails_once)
    together.run()
    second = together.engine.submit(VideoRequest(prompt="a star", **small))
    together.run()
    ends = [(type(event), event.ticket) for event in together.events if isinstance(event, Failed | Finished)]
    assert ends == [(Failed, first), (Finished, second)]


def test_who_finishes_in_a_tick_that_breaks_is_told_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    first = together.engine.submit(small_request(num_inference_steps=2))
    second = together.engine.submit(small_request(prompt="a box"))
    scheduler = together.engine._batch.scheduler
    pick = scheduler.pick

    def fails_beside_the_end(works: list[Work], room: int) -> list[int]:
        if first not in together.engine._batch.active:
            raise KeyError("a bug")
        return pick(works, room)

    monkeypatch.setattr(scheduler, "pick", fails_beside_the_end)
    together.run()
    ends = [(type(event), event.ticket) for event in together.events if isinstance(event, Failed | Finished)]
    assert ends == [(Finished, first), (Failed, second)]


def test_an_error_that_comes_back_at_every_tick_ends_in_failures(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))

    def fails(*arguments: object) -> None:
        raise KeyError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(together.engine._batch.scheduler, "rank", fails)
        tickets = [together.engine.submit(small_request(seed=k)) for k in range(2)]
        for _ in range(3):
            together.step()
    assert not together.engine.has_work()
    assert [(type(event), event.ticket) for event in together.events] == [(Failed, ticket) for ticket in tickets]
    healthy = together.engine.submit(small_request())
    together.run()
    assert any(isinstance(event, Finished) and event.ticket == healthy for event in together.events)


@pytest.mark.parametrize("broken", ["preview", "checkpoint"])
def test_a_preview_or_checkpoint_that_cannot_be_made_fails_its_request_alone(
    broken: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = Recorder(engine_of(folders["wan2.1-t2v"]))
    terms = dict(preview_every=2) if broken == "preview" else dict(checkpoint_every=2, checkpoint_dir=tmp_path)
    bad = together.engine.submit(small_request(), **terms)
    good = together.engine.submit(small_request(prompt="a box"))

    def fails(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(together.engine, "previewer", fails)
    monkeypatch.setattr("skylapse.runtime.engine.batch.save_trajectory", fails)
    together.run()
    failed = {event.ticket: event.error for event in together.events if isinstance(event, Failed)}
    assert set(failed) == {bad} and isinstance(failed[bad], OutOfMemory)
    assert [event.ticket for event in together.events if isinstance(event, Finished)] == [good]
