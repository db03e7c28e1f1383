"""ONNX Runtime's providers on a GPU: tried in a process of their own, in order, each told what it has to know."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from skylapse.compile import providers
from skylapse.compile.backend import Unavailable
from skylapse.compile.onnxruntime import OnnxRuntime
from skylapse.compile.providers import CUDA, GRAPH, RTX, TENSORRT, options_of, probe
from skylapse.compile.stream import FIRST, NEXT, Coder, Plan

GPU = torch.device("cuda", 1)

# An onnxruntime whose providers load, crash, hang or fall back as FAKE_PROVIDERS says.
FAKE = """
import json, os, signal, sys
HOW = json.loads(os.environ["FAKE_PROVIDERS"])
MADE = []

def get_available_providers():
    return [*HOW, "CPUExecutionProvider"]

class SessionOptions:
    def add_session_config_entry(self, name, value): ...

class ExecutionMode:
    ORT_SEQUENTIAL = 0

class InferenceSession:
    def __init__(self, graph, options, providers, provider_options):
        (self.provider,), (told,) = providers, provider_options
        assert all(isinstance(value, str) for value in told.values())
        how = HOW[self.provider]
        if isinstance(graph, str):
            MADE.append((self.provider, graph, told))
            how = how.removeprefix("later ")
        if how == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            sys.stdin.read()
        if how == "raise":
            raise RuntimeError("libnvinfer.so.10: cannot open shared object file")
        self.how = how

    def get_providers(self):
        return ["CPUExecutionProvider"] if self.how == "fall" else [self.provider]

    def run(self, names, feed):
        import numpy
        return [numpy.array([0, 3 if self.how == "wrong" else 2], "float32")]
"""
Made = list[tuple[str, str, dict[str, str]]]
Install = Callable[..., Made]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put it in onnxruntime's place, here and in the probes' processes; returns the sessions that are made here."""
    monkeypatch.setattr(providers, "machine_name", lambda device: "a GPU sm90")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "onnxruntime.py").write_text(FAKE)

    def put(**how: str) -> Made:
        names = {"rtx": RTX, "trt": TENSORRT, "cuda": CUDA}
        monkeypatch.setenv("FAKE_PROVIDERS", json.dumps({names[name]: told for name, told in how.items()}))
        module: Any = types.ModuleType("onnxruntime")
        exec(compile(FAKE, "onnxruntime.py", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        probe.cache_clear()
        made: Made = module.MADE
        return made

    yield put
    probe.cache_clear()


@pytest.fixture
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["distilled"]


def test_probes_graph_is_a_graph() -> None:
    session = onnxruntime.InferenceSession(bytes.fromhex(GRAPH), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": torch.tensor([-1.0, 2.0]).numpy()})[0].tolist() == [0, 2]


def test_provider_that_crashes_hangs_or_lacks_a_library_is_told_apart(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(rtx="crash", trt="raise", cuda="works")
    assert probe(RTX, 0) == "it ends its process by signal 9"
    assert "libnvinfer.so.10: cannot open" in (probe(TENSORRT, 0) or "")
    assert probe(CUDA, 0) is None
    install(rtx="fall", trt="wrong")
    assert probe(RTX, 0) == "the session runs on CPUExecutionProvider"
    assert probe(TENSORRT, 0) == "max(x, 0) is wrong"


def test_provider_that_does_not_answer_is_ended(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PROBE_S", 0.2)
    monkeypatch.setattr(providers, "PROBE", "import threading; threading.Event().wait()")
    install(rtx="hang")
    assert probe(RTX, 0) == "it does not answer within 0.2 s"


def test_first_provider_that_works_runs_both_graphs(
    install: Install, coder: Coder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = install(rtx="crash", trt="later raise", cuda="works")
    backend = OnnxRuntime(GPU)
    assert backend.missing(Plan()) is None
    backend.load(coder, Plan(), tmp_path)
    assert backend.provider == CUDA
    assert [(provider, Path(path).name) for provider, path, _ in made] == [
        (TENSORRT, "first.onnx"),  # its probe was good, its session was not
        (CUDA, "first.onnx"),
        (CUDA, "next.onnx"),
    ]
    assert made[-1][2] == {"device_id": "1", "use_tf32": "1"}
    assert f"{RTX} is not used: it ends its process by signal 9" in caplog.text
    assert f"{TENSORRT} is not used: RuntimeError: libnvinfer" in caplog.text


def test_where_none_works_every_reason_is_told(install: Install, coder: Coder, tmp_path: Path) -> None:
    install(trt="raise", cuda="later fall")
    with pytest.raises(Unavailable, match=rf"{TENSORRT}: .*libnvinfer.*; {CUDA}: first.onnx runs on CPUExecution"):
        OnnxRuntime(GPU).load(coder, Plan(), tmp_path)
    install()
    assert "pip install onnxruntime-gpu" in (OnnxRuntime(GPU).missing(Plan()) or "")


def test_each_graph_artifact_and_version_has_its_own_engines(
    install: Install, coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(trt="works")
    plan = Plan("fp16", size=(4, 6))
    for name in ("one", "other"):
        OnnxRuntime(GPU).load(coder, plan, tmp_path / name)
    folders = [Path(told["trt_engine_cache_path"]) for _, _, told in made]
    assert len({*folders}) == 4 and all(folder.is_dir() for folder in folders)
    assert [folder.relative_to(tmp_path).parts[:2] for folder in folders] == [("one", "engines")] * 2 + [
        ("other", "engines")
    ] * 2
    monkeypatch.setattr(providers, "versions_of", lambda *names: {"tensorrt": "11.5"})
    newer = options_of(TENSORRT, coder, plan, FIRST, tmp_path / "one", GPU)
    assert Path(newer["trt_engine_cache_path"]) not in folders
    assert newer["trt_fp16_enable"] == "True" and newer["trt_engine_cache_enable"] == "True"
    assert newer["trt_profile_min_shapes"] == newer["trt_profile_max_shapes"] == "x:1x4x1x4x6"


def test_profiles_follow_from_the_states(install: Install, coder: Coder, tmp_path: Path) -> None:
    told = options_of(RTX, coder, Plan(), NEXT, tmp_path, GPU)
    assert told["nv_profile_min_shapes"] == "x:1x4x1x2x2,state_0:1x16x1x2x2,state_1:1x16x1x2x2"
    assert told["nv_profile_max_shapes"].startswith("x:1x4x4x128x128,state_0:1x16x1x128x128")  # 512 pixels a side
    assert Path(told["nv_runtime_cache_path"]).is_dir() and told["device_id"] == "1"


def test_engines_are_not_kept_in_a_folder_that_is_only_read(
    install: Install, coder: Coder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "engines").write_text("in the way")
    told = options_of(TENSORRT, coder, Plan(), FIRST, tmp_path, GPU)
    assert "trt_engine_cache_path" not in told and "compiles anew at each start" in caplog.text
