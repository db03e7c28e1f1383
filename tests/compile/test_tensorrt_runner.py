"""Engines of TensorRT between standing buffers, on a stand-in that has the real bindings' calls and no others."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skylapse.compile import footprint, tensorrt_runner
from skylapse.compile.footprint import NoRoom
from skylapse.compile.stream import FIRST, NEXT, Coder
from skylapse.compile.tensorrt_runner import Lane, LaneStates, Runner, TensorRTError

from .engines import BINDINGS, HostStream, chunks, decoded, needs_bindings, plans
from .stand_in import SCRATCH_BYTES, StandIn

pytestmark = needs_bindings


@pytest.fixture(scope="module")
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["2.1"]


@pytest.mark.parametrize("records", [False, True], ids=["launched", "replayed"])
def test_interleaved_clips_of_two_sizes_equal_eager(
    records: bool, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    stream = HostStream(trt)
    device = torch.device("cpu")
    run = Runner(coder, plans(graphs, coder, tmp_path), device, torch.float32, stream, graphs=records)
    for _ in range(2):
        clips = [chunks(0, 4, 6), chunks(1, 4, 6), chunks(2, 8, 5)]
        together = zip(*(decoded(run, clip) for clip in clips), strict=True)
        apart = zip(*(decoded(coder, clip) for clip in clips), strict=True)
        for ours, theirs in zip(together, apart, strict=True):
            for frames, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert bool(stream.captured) == records


def test_frames_that_were_handed_out_stay_as_they_are(trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, HostStream(trt))
    kept = [*decoded(run, chunks(0, 4, 6))]
    for frames, expected in zip(kept, decoded(coder, chunks(0, 4, 6)), strict=True):
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_a_runner_records_each_shape_and_parity_once(trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    stream = HostStream(trt)
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, stream)
    [*decoded(run, chunks(0, 4, 6, (1, *[3] * 10)))]
    assert stream.captured == 2
    [*decoded(run, chunks(1, 4, 6, (1, *[3] * 10)))]
    assert stream.captured == 4, "a clip's recordings go with its buffers"


@pytest.mark.parametrize("ends", ["to its end", "left after two chunks"])
def test_a_clips_buffers_go_with_it(ends: str, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, HostStream(trt))
    lanes: list[weakref.ref[Lane]] = []
    states, clip = None, chunks(0, 4, 6)
    gc.disable()  # without waiting for it: GiBs hang on them
    try:
        for chunk in clip if ends == "to its end" else clip[:2]:
            with torch.inference_mode():
                _, states = run(chunk, states)
            assert isinstance(states, LaneStates)
            lanes.append(weakref.ref(states.lane))
        assert len({id(lane()) for lane in lanes}) == 1 and lanes[0]() is not None, "a clip has one lane"
        states = None
        assert lanes[0]() is None
    finally:
        gc.enable()


def test_each_output_is_handed_to_who_reads_it(trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    stream = HostStream(trt)
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, stream)
    frames = [*decoded(run, chunks(0, 4, 6))]
    assert [y.data_ptr() for y in stream.handed_out] == [y.data_ptr() for y in frames]


def test_engines_work_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of torch.cuda in order: nothing waits for the device or empties a cache, and nobody else ends a capture."""
    told: list[Any] = []

    class Recorded:
        device, cuda_stream = torch.device("cuda"), 7

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Recorded) -> None:
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            told.append(f"capture {capture_error_mode}")

        def capture_end(self) -> None:
            told.append("captured")

        def replay(self) -> None: ...

    current = [Recorded("theirs")]

    @contextmanager
    def stream(entered: Recorded) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Recorded("ours"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: told.append(name))
    ours = tensorrt_runner.CudaStream(torch.device("cuda"))
    with ours.section():
        replay = ours.capture(lambda: told.append(f"queued on {current[-1].name}"))
        with pytest.raises(RuntimeError, match="it fails"):
            ours.capture(lambda: (_ for _ in ()).throw(RuntimeError("it fails")))
    y = SimpleNamespace(record_stream=lambda reader: told.append(f"read on {reader.name}"))
    ours.hand_out(y)
    assert callable(replay) and told == [
        "ours waits for theirs",
        *("capture thread_local", "queued on ours", "captured"),
        *("capture thread_local", "captured"),
        "theirs waits for ours",
        "read on theirs",
    ]


def test_engines_that_do_not_fit_are_not_loaded(
    monkeypatch: pytest.MonkeyPatch, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    made, device = plans(graphs, coder, tmp_path), torch.device("cpu")
    weights = sum(map(len, made.values()))
    lane = 2 * coder.states.num_bytes(4, 6, 4)
    needed = SCRATCH_BYTES + lane
    assert weights > needed

    def load(*free: int, memory_bytes: int | None = None) -> None:
        left = iter(free)
        monkeypatch.setattr(footprint, "free_bytes", lambda device, cached=False: next(left))
        monkeypatch.setattr(footprint, "taken_bytes", lambda device: 100)
        Runner(*(coder, made, device, torch.float32, HostStream(trt)), size=(4, 6), memory_bytes=memory_bytes)

    load(weights, needed)
    load(weights, needed, memory_bytes=weights + 100)
    trt.calls.clear()
    with pytest.raises(NoRoom, match=r"the plans' weights: about .* are needed, .* are free"):
        load(weights - 1, needed)
    assert not [method for _, method, _ in trt.calls if method == "deserialize_cuda_engine"]
    with pytest.raises(NoRoom, match=r"scratch memory and a clip's states: about .* are needed, .* are free"):
        load(weights, needed - 1)
    with pytest.raises(NoRoom, match="SKYLAPSE_MEMORY_MB leaves"):
        load(weights, needed, memory_bytes=weights + 99)
    assert not [method for _, method, _ in trt.calls if method == "set_device_memory"]


def test_a_capture_that_fails_leaves_plain_launches(
    trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(HostStream):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, Broken(trt))
    ours, theirs = decoded(run, chunks(0, 4, 6, (1, *[3] * 5))), decoded(coder, chunks(0, 4, 6, (1, *[3] * 5)))
    for frames, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    assert caplog.text.count("no CUDA graphs") == 1


@pytest.mark.parametrize("method", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_call_that_says_no_is_an_error(method: str, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, HostStream(trt))
    trt.refuse.add(method)
    with pytest.raises(TensorRTError):
        run(chunks(0, 4, 6)[0], None)


def test_a_size_outside_the_profile_is_refused(trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    run = Runner(coder, plans(graphs, coder, tmp_path), torch.device("cpu"), torch.float32, HostStream(trt))
    with pytest.raises(TensorRTError, match="outside the engine's profile"):
        run(torch.zeros(1, 4, 1, 9, 9), None)


@pytest.mark.parametrize("damage", [lambda plan: plan[: len(plan) // 2], lambda plan: b"", lambda plan: b"\0" * 100])
def test_a_damaged_plan_is_an_error(
    damage: Callable[[bytes], bytes], trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    made = plans(graphs, coder, tmp_path)
    with pytest.raises(TensorRTError, match="damaged"):
        Runner(coder, made | {NEXT: damage(made[NEXT])}, torch.device("cpu"), torch.float32, HostStream(trt))


def test_a_plan_of_another_version_dtype_or_graph_is_an_error(
    monkeypatch: pytest.MonkeyPatch, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    made = plans(graphs, coder, tmp_path)
    with pytest.raises(TensorRTError, match="another graph"):
        Runner(coder, {FIRST: made[NEXT], NEXT: made[FIRST]}, torch.device("cpu"), torch.float32, HostStream(trt))
    with pytest.raises(TensorRTError, match="not BF16"):
        Runner(coder, made, torch.device("cpu"), torch.bfloat16, HostStream(trt))
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn(BINDINGS / "api.json", version="11.5.0.1"))
    with pytest.raises(TensorRTError, match="another TensorRT"):
        Runner(coder, made, torch.device("cpu"), torch.float32, HostStream(trt))
