"""Attention in exported graphs stays within its bound; frames that no graph for any size may take have their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from coded_clips import clip, coded
from fake_backend import Fake
from tiny import draw_weights
from torch import Tensor, nn

from skylapse.compile import attention
from skylapse.compile.cache import EngineCache
from skylapse.compile.onnxruntime import OnnxRuntime
from skylapse.compile.select import Selector
from skylapse.compile.stream import NEXT, Coder, Plan
from skylapse.runtime.vae.wan import AttentionBlock, Stream

CPU = torch.device("cpu")
SIZE = (6, 8)


class Attending(nn.Module):
    """Wan's attention block, and a state, which a coder has to have."""

    def __init__(self) -> None:
        super().__init__()
        self.block = AttentionBlock(8)

    def forward(self, x: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        y = self.block(x, Stream(states))
        return (y if states is None else y + states[0]), [y[:, :, -1:]]


@pytest.fixture
def coder() -> Coder:
    return Coder("decoder", draw_weights(Attending(), 0).requires_grad_(False), 8, 8, 1, 1, 1, 1)


@pytest.mark.parametrize("chunk", [None, 3], ids=["any chunk", "three frames"])
def test_bounded_graph_decodes_as_eager_does(
    coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    """48 tokens, of 4 frames where their number is free: 10 queries at a time are 4 products, and 8 a fifth."""
    monkeypatch.setattr(attention, "MAX_SCORES", 48 * 10 * (chunk or 4))
    backend = OnnxRuntime(CPU, threads=1)
    plan = backend.plans(Plan(size=SIZE, chunk=chunk))[0]
    backend.build(coder, plan, tmp_path)
    model = onnx.load(tmp_path / f"{NEXT}.onnx")
    assert len([node for node in model.graph.node if node.op_type == "Softmax"]) == 5
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {v.name: [side.dim_value for side in v.type.tensor_type.shape.dim] for v in inferred.graph.value_info}
    softmaxes = [shapes[node.output[0]][-2:] for node in model.graph.node if node.op_type == "Softmax"]
    assert softmaxes == [[10, 48]] * 4 + [[8, 48]]
    run = backend.load(coder, plan, tmp_path)
    x = clip(coder, 7, SIZE)
    for frames in (3,) if chunk else (1, 4):
        expected = coded(coder, coder, x, frames)
        assert (coded(run, coder, x, frames) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_queries_of_each_size_of_group_attend_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, 35, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    for scores in (1, 3 * 35 * 4, 3 * 35 * 34, 3 * 35 * 35):
        monkeypatch.setattr(attention, "MAX_SCORES", scores)
        assert (attention.bounded_attention(q, k, v) - expected).abs().max() < 1e-12


def test_frames_above_the_bound_are_built_by_their_size(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = Selector(replace(coder, max_any_area=47), [fake], EngineCache(tmp_path), device=CPU)
    chooser.measure = lambda runs, *_: {name: float(name == "eager") for name in runs}  # type: ignore[method-assign]
    assert chooser.plan_for((6, 7)) == Plan() and chooser.plan_for(SIZE) == Plan(size=SIZE)
    assert chooser.build(fake, None, measure_at=(6, 7)).backend == "fake"
    choice = chooser.choose(*SIZE)
    assert choice.backend == "eager" and "skylapse compile --size WxH" in choice.why
    assert [standing.state for standing in chooser.standings(SIZE)] == ["built", "not built"]
    assert chooser.build(fake, chooser.plan_for(SIZE).size, measure_at=SIZE).backend == "fake"
