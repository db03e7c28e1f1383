"""Whole engines whose models move: the same frames, few moves, and nothing read where it is not."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from movers import CountingMover
from peaks import made_up
from tiny import save_checkpoint, with_room

from skylapse import Engine, VideoRequest
from skylapse.runtime.checkpoints.registry import EXPERTS
from skylapse.runtime.commands.calibrate import calibrate
from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import Checkpointed, Event, Failed, Finished, Preview, Progress
from skylapse.runtime.engine import batch as batch_module
from skylapse.runtime.engine.denoise import evaluate
from skylapse.runtime.models import placement
from skylapse.runtime.models.model import load_model
from skylapse.runtime.models.residency import Residency
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.preview import Previewer, fit
from skylapse.runtime.vae.tiling import Chunk

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=6)
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
VARIANTS = ("wan2.1-t2v", "wan2.1-i2v", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b")
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made: dict[str, Path] = {}

    def folder(variant: str) -> Path:
        if variant not in made:
            made[variant] = save_checkpoint(variant, tmp_path_factory.mktemp(variant))
        return made[variant]

    return folder


@pytest.fixture(autouse=True)
def unpredicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the prediction, which takes seconds: all parts move here anyway, and test_fit.py tests the choice."""
    monkeypatch.setattr(placement, "_predicted", lambda *_: made_up())


def engine_of(folder: Path, mover: CountingMover | None = None, clips: int = 3, **settings: object) -> Engine:
    """Return an engine whose parts all move if it has a mover, with room for the largest part and so many requests."""
    offload = "none" if mover is None else "all"
    chosen = dataclasses.replace(load_settings(), **({"offload": offload} | settings))  # type: ignore[arg-type]
    where = dict(device=torch.device("cpu"), dtype=torch.float32, settings=chosen)
    engine = Engine(load_model(str(folder), mover=mover, **where), chosen)  # type: ignore[arg-type]
    if mover is not None:
        parts = engine.model.part_bytes
        assert set(engine.model.residency.moved) == set(parts)
        fitter = dataclasses.replace(engine.memory.fitter, peaks=made_up())  # work that is small beside tiny weights
        engine.memory = dataclasses.replace(engine.memory, fitter=fitter)
        request = engine.prepare(of(folder))
        fits = [engine.memory.fit(request.needs)] * clips
        needs = request.resident_bytes * clips + engine.memory.work_bytes(fits)
        engine.memory = with_room(engine.memory, needs)
        mover.num_copies = 0
    return engine


def of(folder: Path, **fields: object) -> VideoRequest:
    """Return a small request that the folder's model can do."""
    image = dict(image=PICTURE) if "i2v" in folder.name else {}
    return VideoRequest(
        **(SMALL | dict(prompt="a red star", negative_prompt="dark", guidance_scale=3.0) | image | fields)
    )  # type: ignore[arg-type]


def run(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def close(frames: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether frames differ by at most one level.

    In a pack of another size products are summed in another order, which may round a level to its neighbour."""
    return bool(np.abs(frames.astype(int) - expected.astype(int)).max() <= 1)


def without_repeats(names: list[str]) -> list[str]:
    return [name for k, name in enumerate(names) if not k or names[k - 1] != name]


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the parts that are required, in order, and assert after each that the budget is kept."""
    names: list[str] = []
    require = Residency.require

    def watched(residency: Residency, *parts: str) -> None:
        require(residency, *parts)
        names.extend(parts)
        taken = residency.on_device_bytes + residency.reserved_bytes
        assert residency.budget_bytes == 0 or taken <= residency.budget_bytes, (parts, residency.report)

    monkeypatch.setattr(Residency, "require", watched)
    return names


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_are_the_same_when_every_part_moves(variant: str, folders: Folders, required: list[str]) -> None:
    folder, mover = folders(variant), CountingMover()
    request = of(folder)
    expected = engine_of(folder).generate(request)
    required.clear()
    engine = engine_of(folder, mover, clips=1)
    video = engine.generate(request)
    assert np.array_equal(video.frames, expected.frames)
    parts = set(engine.model.parts) - ({"encoder"} if request.image is None else set())
    assert set(required) == parts
    assert mover.num_copies == engine.model.residency.report.num_moves == len(parts)
    assert mover.live_bytes == engine.model.residency.on_device_bytes
    assert mover.num_settled and set(engine.model.residency.report.on_device) < set(engine.model.parts)


def test_two_requests_in_different_experts_take_turns_that_are_long(folders: Folders, required: list[str]) -> None:
    folder, mover = folders("wan2.2-t2v-a14b"), CountingMover()
    requests = [of(folder, seed=k, num_inference_steps=12) for k in range(3)]
    alone = [engine_of(folder).generate(request).frames for request in requests]
    required.clear()
    engine = engine_of(folder, mover)
    finished = {}
    for request in requests[:2]:
        engine.submit(request)
    late = None
    while engine.has_work():
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Finished):
                finished[event.ticket] = event.video.frames
            if late is None and isinstance(event, Progress) and event.step == 11:
                late = engine.submit(requests[2])  # the others are in the second expert by now
    for expected, ticket in zip(alone, sorted(finished), strict=True):
        assert close(finished[ticket], expected)
    turns = without_repeats([name for name in required if name in EXPERTS])
    assert turns == ["transformer", "transformer_2"] * 2


def test_the_second_expert_is_on_its_way_before_its_first_step_where_there_is_room(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mover = folders("wan2.2-t2v-a14b"), CountingMover()
    engine = engine_of(folder, mover)
    engine.memory = with_room(engine.memory, engine.memory.available_bytes + engine.model.part_bytes["transformer_2"])
    seen: list[tuple[int, bool]] = []

    def watched(model: object, members: list, *rest: object) -> object:
        seen.append((members[0].plan.expert, engine.model.residency.is_on_device("transformer_2")))
        return evaluate(model, members, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(batch_module, "evaluate", watched)
    engine.generate(of(folder, num_inference_steps=12))
    second = [there for expert, there in seen if expert == 1]
    first = [there for expert, there in seen if expert == 0]
    assert all(second) and not first[0] and engine.model.residency.report.num_moves == 4


def test_a_request_goes_on_from_a_checkpoint(folders: Folders, tmp_path: Path) -> None:
    folder = folders("wan2.2-t2v-a14b")
    request = of(folder)
    expected = engine_of(folder).generate(request).frames
    engine = engine_of(folder, CountingMover())
    ticket = engine.submit(request, checkpoint_every=4, checkpoint_dir=tmp_path / "state")
    while not any(isinstance(event, Checkpointed) for event in engine.step()):
        pass
    engine.abort(ticket)
    assert not engine.has_work()
    other = engine_of(folder, CountingMover())
    other.resume(tmp_path / "state")
    (finished,) = [event for event in run(other) if isinstance(event, Finished)]
    assert np.array_equal(finished.video.frames, expected)


def test_coders_are_there_when_it_is_chosen_who_codes(folders: Folders) -> None:
    """A choice may compare compiled coders with them."""
    engine = engine_of(folders("wan2.1-i2v"), CountingMover())
    codec, seen = engine.model.codec, []

    def chosen(part: str) -> Callable[[int, int], Chunk]:
        def choose(height: int, width: int) -> Chunk:
            seen.append((part, engine.model.residency.is_on_device(part)))
            return getattr(codec, part)

        return choose

    codec.choose_encoder, codec.choose_decoder = chosen("encoder"), chosen("decoder")
    engine.generate(of(folders("wan2.1-i2v")))
    assert seen == [("encoder", True), ("decoder", True)]


def test_latents_outside_the_queue_find_room(folders: Folders) -> None:
    """Nobody has counted the memory that they take: no part stays beside the ones that they need."""
    folder = folders("wan2.1-t2v")
    engine = engine_of(folder, CountingMover())
    engine.memory = with_room(engine.memory, 10 * engine.memory.available_bytes)
    engine.generate(of(folder))
    latents = engine.generate_latents(of(folder))
    assert engine.model.residency.report.on_device == ("transformer",)
    assert torch.equal(latents, engine_of(folder).generate_latents(of(folder)))


@pytest.mark.parametrize("cache", ["teacache:0.3", "magcache", "first_block:threshold=0.5"])
def test_what_reads_weights_besides_steps_reads_them_where_they_are(
    cache: str, folders: Folders, tmp_path: Path
) -> None:
    """TeaCache's distances at submission, a calibration, and a preview's map; none of them sees a weight of NaN."""
    folder = save_checkpoint("wan2.2-t2v-a14b", tmp_path / "model")
    mover = CountingMover(hides=False)  # the embedder's rows are computed on the host while its expert is there
    engine = engine_of(folder, mover)
    engine.memory = with_room(engine.memory, 10 * engine.memory.available_bytes)
    calibrate(engine, of(folder), prompts=("a star",), report=lambda line: None)
    asked = of(folder, cache=cache)
    expected, moving = engine_of(folder), engine_of(folder, CountingMover(hides=False))
    for made in (expected, moving):
        made.memory = with_room(made.memory, 10 * made.memory.available_bytes)
        made.submit(asked, preview_every=3)
    events = [run(made) for made in (expected, moving)]
    shown = [[event.frames for event in told if isinstance(event, Preview)] for told in events]
    videos = [next(event.video for event in told if isinstance(event, Finished)) for told in events]
    assert len(shown[0]) == len(shown[1]) == 2 and np.array_equal(shown[0], shown[1])
    assert np.array_equal(videos[0].frames, videos[1].frames)
    assert videos[0].metadata.cache == videos[1].metadata.cache


def test_an_aborted_request_changes_nothing_for_the_others(folders: Folders) -> None:
    folder = folders("wan2.2-t2v-a14b")
    request = of(folder)
    expected = engine_of(folder).generate(request).frames
    engine = engine_of(folder, CountingMover())
    other, ticket = engine.submit(of(folder, seed=9)), engine.submit(request)
    told = []
    for _ in range(5):
        told += engine.step()
    engine.abort(other)
    finished = {event.ticket: event for event in told + run(engine) if isinstance(event, Finished)}
    assert list(finished) == [ticket] and close(finished[ticket].video.frames, expected)


def test_threads_may_submit_with_previews_while_another_one_steps(tmp_path: Path) -> None:
    """A preview's map is fitted by who submits: the coders stay where they are meanwhile."""
    folder = save_checkpoint("wan2.1-t2v", tmp_path / "model")
    expected = engine_of(folder).generate(of(folder)).frames
    engine = engine_of(folder, CountingMover())
    engine.memory = with_room(engine.memory, 2 * engine.memory.available_bytes)
    first = engine.submit(of(folder))
    errors: list[Exception] = []

    def submit(seed: int) -> None:
        try:
            engine.submit(of(folder, seed=seed, cache="easy:threshold=0.5"), preview_every=2)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    events = []
    while engine.has_work() or any(thread.is_alive() for thread in threads):
        events += engine.step()
    videos = {event.ticket: event.video.frames for event in events if isinstance(event, Finished)}
    assert not errors and len(videos) == 5 and not [event for event in events if isinstance(event, Failed)]
    assert close(videos[first], expected)


def test_all_is_refused_where_nothing_can_be_moved(folders: Folders) -> None:
    with pytest.raises(ValueError, match="offload all needs a CUDA device, and this is cpu"):
        engine_of(folders("wan2.1-t2v"), None, offload="all")


def test_nothing_moves_while_a_preview_map_is_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(save_checkpoint("wan2.1-t2v", tmp_path / "model"), CountingMover())
    stepped = threading.Event()
    residency = engine.model.residency

    def step() -> None:
        residency.require("transformer")
        stepped.set()

    thread = threading.Thread(target=step)

    def watched(codec: VideoCodec) -> Previewer:
        thread.start()
        assert not stepped.wait(0.1)
        return fit(codec)

    monkeypatch.setattr("skylapse.runtime.vae.preview.fit", watched)
    assert engine.previewer
    thread.join()
    assert stepped.is_set()
