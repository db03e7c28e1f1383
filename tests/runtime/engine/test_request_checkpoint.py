"""Checkpoints: another process goes on where this one stopped, to the bit, and refuses what is not its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.runtime.core.events import Checkpointed, Event, Finished, Progress

SMALL = dict(width=64, height=64, num_frames=5, num_inference_steps=9)
CLIP = np.random.default_rng(2).integers(0, 256, (13, 64, 64, 3), dtype=np.uint8)
CACHES = ["none", "easy:threshold=2,warmup=1", "first_block:threshold=1.2,order=1,warmup=1", "budget:0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.2-ti2v-5b", tmp_path_factory.mktemp("ti2v"))


def engine_of(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), device="cpu", dtype="fp32")


def run(engine: Engine, until: int | None = None) -> tuple[np.ndarray | None, list[int]]:
    """Return frames (None if stopped after checkpoint `until`) and the steps at which checkpoints were written."""
    saved: list[int] = []
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Finished):
                return event.video.frames, saved
            if isinstance(event, Checkpointed):
                saved.append(event.step)
                if event.step == until:
                    return None, saved
    raise AssertionError("neither finished nor saved")


def saved_state(folder: Path, state: Path, **fields: object) -> Path:
    engine = engine_of(folder)
    engine.submit(VideoRequest(**(dict(prompt="a star") | SMALL | fields)), checkpoint_every=3, checkpoint_dir=state)
    run(engine, until=3)
    return state


@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_resumed_request_is_bit_identical(cache: str, solver: str, folder: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    request = VideoRequest(prompt="a star", image=image, solver=solver, cache=cache, seed=3, **SMALL)
    whole = engine_of(folder)
    whole.submit(request, checkpoint_every=3, checkpoint_dir=tmp_path / "whole")
    expected, saved = run(whole)
    assert saved == [3, 6]
    interrupted = engine_of(folder)
    interrupted.submit(request, checkpoint_every=3, checkpoint_dir=tmp_path / "cut")
    run(interrupted, until=6)
    other = engine_of(folder)
    other.resume(tmp_path / "cut")
    frames, _ = run(other)
    assert frames is not None and np.array_equal(frames, expected) and np.array_equal(frames[0], image)


@pytest.mark.parametrize(
    "shown",
    [
        dict(video=CLIP[:5]),
        dict(video=CLIP[:5], last_image=CLIP[12]),
        dict(video=CLIP, strength=0.8),
        dict(video=CLIP, strength=0.8, image=CLIP[4], cache=CACHES[1]),
    ],
    ids=["extension", "extension to a last frame", "source", "source and first frame"],
)
def test_a_resumed_request_needs_none_of_the_files_that_it_was_shown(shown: dict, folder: Path, tmp_path: Path) -> None:
    request = VideoRequest(**(dict(prompt="a star", seed=3) | SMALL | dict(num_frames=13) | shown))
    whole = engine_of(folder)
    whole.submit(request, checkpoint_every=3, checkpoint_dir=tmp_path / "whole")
    expected, _ = run(whole)
    interrupted = engine_of(folder)
    interrupted.submit(request, checkpoint_every=3, checkpoint_dir=tmp_path / "cut")
    run(interrupted, until=6)
    other = engine_of(folder)
    other.resume(tmp_path / "cut")
    (t,) = other._joining
    assert t.request.video is None and t.num_bytes <= t.resident_bytes
    frames, _ = run(other)
    assert frames is not None and np.array_equal(frames, expected)


@pytest.mark.parametrize("variant", ["wan2.1-i2v", "wan2.1-flf2v", "wan2.2-i2v-a14b"])
def test_channels_and_image_rows_come_back_from_a_checkpoint(variant: str, tmp_path: Path) -> None:
    folder = save_checkpoint(variant, tmp_path / "model")
    images = dict(image=CLIP[0], last_image=CLIP[12] if "flf2v" in variant else None)
    state = saved_state(folder, tmp_path / "state", **images)
    resumed, whole = engine_of(folder), engine_of(folder)
    resumed.resume(state)
    whole.submit(
        VideoRequest(prompt="a star", **images, **SMALL), checkpoint_every=3, checkpoint_dir=tmp_path / "whole"
    )
    frames, expected = run(resumed)[0], run(whole)[0]
    assert frames is not None and expected is not None and np.array_equal(frames, expected)


def test_a_stream_goes_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    engine = engine_of(folder)

    async def collect(state: Path, deadline_s: float | None = None) -> list[Event]:
        return [event async for event in engine.stream_resumed(state, deadline_s)]

    events = asyncio.run(collect(state))
    with pytest.raises(ValueError, match="cannot be read: FileNotFoundError"):
        asyncio.run(collect(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="deadline_s must be above 0, got 0"):
        asyncio.run(collect(state, deadline_s=0))
    engine.close()
    assert [event.step for event in events if isinstance(event, Progress)] == [4, 5, 6, 7, 8, 9]
    alone = engine_of(folder)
    alone.resume(state)  # step 6 by now: a resumed request saves where it came from
    expected, _ = run(alone)
    assert isinstance(events[-1], Finished) and np.array_equal(events[-1].video.frames, expected)


def test_another_process_goes_on_to_the_bit(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path / "state")
    engine = engine_of(folder)
    engine.resume(state)
    expected, _ = run(engine)
    state = saved_state(folder, tmp_path / "again")
    code = f"""
import numpy as np
from skylapse import Engine
from skylapse.runtime.core.events import Finished
engine = Engine.from_pretrained({str(folder)!r}, device="cpu", dtype="fp32")
engine.resume({str(state)!r})
while engine.has_work():
    for event in engine.step():
        if isinstance(event, Finished):
            np.save({str(tmp_path / "frames.npy")!r}, event.video.frames)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert np.array_equal(np.load(tmp_path / "frames.npy"), expected)


def test_the_step_after_a_checkpoint_is_computed_in_every_run(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    request = VideoRequest(prompt="a star", cache="taylorseer:interval=4,warmup=1", **SMALL)
    engine.submit(request, checkpoint_every=3, checkpoint_dir=tmp_path)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Finished):
                trace = event.video.metadata.cache.trace
    assert [trace[step] for step in (0, 3, 6)] == ["1", "1", "1"] and "0" in trace


def test_only_the_newest_checkpoint_is_kept(folder: Path, tmp_path: Path) -> None:
    engine = engine_of(folder)
    engine.submit(VideoRequest(prompt="a star", **SMALL), checkpoint_every=2, checkpoint_dir=tmp_path)
    run(engine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-8.safetensors", "state.json"]


def test_a_corrupted_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    data = bytearray((state / "state-3.safetensors").read_bytes())
    data[-1] ^= 1
    (state / "state-3.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"is corrupted: state-3.safetensors is not what state.json describes"):
        engine_of(folder).resume(state)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 7, "tensors": "x", "sha256": "y"}'])
def test_an_unreadable_index_is_refused(text: str, folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    (state / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"the checkpoint in .* (cannot be read|has version [17])"):
        engine_of(folder).resume(state)


def test_a_missing_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: FileNotFoundError"):
        engine_of(folder).resume(tmp_path / "nowhere")


def test_a_checkpoint_of_other_weights_is_refused_and_says_so(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path / "state")
    other = save_checkpoint("wan2.2-ti2v-5b", tmp_path / "other")
    path = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"it was made with weights '.*', and this engine has '"):
        engine_of(other).resume(state)


def test_a_checkpoint_of_another_dtype_is_refused_and_says_so(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    with pytest.raises(ValueError, match=r"was made with dtype 'float32', and this engine has 'bfloat16'"):
        Engine.from_pretrained(str(folder), device="cpu", dtype="bf16").resume(state)


def test_a_tampered_record_is_refused(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    record = json.loads((state / "state.json").read_text())
    for change, message in (
        ({"trace": "11"}, "it has decided 2 steps and taken 3"),
        ({"request": {**record["request"], "shift": 1.0}}, "its noise schedule is not the one"),
        ({"request": {**record["request"], "strength": 0.5}}, "its noise schedule is not the one"),
        ({"request": {**record["request"], "colour": "red"}}, "unexpected keyword argument 'colour'"),
        (
            {"request": {**record["request"], "width": 96}},
            r"must be float32 \[4, 2, 4, 6\], got float32 \[4, 2, 4, 4\]",
        ),
    ):
        (state / "state.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            engine_of(folder).resume(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=None), "weights must be text, got None"),
        (dict(request="x"), "request must be an object, got 'x'"),
        (dict(frame_is_given=[False]), "frame_is_given must have 2 entries, got 1"),
        (dict(frame_is_given=[True, False]), r"given must be \[4, 2, 4, 4\], got none"),
        (dict(timings_s={}), "timings_s must be the seconds of encode, denoise and decode, got {}"),
        (dict(trace="xyzabc"), "trace must be 0 or 1 for each step taken, got 'xyzabc'"),
        (dict(close_calls=[5]), r"close_calls must be of the 3 steps taken, got \[5\]"),
        (dict(tensors="../state-3.safetensors"), "tensors must be state-K.safetensors"),
    ],
)
def test_a_field_that_cannot_be_is_named(change: dict, message: str, folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    record = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=f"the checkpoint in .* cannot be resumed: {message}"):
        engine_of(folder).resume(state)


def test_files_that_a_record_names_are_not_read(folder: Path, tmp_path: Path) -> None:
    state = saved_state(folder, tmp_path)
    record = json.loads((state / "state.json").read_text())
    record["request"]["video"] = "/etc/passwd"
    (state / "state.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="video of its request must be null, got '/etc/passwd'"):
        engine_of(folder).resume(state)


def test_no_mutation_of_a_record_breaks_an_engine(folder: Path, tmp_path: Path) -> None:
    """Each record is refused with a ValueError that names the checkpoint, or still describes a request."""
    rng = random.Random(7)
    state = saved_state(folder, tmp_path)
    original = (state / "state.json").read_text()
    engine, refused = engine_of(folder), 0
    for _ in range(300):
        record = json.loads(original)
        for _ in range(rng.randint(1, 2)):
            mutate(record, rng)
        (state / "state.json").write_text(json.dumps(record))
        try:
            engine.abort(engine.resume(state))
        except ValueError as error:
            refused += 1
            assert f"the checkpoint in {state} cannot be resumed" in str(error)
    assert 200 < refused < 300


def mutate(record: Any, rng: random.Random) -> None:
    """Drop, replace or add something somewhere in a record."""
    at = record
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = rng.choice(keys)
        if not isinstance(at[key], dict | list) or rng.random() < 0.4:
            break
        at = at[key]
    if rng.random() < 0.3:
        del at[key]
    elif rng.random() < 0.1 and isinstance(at, dict):
        at["colour"] = "red"
    else:
        at[key] = rng.choice([None, "x", "", -1, 0, 1, 2, 10**30, 0.5, float("nan"), True, [], [None], {}, {"a": 1}])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("latents", None, "it has no latents"),
        ("generator", torch.zeros(5056), r"generator must be uint8 \[5056\], got float32 \[5056\]"),
        ("generator", torch.zeros(5056, dtype=torch.uint8), "generator must be the state of one: Invalid"),
        ("latents", torch.zeros(4, 2, 4, 4, dtype=torch.int64), r"latents must be float32 \[4, 2, 4, 4\], got int64"),
        ("given", torch.zeros(4, 2, 4, 5), r"given must be float32 \[4, 2, 4, 4\], got float32 \[4, 2, 4, 5\]"),
        ("given", None, r"given must be \[4, 2, 4, 4\], got none"),
        (
            "clean_prediction_0",
            None,
            r"solver's tensors at step 3 must be \['clean_prediction_0', 'clean_prediction_1'",
        ),
        ("clean_prediction_2", torch.zeros(4, 2, 4, 4), "its solver's tensors at step 3 must be"),
        ("last_sample", torch.zeros(3), r"last_sample must be float32 \[4, 2, 4, 4\], got float32 \[3\]"),
        ("pixels_0", torch.zeros(1, 64, 64, 3), r"pixels_0 must be uint8 \[any, 64, 64, 3\], got float32"),
        ("pixels_x", torch.zeros(3), "it has a tensor 'pixels_x', which this request has no use for"),
        ("channels", torch.zeros(3), "it has a tensor 'channels', which this request has no use for"),
    ],
)
def test_a_tensor_that_cannot_be_is_named(
    name: str, tensor: torch.Tensor | None, message: str, folder: Path, tmp_path: Path
) -> None:
    state = saved_state(folder, tmp_path, image=CLIP[0])
    record = json.loads((state / "state.json").read_text())
    tensors = {key: value.clone() for key, value in load_file(state / record["tensors"]).items() if key != name}
    data = save(tensors if tensor is None else tensors | {name: tensor})
    (state / record["tensors"]).write_bytes(data)
    (state / "state.json").write_text(json.dumps(record | {"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(ValueError, match=f"the checkpoint in .* cannot be resumed: .*{message}"):
        engine_of(folder).resume(state)


def test_a_crash_while_saving_leaves_the_checkpoint_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skylapse.runtime.engine import request_checkpoint as resume

    state = saved_state(folder, tmp_path)
    engine = engine_of(folder)
    engine.resume(state)
    write = resume._write

    def fails(path: Path, data: bytes) -> None:
        if path.name == "state.json":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(resume, "_write", fails)
    events = []
    while engine.has_work():
        events += engine.step()
    assert "No space left" in str(events[-1].error)
    monkeypatch.undo()
    again = engine_of(folder)
    again.resume(state)
    assert run(again)[0] is not None


def test_tensors_of_a_checkpoint_are_few(folder: Path, tmp_path: Path) -> None:
    """The contents of caches are not stored."""
    state = saved_state(folder, tmp_path, cache="first_block:threshold=1.2,order=1,warmup=1")
    assert set(load_file(state / "state-3.safetensors")) == {
        "latents",
        "generator",
        "clean_prediction_0",
        "clean_prediction_1",
        "last_sample",
    }
    assert torch.isfinite(load_file(state / "state-3.safetensors")["latents"]).all()
