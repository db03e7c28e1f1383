"""Exported graphs are checked, of few operators, of the plan's types and sides; states' shapes are as they are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from coded_clips import clip, coded
from torch import Tensor, nn

from skylapse.compile import export as exporter
from skylapse.compile.export import OPSET, check, example, export
from skylapse.compile.stream import FIRST, NEXT, Coder, Plan
from skylapse.runtime.vae.coders import decoder_of, encoder_of
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

Exported = Callable[[str, Plan], Path]
STATIC = {"2.1": Plan(size=(4, 6)), "2.2": Plan(size=(4, 6), chunk=3)}


@pytest.mark.parametrize("name", ["2.1", "2.2", "encoder", "distilled"])
@torch.inference_mode()
def test_states_have_the_shapes_that_are_told(coders: dict[str, Coder], name: str) -> None:
    coder = coders[name]
    for size in ((3, 5), (8, 4)):
        x = clip(coder, 3, size)
        y, states = coder(x[:, :, :1], None)
        assert [tuple(state.shape) for state in states] == coder.states.at(*size)
        assert tuple(y.shape) == coder.output_shape(x[:, :, :1].shape, FIRST)
        num_bytes = sum(state.nbytes for state in states)
        z, later = coder(x[:, :, 1:], states)
        assert [tuple(state.shape) for state in later] == coder.states.at(*size)
        assert tuple(z.shape) == coder.output_shape(x[:, :, 1:].shape, NEXT)
        assert coder.states.num_bytes(*size, 4) == num_bytes


def test_published_decoders_states_are_told_without_their_memory() -> None:
    """Wan2.1's and Wan2.2's: 32 and 34 tensors; of 480 x 832 pixels 3.7 and 1.9 GB in fp32."""
    wan_22 = dict(
        base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2, in_channels=12, out_channels=12
    )
    for config, size in ((WanVAEConfig(), (60, 104)), (WanVAEConfig(**wan_22, scale_factor_spatial=16), (30, 52))):
        with torch.device("meta"):
            vae = WanVAE(config)
        spec = decoder_of(vae).states
        _, states = vae.decode_chunk(torch.empty(1, config.z_dim, 1, *size, device="meta"))
        assert [tuple(state.shape) for state in states] == spec.at(*size)
        assert 1e9 < spec.num_bytes(*size, 4) < 6e9
        frames = torch.empty(1, 3, 1, 480, 832, device="meta")
        assert [tuple(s.shape) for s in vae.encode_chunk(frames)[1]] == encoder_of(vae).states.at(*size)


def test_static_graph_has_the_plans_sides_and_dynamic_graph_none(exported: Exported) -> None:
    static = onnx.load(exported("2.2", STATIC["2.2"]) / "next.onnx")
    assert [side.dim_value for side in static.graph.input[0].type.tensor_type.shape.dim] == [1, 4, 3, 4, 6]
    dynamic = onnx.load(exported("distilled", Plan(lowering="planar")) / "next.onnx")
    sides = dynamic.graph.input[0].type.tensor_type.shape.dim
    assert [bool(side.dim_param) for side in sides] == [False, False, True, True, True]
    for model in (static, dynamic):
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
        assert [value.name for value in model.graph.output][:2] == ["y", "new_state_0"]


def test_frames_are_enlarged_behind_the_convolution_not_by_gathering(exported: Exported) -> None:
    model = onnx.load(exported("2.1", STATIC["2.1"]) / "next.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DepthToSpace") == 1 and "Resize" not in kinds
    assert not {"GatherND", "Loop", "If", "Scan"} & set(kinds)


def test_planar_graph_turns_no_clip_around_for_a_convolution_or_a_norm(exported: Exported) -> None:
    """What the residual blocks make is frames already; only the latents are turned into them, and the states."""
    model = onnx.load(exported("2.1", Plan(size=(4, 6), lowering="planar")) / "next.onnx")
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    readers = [node for node in model.graph.node if node.op_type in ("Conv", "Mul", "Sigmoid")]
    turned = [node.name for node in readers for name in node.input if made_by.get(name) == "Transpose"]
    assert len(readers) > 20 and len(turned) <= 2, turned
    assert list(made_by.values()).count("ReduceMean") == 1  # attention's, of tokens


def test_bf16_graph_convolves_in_bf16_and_norms_in_fp32(exported: Exported) -> None:
    folder = exported("2.1", Plan("bf16", size=(4, 6)))
    inferred = onnx.shape_inference.infer_shapes(onnx.load(folder / "next.onnx"), strict_mode=True, data_prop=True)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    types |= {t.name: t.data_type for t in inferred.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.input, *inferred.graph.output)}
    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert {types[v.name] for v in (*inferred.graph.input, *inferred.graph.output)} == {bf16}
    convolutions = [node for node in inferred.graph.node if node.op_type == "Conv"]
    assert convolutions and all(types[name] == bf16 for node in convolutions for name in node.input)
    means = [node for node in inferred.graph.node if node.op_type == "ReduceMean"]
    assert means and all(types[node.input[0]] == fp32 for node in means)


def test_weights_stand_outside_a_graph_that_is_too_large_for_one_file(coders: dict[str, Coder], tmp_path: Path) -> None:
    plan = Plan(size=(2, 2), chunk=1)
    export(coders["distilled"], plan, tmp_path, external_above_bytes=1000)
    assert (tmp_path / "next.onnx.data").stat().st_size > 4 * 16 * 32 * 9
    assert (tmp_path / "next.onnx").stat().st_size < 40_000
    check(tmp_path / "next.onnx", coders["distilled"], plan, NEXT)


def test_foreign_operator_is_refused(coders: dict[str, Coder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "OPERATORS", exporter.OPERATORS - {"Conv"})
    with pytest.raises(ValueError, match=r"first\.onnx has operators that not every backend knows: Conv"):
        export(coders["distilled"], Plan(size=(2, 2), chunk=1), tmp_path)


def test_graph_of_another_plan_is_refused(coders: dict[str, Coder], exported: Exported) -> None:
    path = exported("2.1", STATIC["2.1"]) / "next.onnx"
    with pytest.raises(ValueError, match=r"next\.onnx: x must be \[1, 4, 3, 5, 6\]"):
        check(path, coders["2.1"], Plan(size=(5, 6)), NEXT)
    with pytest.raises(ValueError, match="x must be FLOAT16"):
        check(path, coders["2.1"], Plan("fp16", size=(4, 6)), NEXT)
    with pytest.raises(ValueError, match="must be of opset 22 alone"):
        check(path, coders["2.1"], Plan("bf16", size=(4, 6)), NEXT)


def test_state_that_does_not_grow_with_the_frame_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
            return x * self.scale, [x.new_zeros(1, 1, 1, 7, 7)]

    with pytest.raises(ValueError, match="does not grow with latents"):
        _ = Coder("decoder", Fixed(), 4, 4, 1, 1, 1, 1).states


@torch.inference_mode()
def test_planar_convolutions_are_the_same_function(coders: dict[str, Coder]) -> None:
    """Winograd's of 4, of 2, and stacked frames, against the 3-D convolution, in fp64."""
    from skylapse.compile.lowering import planar_conv3d

    generator = torch.Generator().manual_seed(0)
    for taps, kernel, num_frames in ((3, 3, 8), (3, 3, 6), (3, 3, 5), (3, 1, 4), (1, 3, 3)):
        x = torch.randn(1, 6, num_frames + taps - 1, 5, 7, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 6, taps, kernel, kernel, generator=generator, dtype=torch.float64)
        bias = torch.randn(4, generator=generator, dtype=torch.float64)
        padding = (0, kernel // 2, kernel // 2)
        expected = torch.nn.functional.conv3d(x, weight, bias, padding=padding)
        y = planar_conv3d(x[0].transpose(0, 1), weight, bias, (1, 1, 1), padding).transpose(0, 1)
        assert (y - expected[0]).abs().max() < 1e-12


def test_digest_tells_weights_apart(coders: dict[str, Coder]) -> None:
    before = decoder_of(_vae(0)).digest
    assert before == decoder_of(_vae(0)).digest != decoder_of(_vae(1)).digest
    with_encoder = _vae(0)
    torch.nn.init.zeros_(with_encoder.encoder.conv_in.weight)
    assert decoder_of(with_encoder).digest == before  # a decoder is built of its own weights


def _vae(seed: int) -> WanVAE:
    torch.manual_seed(seed)
    return WanVAE(WanVAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 2), temperal_downsample=(True,), num_res_blocks=1))


def test_example_is_of_the_plan(coders: dict[str, Coder]) -> None:
    x, *states = example(coders["2.1"], Plan("bf16", size=(3, 4), chunk=2), NEXT)
    assert x.shape == (1, 4, 2, 3, 4) and x.dtype == torch.bfloat16
    assert coded(coders["2.1"], coders["2.1"], clip(coders["2.1"], 3, (3, 4)), 2).shape == (1, 3, 5, 6, 8)
    assert len(states) == len(coders["2.1"].states.shapes)
