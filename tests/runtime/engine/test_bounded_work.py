"""Encoding and decoding come in pieces between the steps: they block neither others' steps nor a cancel."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from batches import small_request

from skylapse import Engine
from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import Event, Finished, Progress
from skylapse.runtime.models.model import load_model


@pytest.fixture
def engine(folders: dict[str, Path]) -> Engine:
    settings = dataclasses.replace(load_settings(), decode_chunk=1)
    folder = str(folders["wan2.1-t2v"])
    return Engine(load_model(folder, device=torch.device("cpu"), dtype=torch.float32, settings=settings), settings)


def decoding(engine: Engine, num_frames: int) -> int:
    """A request of two steps that has just begun to be decoded; a chunk of it is four frames."""
    ticket = engine.submit(small_request(num_frames=num_frames, num_inference_steps=2))
    while ticket not in engine._batch.active or engine._batch.active[ticket].stage != "decode":
        engine.step()
    return ticket


def of(ticket: int, events: list[Event]) -> list[Event]:
    return [event for event in events if event.ticket == ticket]


def test_others_take_a_step_in_every_tick_of_a_long_decode(engine: Engine) -> None:
    long = decoding(engine, num_frames=33)
    other = engine.submit(small_request(prompt="a box", num_inference_steps=40))
    steps, ticks, finished = 0, 0, False
    while not finished:
        events = engine.step()
        ticks += 1
        steps += sum(isinstance(event, Progress) for event in of(other, events))
        finished = any(isinstance(event, Finished) for event in of(long, events))
    assert ticks == 9 and steps >= ticks - 2  # a chunk a tick; the other's prompt and noise took the first ticks


def test_an_abort_amid_a_long_decode_needs_no_further_chunk(engine: Engine) -> None:
    long = decoding(engine, num_frames=33)
    engine.step()
    engine.abort(long)
    assert not engine.has_work() and not engine.step()


def test_a_request_joins_and_steps_while_another_prompt_is_encoded(engine: Engine) -> None:
    first = engine.submit(small_request(num_inference_steps=40))
    while not engine.step():
        pass
    for k in range(5):  # each of them has a prompt of its own to encode
        engine.submit(small_request(prompt=f"a star {k}", num_inference_steps=2))
    assert all(any(isinstance(e, Progress) for e in of(first, engine.step())) for _ in range(5))
