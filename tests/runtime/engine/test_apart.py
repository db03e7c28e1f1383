"""Guidance branches one after the other: the same result, and what memory does not hold together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_checkpoint, with_room

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import Event, Failed, Finished, OutOfMemory
from skylapse.runtime.engine import batch as batch_module
from skylapse.runtime.engine.denoise import evaluate, take
from skylapse.runtime.engine.pack_cache import Layouts
from skylapse.runtime.engine.trajectory import Trajectory
from skylapse.runtime.models.model import load_model

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=9, guidance_scale=3.0, negative_prompt="dark")
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
CACHES = ("none", "easy:threshold=2,warmup=1", "first_block:threshold=1.2,order=1,warmup=1", "taylorseer")
Folders = Callable[[str], Path]
Evaluated = list[tuple[int, bool]]  # (number of requests, apart)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = save_checkpoint(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return folder


def engine_of(folder: Path) -> Engine:
    settings = load_settings()
    return Engine(load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=settings), settings)


def of(**fields: object) -> VideoRequest:
    return VideoRequest(**(SMALL | dict(prompt="a red star") | fields))  # type: ignore[arg-type]


@torch.inference_mode()
def final(engine: Engine, requests: list[VideoRequest], apart: bool) -> list[torch.Tensor]:
    """Latents of requests that share every pack."""
    layouts = Layouts(engine.model)
    trajectories = [
        Trajectory(ticket, engine.model, request.resolved(engine.defaults, engine.limits), engine.text_cache)
        for ticket, request in enumerate(requests)
    ]
    for t in trajectories:
        while t.stage == "encode":
            t.work()
    for _ in range(trajectories[0].num_steps):
        for t, outcome in zip(trajectories, evaluate(engine.model, trajectories, layouts, apart), strict=True):
            take(t, outcome)
    return [t.final_latents() for t in trajectories]


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        *(("wan2.1-t2v", dict(cache=cache)) for cache in CACHES if not cache.startswith("easy")),
        ("wan2.1-t2v", dict(guidance_interval=(0.4, 0.9))),
        ("wan2.2-t2v-a14b", dict(guidance_scale_2=2.0)),
        ("wan2.1-i2v", dict(image=PICTURE)),
        ("wan2.2-ti2v-5b", dict(image=PICTURE)),
    ],
)
def test_branches_apart_come_to_the_same(variant: str, fields: dict, folders: Folders) -> None:
    engine = engine_of(folders(variant))
    together, apart = (final(engine, [of(**fields)], how)[0] for how in (False, True))
    assert together.isfinite().all() and torch.allclose(together, apart, atol=1e-4, rtol=1e-4)


def test_a_mixed_pack_apart_comes_to_the_same(folders: Folders) -> None:
    """Other sizes, one without guidance, and one whose probe lets it leave early."""
    engine = engine_of(folders("wan2.1-t2v"))
    requests = [of(), of(width=96, num_frames=9, cache=CACHES[2]), of(guidance_scale=1.0, seed=5)]
    together, apart = (final(engine, requests, how) for how in (False, True))
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> tuple[Evaluated, dict[str, Any]]:
    """A device on which more tokens than a limit run out of memory together; apart, more than that in one branch."""
    seen: Evaluated = []
    limit: dict[str, Any] = dict(tokens=10**9)

    def limited(model: Any, members: Any, layouts: Any, apart: bool = False) -> Any:
        seen.append((len(members), apart))
        branches = [t.num_tokens for t in members for _ in range(t.plan.num_branches)]
        if (max(branches) if apart else sum(branches)) > limit["tokens"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return evaluate(model, members, layouts, apart)

    monkeypatch.setattr(batch_module, "evaluate", limited)
    return seen, limit


def run(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def test_a_lone_request_without_room_for_both_branches_goes_on_apart(
    folders: Folders, short: tuple[Evaluated, dict], caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried together once, and said once."""
    engine = engine_of(folders("wan2.1-t2v"))
    expected = engine.generate(of()).frames
    seen, limit = short
    seen.clear()
    limit["tokens"] = 40  # of 64 in both branches
    caplog.clear()
    video = engine.generate(of())
    assert np.abs(video.frames.astype(int) - expected).max() <= 1
    assert seen == [(1, False)] + [(1, True)] * 9
    assert [record.getMessage() for record in caplog.records if "split" in record.getMessage()] == [
        "a request's guidance branches failed (out of memory: CUDA out of memory. Tried to allocate 2.00 GiB) and is "
        "split"
    ]


@pytest.mark.parametrize(("guidance", "attempts"), [(1.0, [(1, False)]), (3.0, [(1, False), (1, True)])])
def test_who_has_no_room_for_one_branch_fails(
    guidance: float, attempts: Evaluated, folders: Folders, short: tuple[Evaluated, dict]
) -> None:
    engine, (seen, limit) = engine_of(folders("wan2.1-t2v")), short
    limit["tokens"] = 20
    engine.submit(of(guidance_scale=guidance))
    (failed,) = [event for event in run(engine) if isinstance(event, Failed)]
    assert isinstance(failed.error, OutOfMemory) and seen == attempts


def test_a_pack_of_several_is_split_before_branches_are(folders: Folders, short: tuple[Evaluated, dict]) -> None:
    engine, (seen, limit) = engine_of(folders("wan2.1-t2v")), short
    limit["tokens"] = 64
    for seed in range(2):
        engine.submit(of(seed=seed, num_inference_steps=2))
    assert len([event for event in run(engine) if isinstance(event, Finished)]) == 2
    assert (2, False) in seen and not any(apart for _, apart in seen)


def test_another_error_is_no_reason_to_go_apart(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def broken(model: Any, members: Any, layouts: Any, apart: bool = False) -> Any:
        seen.append(apart)
        raise ValueError("a bug")

    monkeypatch.setattr(batch_module, "evaluate", broken)
    engine = engine_of(folders("wan2.1-t2v"))
    engine.submit(of())
    (failed,) = [event for event in run(engine) if isinstance(event, Failed)]
    assert str(failed.error) == "a bug" and seen == [False]


def test_branches_are_apart_from_the_start_where_the_budget_says_so(
    folders: Folders, short: tuple[Evaluated, dict]
) -> None:
    engine, (seen, _) = engine_of(folders("wan2.1-t2v")), short
    expected = engine.generate(of()).frames
    seen.clear()
    fitter = engine.memory.fitter
    t = engine.prepare(of())
    curve = dataclasses.replace(fitter.peaks.step, points=((0.0, 0.0), (64.0, 8e9)))  # where both together are too many
    peaks = dataclasses.replace(fitter.peaks, step=curve)
    engine.memory = with_room(
        dataclasses.replace(engine.memory, fitter=dataclasses.replace(fitter, peaks=peaks)), 10**9
    )
    assert engine.memory.fit(t.needs).way.guidance == "apart"
    assert np.abs(engine.generate(of()).frames.astype(int) - expected).max() <= 1
    assert seen == [(1, True)] * 9
