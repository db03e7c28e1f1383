"""The memory budget: its profile is measured once, and every component's weights are taken off it."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peaks import made_up
from tiny import save_checkpoint, with_room

from skylapse import Engine, Video, VideoRequest
from skylapse.runtime.checkpoints.registry import inspect_model
from skylapse.runtime.conditioning.latents import Conditioning
from skylapse.runtime.core.config import MIB, load_settings
from skylapse.runtime.core.events import Finished, RequestTooLarge
from skylapse.runtime.engine.batch import Batch
from skylapse.runtime.engine.denoise import Outcome
from skylapse.runtime.engine.memory import MemoryBudget
from skylapse.runtime.engine.pack_cache import Layouts
from skylapse.runtime.engine.scheduler import Scheduler, SchedulerConfig
from skylapse.runtime.engine.trajectory import Trajectory
from skylapse.runtime.memory.fit import Fitter, Needs, Size
from skylapse.runtime.models import placement
from skylapse.runtime.models.model import Model, load_model
from skylapse.runtime.models.text_cache import TextCache

PICTURE = np.full((64, 64, 3), 90, np.uint8)


def engine_of(folder: Path, profiles: Path) -> Engine:
    settings = dataclasses.replace(load_settings(), profile_dir=profiles)
    model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=settings)
    return Engine(model, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-i2v", tmp_path_factory.mktemp("i2v"))


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.from_pretrained("demo", device="cpu")


def test_a_later_start_reads_the_profile_and_measures_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = engine_of(folder, tmp_path / "profiles").memory.fitter.peaks
    assert measured.step.at(100) > 0 and measured.decode.chunks[4].at(64 * 64) > 0
    (path,) = (tmp_path / "profiles").iterdir()
    monkeypatch.setattr(placement, "measure_peaks", lambda *_: pytest.fail("it is measured again"))
    assert engine_of(folder, tmp_path / "profiles").memory.fitter.peaks == measured
    monkeypatch.undo()
    path.write_text('{"step_bytes": 1}')
    assert engine_of(folder, tmp_path / "profiles").memory.fitter.peaks == measured
    assert path.read_text() != '{"step_bytes": 1}'  # what cannot be read is measured and stored again


def test_weights_of_every_component_are_taken_off_the_budget(folder: Path, tmp_path: Path) -> None:
    parts = inspect_model(str(folder)).components
    assert {part.name for part in parts} == {"transformer", "vae", "text_encoder", "image_encoder"}
    assert engine_of(folder, tmp_path).model.num_bytes == sum(part.num_bytes or 0 for part in parts)


def test_the_profile_is_there_when_an_engine_has_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLAPSE_PROFILE_DIR", str(tmp_path / "profiles"))
    engine = Engine.from_pretrained(str(folder), device="cpu")
    monkeypatch.setattr(placement, "measure_peaks", lambda *_: pytest.fail("it is measured after the start"))
    assert engine.memory.fitter.peaks.step.at(100) > 0 and len(list((tmp_path / "profiles").iterdir())) == 1


def test_the_text_cache_is_taken_off_the_budget_and_is_small_in_a_small_memory(folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(load_settings(), profile_dir=tmp_path, text_cache_bytes=256 * MIB)
    model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=settings)
    for memory_bytes, cache_bytes in ((4096 * MIB, 256 * MIB), (512 * MIB, 64 * MIB)):
        engine = Engine(model, dataclasses.replace(settings, memory_bytes=memory_bytes))
        assert engine.text_cache.budget_bytes == cache_bytes
        assert engine.memory.available_bytes == memory_bytes - cache_bytes - model.num_bytes


def test_a_video_tells_the_most_memory_held_where_the_device_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[torch.device] = []
    monkeypatch.setattr("skylapse.runtime.engine.batch.reset_peak", resets.append)
    monkeypatch.setattr("skylapse.runtime.engine.trajectory.peak_bytes", lambda device: 1234)
    engine = engine_of(folder, tmp_path)
    small = VideoRequest(prompt="a", image=PICTURE, width=64, height=64, num_frames=5, num_inference_steps=2)
    for _ in range(2):
        assert engine.generate(small).metadata.peak_bytes == 1234
    assert resets == [engine.device] * 2  # it is of the request, not of all before it
    monkeypatch.undo()
    assert engine.generate(small).metadata.peak_bytes is None


def budget(available_bytes: int, parallel: bool = False, **peaks: float) -> MemoryBudget:
    """Return a budget of made-up peaks, with room for so many bytes beside a model that takes none."""
    fitter = Fitter(peaks=made_up(**peaks), parts={}, budget_bytes=available_bytes, factor=8)  # type: ignore[arg-type]
    return MemoryBudget(fitter, parallel)


def needs(tokens: int, side: int = 64, held: int = 1000, encodes: bool = False) -> Needs:
    return Needs(Size(side, side, 5), held, tokens, 2, encodes)


def test_work_is_the_most_expensive_piece_beside_what_others_keep_from_chunk_to_chunk() -> None:
    memory = budget(10**9, step=100, decode=1.0, state=0.25)
    one, other = memory.fit(needs(10)), memory.fit(needs(1000, side=32))
    assert (one.kept_bytes, other.kept_bytes) == (0.25 * 64**2, 0.25 * 32**2)
    assert memory.work_bytes([one]) == 64**2
    assert memory.work_bytes([other]) == 2000 * 100
    assert memory.work_bytes([one, other]) == 2000 * 100 + 0.25 * 64**2
    assert memory.work_bytes([]) == 0


def test_a_step_and_a_chunk_are_counted_together_where_they_go_on_together() -> None:
    for parallel, expected in ((False, 2000 * 100), (True, 2000 * 100 + 64**2)):
        memory = budget(10**9, parallel, decode=1.0, state=0.25)
        assert memory.work_bytes([memory.fit(needs(1000))]) == expected
    tight = budget(1000 + 2000 * 100 + 64**2 - 1, True, decode=1.0)
    alone = tight.fit(needs(1000))
    assert alone.fits and not alone.overlaps and tight.work_bytes([alone]) == 2000 * 100


def test_compiled_coders_are_counted_with_each_work_they_lie_beside() -> None:
    memory = dataclasses.replace(budget(10**9, True, decode=1.0), compiled=lambda width, height: (5000, 9000))
    fit = memory.fit(needs(1000))
    assert fit.work_bytes["decode"] == 9000 and memory.work_bytes([fit]) == 2000 * 100 + 9000 + 5000


def test_a_pack_is_as_large_as_what_is_left() -> None:
    memory = budget(100_000, True, decode=1.0, state=0.25)
    fit = memory.fit(needs(100))
    assert memory.pack_tokens(20_000, []) == 800
    assert memory.pack_tokens(20_000, [fit]) == (80_000 - 0.75 * 64**2) // 100
    assert memory.pack_tokens(200_000, []) == 0


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_and_what_works_never_take_more_than_there_is(
    seed: int, parallel: bool, demo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of random sizes in a batch whose budget is made up; each piece of work is counted as it begins."""
    draw = random.Random(seed)
    memory = budget(100_000, parallel, step=100, apart=60, decode=4.0, encode=4.0, state=0.5, text=20_000)
    batch = Batch(
        demo.model, Scheduler(SchedulerConfig(max_batch_tokens=10**6)), lambda: memory, lambda: demo.previewer
    )
    most, done = [0], Video(np.zeros((1, 8, 8, 3), np.uint8), 8)

    def begins(num_bytes: int) -> None:
        held = sum(t.resident_bytes for t in batch.active.values())
        kept = sum(t.fit.kept_bytes for t in batch.active.values() if t.fit and t.stage == "decode")
        most[0] = max(most[0], held + kept + num_bytes)
        assert held + kept + num_bytes <= memory.available_bytes

    def work(t: Trajectory) -> None:
        assert t.fit is not None
        if t.stage == "decode":
            begins(t.fit.work_bytes["decode"] - t.fit.kept_bytes)
            t.chunks = getattr(t, "chunks", 0) + 1  # type: ignore[attr-defined]
            t.video = done if t.chunks == 3 else None  # type: ignore[attr-defined]
        else:
            begins(t.fit.work_bytes["text"])
            t.conditioning = Conditioning((False,) * t.shape[1])
            t.latents = torch.zeros(t.shape)
            t.branch_encoder.rows = dict.fromkeys(t.branch_encoder._experts, torch.zeros(1))

    def evaluated(model: Model, members: list[Trajectory], layouts: Layouts, apart: bool = False) -> list[Outcome]:
        curve = memory.fitter.peaks.apart if apart else memory.fitter.peaks.step
        decoding = [t.fit for t in batch.active.values() if t.fit and t.stage == "decode" and t.fit.overlaps]
        chunks = [fit.work_bytes["decode"] - fit.kept_bytes for fit in decoding] if parallel else []
        begins(curve.at(sum(t.num_tokens * t.plan.num_branches for t in members)) + max(chunks, default=0))
        return [Outcome((torch.zeros(t.shape),) * t.plan.num_branches, True, None) for t in members]

    monkeypatch.setattr(Trajectory, "work", work)
    monkeypatch.setattr("skylapse.runtime.engine.batch.evaluate", evaluated)
    waiting = 25
    finished = refused = ticket = 0
    while waiting or len(batch):
        if waiting and draw.random() < 0.5:
            waiting, ticket = waiting - 1, ticket + 1
            request = VideoRequest(
                prompt="a star",
                width=16 * draw.randint(2, 8),
                height=16 * draw.randint(2, 8),
                num_frames=4 * draw.randint(0, 8) + 1,
                num_inference_steps=draw.randint(1, 4),
            )
            t = Trajectory(ticket, demo.model, request.resolved(demo.defaults, demo.limits), TextCache(0))
            t.__dict__["needs"] = dataclasses.replace(t.needs, held_bytes=draw.randint(1000, 90_000))
            try:
                t.fit = memory.check(t)
                batch.join(t)
            except RequestTooLarge:
                refused += 1
        finished += sum(isinstance(event, Finished) for event in batch.tick())
    assert finished + refused == 25 and finished > 5 and refused and most[0] > 0.8 * memory.available_bytes


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("decode", dict(decode=400.0)),
        ("step", dict(step=10_000, apart=10_000)),
        ("text", dict(text=10**6)),
    ],
)
def test_a_refusal_names_the_stage_and_sizes_that_are_taken(stage: str, fields: dict, demo: Engine) -> None:
    memory = budget(1_000_000, **fields)
    request = VideoRequest(prompt="a star", width=128, height=128, num_frames=33)
    t = Trajectory(0, demo.model, request.resolved(demo.defaults, demo.limits), TextCache(0))
    t.__dict__["needs"] = dataclasses.replace(t.needs, held_bytes=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skylapse.runtime.engine.memory.needs_at", lambda t, size: resized(t.needs, size))
        with pytest.raises(RequestTooLarge) as refused:
            memory.check(t)
    fit = memory.fit(t.needs)
    said = str(refused.value)
    taken, free = fit.work_bytes[stage] / 2**30, (1_000_000 - fit.always_bytes) / 2**30
    assert said.startswith("num_frames x height x width = 33 x 128 x 128 (")
    assert f"does not fit: its {stage} takes {taken:.2f} GiB, and {free:.2f} GiB are free beside 0.00 GiB of" in said
    sizes = re.findall(r"(\d+)x(\d+)x(\d+)", said.rpartition(";")[2])
    if stage == "text":
        assert not sizes and said.endswith("no size of this model fits")
    for size in sizes:
        assert memory.fit(resized(t.needs, Size(*map(int, size)))).fits
    assert len(sizes) == {"decode": 1, "step": 2, "text": 0}[stage]


def resized(needs: Needs, size: Size) -> Needs:
    """Return the needs of another size, with held bytes and tokens in proportion."""
    share = size.volume / needs.size.volume
    held, tokens = round(needs.held_bytes * share), round(needs.num_tokens * share)
    return dataclasses.replace(needs, size=size, held_bytes=held, num_tokens=tokens)


def test_sizes_that_a_refusal_names_are_taken_by_the_engine(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder, tmp_path)
    engine.memory = with_room(engine.memory, 60 * MIB)
    asked = VideoRequest(prompt="a", image=PICTURE, width=832, height=480, num_frames=81)
    with pytest.raises(RequestTooLarge) as refused:
        engine.submit(asked)
    sizes = re.findall(r"(\d+)x(\d+)x(\d+)", str(refused.value).rpartition(";")[2])
    assert sizes
    for width, height, num_frames in (map(int, size) for size in sizes):
        engine.abort(engine.submit(dataclasses.replace(asked, width=width, height=height, num_frames=num_frames)))


def test_a_pack_leaves_what_a_clip_under_way_keeps_from_chunk_to_chunk(demo: Engine) -> None:
    memory = budget(1_000_000, state=50.0)
    batch = Batch(
        demo.model, Scheduler(SchedulerConfig(max_batch_tokens=10**6)), lambda: memory, lambda: demo.previewer
    )
    request = VideoRequest(
        prompt="a star", width=32, height=32, num_frames=5, num_inference_steps=1, guidance_scale=1.0
    )
    t = Trajectory(0, demo.model, request.resolved(demo.defaults, demo.limits), TextCache(0))
    t.__dict__["needs"] = dataclasses.replace(t.needs, held_bytes=1000)
    batch.active[0] = t
    t.conditioning, t.latents = Conditioning((False,) * t.shape[1]), torch.zeros(t.shape)
    t.branch_encoder.rows = dict.fromkeys(t.branch_encoder._experts, torch.zeros(1))
    assert t.stage == "denoise" and batch._room() == (1_000_000 - 1000) // 100
    t.advance([torch.zeros(t.shape)])
    assert t.stage == "decode" and batch._room() == (1_000_000 - 1000 - 50 * 32 * 32) // 100
