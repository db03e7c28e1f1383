"""TensorRT without TensorRT: real graphs, on a stand-in that has the real bindings' calls and no others."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from skylapse.compile import export, footprint, tensorrt, tensorrt_build, tensorrt_runner
from skylapse.compile.attention import ANY_AREA
from skylapse.compile.backend import Unavailable
from skylapse.compile.cache import EngineCache
from skylapse.compile.footprint import NoRoom
from skylapse.compile.select import Selector
from skylapse.compile.stream import FIRST, NEXT, Coder, Plan
from skylapse.compile.tensorrt import MAX_ANY_PIXELS, TensorRT, extents
from skylapse.compile.tensorrt_build import BuildFailed, BuildRequest, build, profile_of
from skylapse.compile.tensorrt_runner import Runner, TensorRTError

from .stand_in import NEEDED_BYTES, SCRATCH_BYTES, StandIn

BINDINGS = Path(__file__).parents[2] / ".venv" / "tensorrt"
DYNAMIC = ((1, 2, 2), (3, 4, 6), (4, 8, 8))  # smallest, likeliest, largest
pytestmark = pytest.mark.skipif(
    not (BINDINGS / "api.json").exists(), reason="NVIDIA's bindings are not there: make tensorrt-bindings"
)


@pytest.fixture(scope="module")
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["2.1"]


@pytest.fixture(scope="module")
def graphs(exported: Callable[[str, Plan], Path]) -> Path:
    return exported("2.1", Plan())


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(BINDINGS / "api.json")
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    return stand_in


class HostStream:
    """A stream of a machine without a GPU; what it captures is done when it is replayed."""

    handle = 7

    def __init__(self, trt: StandIn) -> None:
        self.trt, self.captured = trt, 0
        self.handed_out: list[Tensor] = []

    def hand_out(self, tensor: Tensor) -> None:
        self.handed_out.append(tensor)

    def section(self) -> Any:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        queued: list[Callable[[], None]] = []
        self.trt.captured = queued
        try:
            work()
        finally:
            self.trt.captured = None

        def replay() -> None:
            for run in queued:
                run()

        return replay


def request(graphs: Path, coder: Coder, graph: str, folder: Path, **fields: Any) -> BuildRequest:
    plan = str(folder / f"{graph}.plan")
    options = {"profile": profile_of(coder, graph, *DYNAMIC), "workspace_bytes": NEEDED_BYTES} | fields
    return BuildRequest(str(graphs / f"{graph}.onnx"), plan, **options)


def plans(graphs: Path, coder: Coder, folder: Path) -> dict[str, bytes]:
    requests = {graph: request(graphs, coder, graph, folder) for graph in (FIRST, NEXT)}
    for one in requests.values():
        tensorrt_build.run(one)
    return {graph: Path(one.plan).read_bytes() for graph, one in requests.items()}


@contextmanager
def checked(x: Tensor) -> Iterator[None]:
    before = x.clone()
    yield
    assert torch.equal(x, before), "the caller's latents were written to"


def decoded(run: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    states = None
    for chunk in chunks:
        with checked(chunk), torch.inference_mode():
            frames, states = run(chunk, states)
        yield frames


def chunks(seed: int, height: int, width: int, lengths: tuple[int, ...] = (1, 3, 4, 1, 3, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, length, height, width, generator=generator) for length in lengths]


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
    lanes, states, clip = [], None, chunks(0, 4, 6)
    gc.disable()  # without waiting for it: GiBs hang on them
    try:
        for chunk in clip if ends == "to its end" else clip[:2]:
            with torch.inference_mode():
                _, states = run(chunk, states)
            lanes.append(weakref.ref(states.lane))
        assert all(lane() is states.lane for lane in lanes), "a clip has one lane"
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
    with pytest.raises(NoRoom, match="the plans' weights: about .* are needed, .* are free"):
        load(weights - 1, needed)
    assert not [method for _, method, _ in trt.calls if method == "deserialize_cuda_engine"]
    with pytest.raises(NoRoom, match="scratch memory and a clip's states: about .* are needed, .* are free"):
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


# -------------------------------------------------------------------------------------------------------------- builds


def test_a_build_is_bounded_strongly_typed_and_remembers_its_timings(
    trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    timings = tmp_path / "timings"
    one = request(graphs, coder, FIRST, tmp_path, timing_cache=str(timings), refittable=True)
    tensorrt_build.run(one)
    called = {(owner, method): arguments for owner, method, arguments in trt.calls}
    assert called["Builder", "create_network"] == (1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)
    assert called["IBuilderConfig", "set_memory_pool_limit"] == (trt.MemoryPoolType.WORKSPACE, NEEDED_BYTES)
    assert called["IBuilderConfig", "set_flag"] == (trt.BuilderFlag.REFIT,)
    assert called["IBuilderConfig", "clear_flag"] == (trt.BuilderFlag.TF32,)
    assert timings.read_bytes() == b"timings of this device"
    timings.write_bytes(b"timings of another device")
    tensorrt_build.run(one)
    assert timings.read_bytes() == b"timings of this device"
    assert {path.name for path in tmp_path.iterdir()} == {"first.plan", "timings"}


def test_what_the_builder_said_is_told(trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="increase the workspace"):
        tensorrt_build.run(request(graphs, coder, FIRST, tmp_path, workspace_bytes=1000))
    (tmp_path / "next.onnx").write_bytes(b"no graph")
    with pytest.raises(BuildFailed, match="cannot be parsed"):
        tensorrt_build.run(request(tmp_path, coder, NEXT, tmp_path))
    right = profile_of(coder, NEXT, *DYNAMIC)
    wrong = {name: right["x"] if name == "state_1" else shapes for name, shapes in right.items()}
    with pytest.raises(BuildFailed, match="axis"):  # as if states did not grow with the latents
        tensorrt_build.run(request(graphs, coder, NEXT, tmp_path, profile=wrong))
    with pytest.raises(BuildFailed, match="refused"):
        tensorrt_build.run(request(graphs, coder, NEXT, tmp_path, profile=profile_of(coder, NEXT, *DYNAMIC[::-1])))
    with pytest.raises(BuildFailed, match="inputs are"):
        tensorrt_build.run(request(graphs, coder, NEXT, tmp_path, profile={"x": right["x"]}))
    assert {path.name for path in tmp_path.iterdir()} == {"next.onnx"}


def test_a_plan_is_refitted_with_weights_of_the_same_structure(
    trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    import onnx

    one = request(graphs, coder, FIRST, tmp_path, refittable=True)
    tensorrt_build.run(one)
    model = onnx.load(one.onnx)
    weight = next(w for w in model.graph.initializer if len(w.dims) == 5)
    weight.raw_data = (2 * torch.frombuffer(bytearray(weight.raw_data), dtype=torch.float32)).numpy().tobytes()
    onnx.save(model, str(tmp_path / "other.onnx"))
    other = replace(one, onnx=str(tmp_path / "other.onnx"), plan=str(tmp_path / "other.plan"))
    tensorrt_build.run(replace(other, refit=one.plan))
    refitted = Path(other.plan).read_bytes()
    tensorrt_build.run(other)
    assert refitted == Path(other.plan).read_bytes() != Path(one.plan).read_bytes()
    with pytest.raises(BuildFailed, match="do not fit"):
        tensorrt_build.run(replace(request(graphs, coder, NEXT, tmp_path), refit=one.plan))
    fixed = request(graphs, coder, FIRST, tmp_path)
    tensorrt_build.run(fixed)
    with pytest.raises(BuildFailed, match="cannot be refitted"):
        tensorrt_build.run(replace(other, refit=fixed.plan))


PROCESS = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from skylapse.tests.compile.stand_in import StandIn
sys.modules["tensorrt"] = StandIn(Path({api!r}))
{before}
runpy.run_module("skylapse.compile.tensorrt_build", run_name="__main__")
"""


def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str = "") -> None:
    """The subprocess gets the stand-in in place of the library that is not there."""
    script = tmp_path / "process.py"
    script.write_text(PROCESS.format(tests="", api=str(BINDINGS / "api.json"), before=before))
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: run([command[0], str(script)], **kwargs))


def test_a_build_in_its_process_gives_the_same_plan(
    monkeypatch: pytest.MonkeyPatch, trt: StandIn, graphs: Path, coder: Coder, tmp_path: Path
) -> None:
    one = request(graphs, coder, FIRST, tmp_path)
    tensorrt_build.run(one)
    expected = Path(one.plan).read_bytes()
    Path(one.plan).unlink()
    in_process(monkeypatch, tmp_path)
    build(one, timeout_s=60)
    assert Path(one.plan).read_bytes() == expected


@pytest.mark.parametrize(
    ("before", "timeout_s", "told"),
    [
        ("import time; time.sleep(60)", 0.2, "longer than 0.2 s"),
        ("import os; os.kill(os.getpid(), 9)", 60, "signal 9"),
        ("sys.modules['tensorrt'] = None", 60, "tensorrt"),
    ],
    ids=["hangs", "dies", "missing"],
)
def test_a_builder_that_hangs_or_dies_is_an_error(
    before: str,
    timeout_s: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    graphs: Path,
    coder: Coder,
    tmp_path: Path,
) -> None:
    in_process(monkeypatch, tmp_path, before)
    one = request(graphs, coder, FIRST, tmp_path)
    Path(f"{one.plan}.unfinished").write_bytes(b"half")
    with pytest.raises(BuildFailed, match=told):
        build(one, timeout_s)
    assert {path.name for path in tmp_path.iterdir()} == {"process.py"}


# ----------------------------------------------------------------------------------------------------- the stand-in


def test_the_stand_in_has_the_real_calls_and_no_others(trt: StandIn) -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    config = builder.create_builder_config()
    for name in ("FP16", "INT8"):  # gone in 11
        assert not hasattr(trt.BuilderFlag, name)
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        builder.platform_has_fast_fp16  # noqa: B018
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError):
        config.set_flag("REFIT")
    with pytest.raises(NotImplementedError):
        config.set_tactic_sources(1)


# --------------------------------------------------------------------------------------------------------- the backend


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, trt: StandIn, graphs: Path) -> TensorRT:
    """On a GPU that is none; the graphs have been exported before."""
    monkeypatch.setattr(
        export, "export", lambda coder, plan, folder: shutil.copytree(graphs, folder, dirs_exist_ok=True)
    )
    monkeypatch.setattr(tensorrt, "machine_name", lambda device: "no GPU sm00")
    monkeypatch.setattr(tensorrt, "WORKSPACE_BYTES", NEEDED_BYTES)
    monkeypatch.setattr(tensorrt, "MAX_ANY_PIXELS", 16)  # 8 latents
    monkeypatch.setattr(tensorrt, "build", lambda request, timeout_s: tensorrt_build.run(request))
    monkeypatch.setattr(tensorrt_runner, "CudaStream", lambda device: HostStream(trt))
    backend = TensorRT(torch.device("cuda"))
    assert backend.missing(Plan()) is None
    backend.device = torch.device("cpu")
    return backend


def test_the_backend_builds_and_runs_a_decoder(backend: TensorRT, coder: Coder, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    backend.build(coder, Plan(), folder)
    assert {path.name for path in folder.iterdir()} == {"first.plan", "next.plan"}
    assert [path.read_bytes() for path in tmp_path.glob("tensorrt-*.timings")] == [b"timings of this device"]
    run = backend.load(coder, Plan(), folder)
    for frames, expected in zip(decoded(run, chunks(0, 4, 6)), decoded(coder, chunks(0, 4, 6)), strict=True):
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_states_of_eager_are_taken(backend: TensorRT, coder: Coder, tmp_path: Path) -> None:
    backend.build(coder, Plan(), tmp_path)
    run = backend.load(coder, Plan(), tmp_path)
    first, *rest = chunks(0, 4, 6)
    with torch.inference_mode():
        states = coder(first, None)[1]
        ours = run(rest[0], states)[0]
        torch.testing.assert_close(ours, coder(rest[0], states)[0], rtol=0, atol=1e-5)


def test_engines_that_do_not_fit_leave_the_plans_alone(
    monkeypatch: pytest.MonkeyPatch, backend: TensorRT, coder: Coder, tmp_path: Path
) -> None:
    backend.build(coder, Plan(), tmp_path)
    monkeypatch.setattr(footprint, "free_bytes", lambda device, cached=False: 1000)
    with pytest.raises(Unavailable, match="0.00 GiB are free"):  # another error has them built again
        backend.load(coder, Plan(), tmp_path)


def test_a_plan_of_one_size_is_static(coder: Coder) -> None:
    """Decoded one latent frame at a time, a clip takes the least memory."""
    (plan,) = TensorRT(torch.device("cuda")).plans(Plan("bf16", (60, 104)))
    assert plan == Plan("bf16", (60, 104), chunk=1)
    assert extents(coder, plan) == ((1, 60, 104),) * 3
    assert TensorRT(torch.device("cuda")).plans(Plan()) == [Plan()]


def test_a_plan_for_any_size_has_a_bounded_largest_shape(coder: Coder) -> None:
    """A context's memory is that of its profile's largest shape."""
    for scale in (1, 2, 4, 8, 16, 32):
        smallest, likeliest, largest = extents(replace(coder, in_scale=1, out_scale=scale), Plan())
        assert largest[1] * largest[2] * scale**2 <= MAX_ANY_PIXELS**2
        assert scale < 8 or largest[1] * largest[2] <= ANY_AREA  # which every family's VAE shrinks at least
        assert smallest == (1, 2, 2) and all(a <= b <= c for a, b, c in zip(smallest, likeliest, largest, strict=True))


def test_sizes_outside_the_profile_are_built_by_their_own(coder: Coder, tmp_path: Path) -> None:
    chooser = Selector(replace(coder, out_scale=8), [], EngineCache(tmp_path), device=torch.device("cpu"))
    backend = TensorRT(torch.device("cuda"))
    assert chooser.plan_for((64, 64), backend) == Plan()
    for size in ((60, 104), (104, 60), (90, 160), (2, 65)):  # of 480p less than ANY_AREA latents, in a wider frame
        assert chooser.plan_for(size, backend) == Plan(size=size)
    assert chooser.plan_for((60, 104)) == Plan()


def test_fp32_plans_have_tf32(
    monkeypatch: pytest.MonkeyPatch, backend: TensorRT, coder: Coder, tmp_path: Path, trt: StandIn
) -> None:
    """As torch's own convolutions do on CUDA: without it eager is several times faster."""
    backend.build(coder, Plan(), tmp_path)
    assert "clear_flag" not in {method for _, method, _ in trt.calls}
    assert backend.options(Plan())["tf32"] is True


def test_what_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA GPU" in str(TensorRT(torch.device("cpu")).missing(Plan()))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install" in str(TensorRT(torch.device("cuda")).missing(Plan()))
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn(BINDINGS / "api.json", version="10.9.0.34"))
    assert "10.13 or newer" in str(TensorRT(torch.device("cuda")).missing(Plan()))
