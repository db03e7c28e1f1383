"""Plans of real graphs: bounded, strongly typed, refitted, built in a process of their own; on the stand-in."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skylapse.compile import tensorrt_build
from skylapse.compile.stream import FIRST, NEXT, Coder
from skylapse.compile.tensorrt_build import BuildFailed, build, profile_of

from .engines import BINDINGS, DYNAMIC, needs_bindings, request
from .stand_in import NEEDED_BYTES, StandIn

pytestmark = needs_bindings


@pytest.fixture(scope="module")
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["2.1"]


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
