"""Streams: events in asyncio while steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path

import pytest
from tiny import save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.events import DeviceLost, Event, Failed, Finished, Progress
from skylapse.runtime.engine.trajectory import Trajectory

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-t2v", tmp_path_factory.mktemp("t2v"))


@pytest.fixture
def engine(folder: Path):  # type: ignore[no-untyped-def]
    engine = Engine.from_pretrained(str(folder), device="cpu")
    yield engine
    engine.close()


async def collect(engine: Engine, request: VideoRequest) -> list[Event]:
    return [event async for event in engine.stream(request)]


def test_streams_run_side_by_side_and_each_gets_its_own_events(engine: Engine) -> None:
    async def main() -> list[list[Event]]:
        requests = [VideoRequest(prompt="a star", seed=k, **SMALL) for k in range(3)]
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    for events in asyncio.run(main()):
        assert len({event.ticket for event in events}) == 1
        assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3, 4]
        assert isinstance(events[-1], Finished)


def test_the_event_loop_goes_on_while_a_step_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is held until the loop has turned a hundred times: were it run in the loop, neither could go on."""
    turned = threading.Event()
    whole = engine._batch.tick

    def slow() -> list[Event]:
        assert turned.wait(20)
        return whole()

    monkeypatch.setattr(engine._batch, "tick", slow)

    async def main() -> list[Event]:
        task = asyncio.create_task(collect(engine, VideoRequest(prompt="a star", **SMALL)))
        for _ in range(100):
            await asyncio.sleep(0)
        turned.set()
        return await task

    assert isinstance(asyncio.run(main())[-1], Finished)


def test_leaving_a_stream_aborts_its_request(engine: Engine) -> None:
    async def main() -> None:
        stream = engine.stream(VideoRequest(prompt="a star", **(SMALL | dict(num_inference_steps=900))))
        async for event in stream:
            if isinstance(event, Progress):
                break
        await stream.aclose()
        other = await collect(engine, VideoRequest(prompt="a box", **SMALL))
        assert isinstance(other[-1], Finished)

    asyncio.run(main())
    assert not engine.has_work() and not engine._listeners


def test_events_of_a_step_during_which_a_stream_is_left_are_not_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second tick that has events is held until the stream is left, so that they have nobody to go to."""
    stepped, left = threading.Event(), threading.Event()
    whole, steps = engine._batch.tick, itertools.count()

    def held() -> list[Event]:
        events = whole()
        if events and next(steps) == 1:
            stepped.set()
            assert left.wait(20)
        return events

    monkeypatch.setattr(engine._batch, "tick", held)

    async def main() -> None:
        stream = engine.stream(VideoRequest(prompt="a star", **SMALL))
        await anext(stream)
        assert await asyncio.to_thread(stepped.wait, 20)
        await stream.aclose()
        left.set()

    asyncio.run(main())
    engine.close()
    assert not engine.has_work() and not engine._listeners


def test_a_stream_that_is_left_while_it_submits_leaves_no_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submission is held in its thread until the stream is gone; nobody would ever ask for what it submits."""
    joining, left = threading.Event(), threading.Event()
    whole = engine._join

    def held(trajectory: Trajectory) -> int:
        joining.set()
        assert left.wait(20)
        return whole(trajectory)

    monkeypatch.setattr(engine, "_join", held)

    async def main() -> None:
        task = asyncio.create_task(collect(engine, VideoRequest(prompt="a star", **SMALL)))
        assert await asyncio.to_thread(joining.wait, 20)
        task.cancel()
        assert isinstance(*await asyncio.gather(task, return_exceptions=True), asyncio.CancelledError)
        left.set()

    asyncio.run(main())
    engine.close()
    assert not engine.has_work() and not engine._listeners


def test_a_request_that_is_refused_raises_in_the_stream(engine: Engine) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="width must be a multiple of 16"):
            await collect(engine, VideoRequest(prompt="a star", **(SMALL | dict(width=72))))

    asyncio.run(main())
    assert not engine._listeners


def test_generate_works_beside_streams(engine: Engine) -> None:
    async def main() -> tuple[list[Event], object]:
        request = VideoRequest(prompt="a star", **SMALL)
        events = asyncio.create_task(collect(engine, request))
        video = await asyncio.to_thread(engine.generate, VideoRequest(prompt="a box", **SMALL))
        return await events, video

    events, video = asyncio.run(main())
    assert isinstance(events[-1], Finished) and video.frames.shape == (5, 64, 64, 3)  # type: ignore[attr-defined]


def test_a_lost_device_is_told_to_everyone_who_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Event]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine._batch, "tick", broken)

    events = asyncio.run(collect(engine, VideoRequest(prompt="a star", **SMALL)))
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, DeviceLost)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        engine.submit(VideoRequest(prompt="a star", **SMALL))
