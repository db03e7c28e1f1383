"""A coder lowered to operators of our own: what its graph consists of, and which way a machine builds and runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from coded_clips import clip, coded

from skylapse.compile.cache import EngineCache
from skylapse.compile.onnxruntime import OnnxRuntime
from skylapse.compile.select import Selector
from skylapse.compile.stream import NEXT, Coder, Plan
from skylapse.kernels.cpu import library

Exported = Callable[[str, Plan], Path]
CPU = torch.device("cpu")
NATIVE = Plan(size=(4, 6), lowering="native")


@pytest.mark.parametrize("name", ["2.1", "encoder"])
def test_every_convolution_and_norm_is_an_operator_of_ours(
    coders: dict[str, Coder], exported: Exported, name: str
) -> None:
    model = onnx.load(exported(name, NATIVE) / f"{NEXT}.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    modules = Counter(type(module).__name__ for module in coders[name].module.modules())
    convolutions = modules["CausalConv3d"] + modules["Upsample"] + modules["Conv3d"]
    strided = modules["Downsample"]  # over time: a product of gathered frames
    assert kinds["CausalConv3d"] == convolutions - strided and kinds["HalvingConv2d"] == strided
    assert "Conv" not in kinds and "Sigmoid" not in kinds
    assert kinds["ReduceMean"] == modules["ResidualDownBlock"]  # its shortcut, which averages pixels


def test_norms_behind_a_convolution_are_done_by_it(coders: dict[str, Coder], exported: Exported) -> None:
    """All but attention's, which has no SiLU, and those of what is added behind it or behind a shortcut."""
    nodes = onnx.load(exported("2.1", NATIVE) / f"{NEXT}.onnx").graph.node
    by_output = {name: node for node in nodes for name in node.output if name}
    alone = [node for node in nodes if node.op_type == "RMSNorm"]
    behind = [by_output[node.input[0]].op_type for node in alone if node.attribute[0].i]
    assert "CausalConv3d" not in behind and len(alone) == 2
    fused = [node for node in nodes if node.op_type == "CausalConv3d" and len(node.output) == 2]
    norms = sum(type(module).__name__ == "RMSNorm" for module in coders["2.1"].module.modules())
    assert len(fused) + len(alone) == norms
    used = {name for node in nodes for name in node.input}
    assert all(not node.output[0] or node.output[0] in used for node in fused)
    with_residual = [node for node in nodes if node.op_type == "CausalConv3d" and len(node.input) > 4 and node.input[4]]
    assert len(with_residual) == sum(type(m).__name__ == "ResidualBlock" for m in coders["2.1"].module.modules())


def test_frames_are_not_joined_to_their_past(exported: Exported) -> None:
    nodes = onnx.load(exported("2.1", NATIVE) / f"{NEXT}.onnx").graph.node
    assert not [node for node in nodes if node.op_type == "Concat" and len(node.input) == 2]
    assert sum(node.op_type == "LastFrames" for node in nodes) == sum(
        node.op_type == "CausalConv3d" and len(node.input) > 3 and bool(node.input[3]) for node in nodes
    )


@pytest.mark.parametrize(
    ("level", "compiler", "ways"),
    [
        ("AVX2", "/usr/bin/c++", ["native", "planar"]),
        ("AVX2", None, ["planar", "native"]),
        (None, "/usr/bin/c++", ["planar"]),
    ],
)
def test_way_depends_on_processor_and_compiler(
    monkeypatch: pytest.MonkeyPatch, level: str | None, compiler: str | None, ways: list[str]
) -> None:
    monkeypatch.setattr(library, "level", lambda: level)
    monkeypatch.setattr(library, "compiler", lambda: compiler)
    assert [plan.lowering for plan in OnnxRuntime(CPU).plans(Plan())] == ways
    assert OnnxRuntime(torch.device("cuda")).plans(Plan()) == [Plan()]


def test_other_operators_are_another_artifact(
    coders: dict[str, Coder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OnnxRuntime(CPU)
    chooser = Selector(coders["2.1"], [backend], EngineCache(tmp_path), device=CPU)
    before = chooser.key(backend, Plan())
    monkeypatch.setattr(library, "digest", lambda: "another")
    assert chooser.key(backend, Plan()).id != before.id


def test_artifact_built_elsewhere_needs_no_compiler(
    coders: dict[str, Coder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Baked into an image by a machine with a compiler, and found by one without, whose own way it is not."""
    coder, backend = coders["2.1"], OnnxRuntime(CPU, threads=1)
    plan = Plan(size=(4, 6))
    there = Selector(coder, [backend], EngineCache(tmp_path / "baked"), device=CPU)
    there.cache.build(there.key(backend, plan), lambda folder: backend.build(coder, backend.plans(plan)[0], folder))
    monkeypatch.setattr(library, "compiler", lambda: None)
    here = Selector(coder, [backend], EngineCache(tmp_path / "own", [tmp_path / "baked"]), device=CPU)
    here.measure = lambda runs, *_: {name: float(name == "eager") for name in runs}  # type: ignore[method-assign]
    assert here.cache.find(here.key(backend, plan)) is None
    choice = here.choose(4, 6)
    assert choice.backend == "onnxruntime" and here.demotions == []
    assert [standing.state for standing in here.standings((4, 6))] == ["built", "built"]
    x = clip(coder, 5, (4, 6))
    expected = coded(coder, coder, x, 2)
    assert (coded(choice.run, coder, x, 2) - expected).abs().max() < 1e-5 * expected.abs().max()
