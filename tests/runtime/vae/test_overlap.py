"""Chunks on a lane of their own: one ahead of who asks, behind what they read, equal to those without one."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import with_room
from torch import Tensor

from skylapse import Engine, VideoRequest
from skylapse.runtime.vae import overlap
from skylapse.runtime.vae.overlap import CudaLane, overlapped

CPU = torch.device("cpu")


class Recorded:
    """A lane that notes what is queued and what is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.inside = False
        self.count = 0

    def follow(self, *inputs: Tensor) -> None:
        self.log.append(f"follow {len(inputs)}")

    @contextmanager
    def section(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def fetch(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        assert self.inside
        name, self.count = self.count, self.count + 1
        self.log.append(f"queue {name}")

        def wait() -> np.ndarray:
            assert not self.inside
            self.log.append(f"wait {name}")
            return tensor.numpy()

        return wait


def test_next_chunk_is_queued_before_the_last_one_is_waited_for() -> None:
    lane = Recorded()
    chunks = overlapped(iter([torch.tensor([index]) for index in range(3)]), lane, torch.zeros(1))
    for index, chunk in enumerate(chunks):
        assert chunk.tolist() == [index] and not lane.inside
        lane.log.append(f"step {index}")
    assert lane.log == [
        *("follow 1", "queue 0", "queue 1", "wait 0", "step 0"),
        *("queue 2", "wait 1", "step 1"),
        *("wait 2", "step 2"),
    ]
    assert list(overlapped(iter(()), Recorded())) == []


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo", device="cpu")


@pytest.fixture
def lane(engine: Engine) -> Iterator[Recorded]:
    made = Recorded()
    engine.__dict__.pop("memory", None)  # it knows whether there is a lane
    engine.model.codec.lane = made
    yield made
    engine.model.codec.lane = None


def test_frames_are_the_same_and_steps_of_others_come_between(engine: Engine, lane: Recorded) -> None:
    latents = torch.randn(48, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    beside = list(engine.decode(latents))
    engine.model.codec.lane = None
    assert [len(chunk) for chunk in beside] == [1, 16, 4]
    assert all(np.array_equal(a, b) for a, b in zip(beside, engine.decode(latents), strict=True))
    assert lane.log[:4] == ["follow 1", "queue 0", "queue 1", "wait 0"]


def test_request_that_leaves_while_a_chunk_is_queued_is_forgotten(engine: Engine, lane: Recorded) -> None:
    ticket = engine.submit(VideoRequest(prompt="a star", num_inference_steps=1, num_frames=33, guidance_scale=1.0))
    while "wait 0" not in lane.log:
        engine.step()
    engine.abort(ticket)
    assert not engine.step() and not engine.has_work() and "wait 1" not in lane.log


def test_admission_counts_a_step_and_a_chunk_together(engine: Engine, lane: Recorded) -> None:
    t, memory = engine.prepare(VideoRequest(prompt="a star")), engine.memory
    fit = memory.fit(t.needs)
    work = fit.work_bytes
    assert memory.parallel and memory.work_bytes([fit]) == work["step"] + work["decode"]
    assert dataclasses.replace(memory, parallel=False).work_bytes([fit]) == max(work[stage] for stage in t.needs.stages)


def test_chunk_is_not_decoded_beside_steps_where_memory_is_too_short(engine: Engine, lane: Recorded) -> None:
    request = VideoRequest(prompt="a star", num_inference_steps=1, guidance_scale=1.0)
    t, fitter = engine.prepare(request), engine.memory.fitter
    peaks = dataclasses.replace(fitter.peaks, text=0)  # the demo model's text takes more than a step and a chunk
    engine.memory = dataclasses.replace(engine.memory, fitter=dataclasses.replace(fitter, peaks=peaks))
    work = engine.memory.fit(t.needs).work_bytes
    short = t.resident_bytes + max(work.values()) + 1000
    engine.memory = with_room(engine.memory, short)
    assert engine.memory.work_bytes([engine.memory.fit(t.needs)]) <= short
    expected = engine.generate(request).frames
    assert not lane.log
    del engine.memory
    assert np.array_equal(engine.generate(request).frames, expected) and lane.log


def test_pack_leaves_room_for_the_chunk_beside_it(engine: Engine, lane: Recorded) -> None:
    batch, memory = engine._batch, engine.memory
    t = engine.prepare(VideoRequest(prompt="a star", num_inference_steps=1, guidance_scale=1.0))
    batch.active[0] = t
    try:
        work, step = memory.fit(t.needs).work_bytes, memory.fitter.peaks.step
        tight = with_room(memory, t.resident_bytes + work["decode"] + step.at(100))
        batch.memory = lambda: tight
        alone = batch._room()
        while t.stage != "decode":
            t.work() if t.stage == "encode" else t.advance([torch.zeros(t.shape)])
        assert batch._room() == pytest.approx(100, abs=2) and alone > 100
    finally:
        del batch.active[0]
        batch.memory = lambda: engine.memory


def test_stream_waits_for_its_inputs_by_an_event_and_the_host_for_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's calls and their order, on a stand-in that has no others."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = str(name)

        def wait_event(self, event: Event) -> None:
            log.append(f"{self.name} waits for {event.of}")

    class Event:
        of = ""

        def record(self, stream: Stream) -> None:
            self.of = stream.name

        def synchronize(self) -> None:
            log.append(f"the host waits for {self.of}")

    @contextmanager
    def stream(side: Stream) -> Iterator[None]:
        log.append(f"on {side.name}")
        yield
        log.append(f"off {side.name}")

    fake = types.SimpleNamespace(
        Stream=lambda device: Stream("side"), Event=Event, current_stream=lambda device: Stream("main"), stream=stream
    )
    monkeypatch.setattr(overlap, "cuda", fake)
    chunks = overlapped(iter([torch.tensor([1]), torch.tensor([2])]), CudaLane(CPU), torch.zeros(1))
    assert next(chunks).tolist() == [1]
    assert log == ["side waits for main", "on side", "off side", "on side", "off side", "the host waits for side"]
    assert next(chunks).tolist() == [2]
