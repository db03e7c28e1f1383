"""Quantised loading: the right weights, from the file's numbers, in little memory, told wherever a precision is."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import relative_l2
from kernels.calls import Calls
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, save_checkpoint
from torch import Tensor, nn

from skylapse import Engine, VideoRequest
from skylapse.cli import main
from skylapse.kernels.linear import linear
from skylapse.kernels.linear_quantized import DTYPES, quantize_rows
from skylapse.kernels.live_bytes import LiveBytes
from skylapse.kernels.weight_formats import FORMATS, Functions, WeightFormat
from skylapse.runtime.cache.calibration import Calibration, read_calibrations, write_calibration
from skylapse.runtime.checkpoints.hub import DEMO_FOLDER
from skylapse.runtime.checkpoints.weights import load_weights
from skylapse.runtime.families.wan.compiled import compile_trunk
from skylapse.runtime.families.wan.denoiser import WanConfig, WanDenoiser
from skylapse.runtime.layers.linear import Linear
from skylapse.runtime.layers.quantization import parse_quantize, quantized_weights

CPU = torch.device("cpu")
REQUEST = VideoRequest(prompt="a star", width=64, height=64, num_frames=5, num_inference_steps=4)
KINDS = ("fp8", "int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-t2v", tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def exact(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), device="cpu", dtype="fp32")


def engine_of(folder: Path, quantize: str | None) -> Engine:
    return Engine.from_pretrained(str(folder), device="cpu", dtype="fp32", quantize=quantize)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_of_blocks_are_quantised_and_nothing_else(kind: str, folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder), device="cpu", dtype="bf16", quantize=kind)
    kept = {name: p.dtype for name, p in engine.model.experts[0].named_parameters() if not name.endswith("_scale")}
    names = {name for name, dtype in kept.items() if dtype == DTYPES[kind]}
    parts = ("attn1.qkv", "attn1.out", "attn2.q", "attn2.kv", "attn2.out", "ffn.up", "ffn.down")
    assert names == {f"blocks.{index}.{part}.weight" for index in (0, 1) for part in parts}
    assert {dtype for name, dtype in kept.items() if name not in names} == {torch.bfloat16, torch.float32}
    assert engine.dtype == torch.bfloat16 and engine.quantize == kind


@pytest.mark.parametrize("kind", KINDS)
def test_fused_rows_are_quantised_from_the_files_own_numbers(kind: str, folder: Path) -> None:
    (path,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    model = Engine.from_pretrained(str(folder), device="cpu", dtype="bf16", quantize=kind).model.experts[0]
    qkv = model.layers[1].attn1.qkv
    whole = torch.cat([tensors[f"blocks.1.attn1.to_{part}.weight"] for part in "qkv"])
    values, scales = quantize_rows(whole.float(), DTYPES[kind])
    assert torch.equal(qkv.weight.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(qkv.weight_scale, scales)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.1), ("fp8", 0.3)])
def test_results_are_near_the_exact_ones(kind: str, error: float, folder: Path, exact: Engine) -> None:
    """The weights are random, which is the hardest case; benchmarks/results has the errors of a trained model."""
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    off = relative_l2(
        engine_of(folder, kind).generate_latents(REQUEST, noise.clone()), exact.generate_latents(REQUEST, noise.clone())
    )
    assert 1e-4 < off < error


def test_compiled_blocks_multiply_quantised_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Padding moves last bits, and by them now and then an activation to its neighbouring level, which steps on random
    # weights then enlarge: within 2e-4 after two steps over eight seeds, up to 3.5e-2 after four.
    request = replace(REQUEST, num_inference_steps=2)
    plain = engine_of(folder, "int8").generate_latents(request)
    monkeypatch.setenv("SKYLAPSE_COMPILE", "1")
    monkeypatch.setattr("skylapse.runtime.engine.engine.compile_trunk", partial(compile_trunk, backend="eager"))
    torch._dynamo.reset()
    assert relative_l2(engine_of(folder, "int8").generate_latents(request), plain) < 1e-3


def test_loading_never_holds_the_exact_weights_beside_the_quantised() -> None:
    config = WanConfig(**{k: v for k, v in read_config().items() if not k.startswith("_")})
    peaks = {}
    for kind in (None, "int8"):
        with torch.device("meta"):
            denoiser = WanDenoiser(config)
        quantized = quantized_weights(denoiser, kind)
        with LiveBytes() as live:
            load_weights(denoiser, DEMO_FOLDER / "transformer", device=CPU, dtype=torch.float32, quantized=quantized)
        peaks[kind] = live.peak_bytes, sum(p.nbytes for p in denoiser.parameters())
    exact_bytes, quantised_bytes = peaks[None][1], peaks["int8"][1]
    largest = 4 * 1024 * 256  # of a block's projections, in fp32
    assert quantised_bytes < 0.4 * exact_bytes
    assert peaks["int8"][0] < quantised_bytes + 5 * largest < 0.7 * exact_bytes


def read_config() -> dict[str, object]:
    fields = json.loads((DEMO_FOLDER / "transformer" / "config.json").read_text())
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize("quantize", [None, *KINDS])
@pytest.mark.parametrize("variant", ["wan2.1-flf2v", "wan2.2-t2v-a14b"])
def test_inspect_predicts_what_the_weights_take(
    variant: str, quantize: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert variant in VARIANTS
    path = str(save_checkpoint(variant, tmp_path))
    assert main(["models", "inspect", path, "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["loaded_bytes"]
    engine = Engine.from_pretrained(path, device="cpu", dtype="bf16", quantize=quantize)
    assert predicted["+".join(filter(None, ("bf16", quantize)))] == engine.model.num_bytes


def test_inspect_tells_people_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "inspect", "demo"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("weights"))
    assert line == "weights   24.8 MiB in bf16 (18.8 MiB with --quantize), 38.1 MiB in fp32 (20.2 MiB with --quantize)"


def test_sides_that_are_no_multiples_of_16_are_named(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": Linear(24, {"up": 32})})])

    save_file(
        {"blocks.0.up.weight": torch.ones(32, 24), "blocks.0.up.bias": torch.ones(32)},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    with torch.device("meta"):
        module = Block()
    with pytest.raises(
        ValueError, match=r"blocks.0.up.weight cannot be quantised to int8: .* multiples of 16, got \[32, 24\]"
    ):
        load_weights(
            module, tmp_path, device=CPU, dtype=torch.float32, quantized=quantized_weights(module, "int8")
        )  # fmt: skip


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_the_environment_decides_where_no_argument_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_QUANTIZE", "int8")
    assert [engine_of(folder, asked).quantize for asked in (None, "fp8", "none")] == ["int8", "fp8", None]


def test_unknown_word_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantize must be none, fp8 or int8, got 'int4'"):
        engine_of(folder, "int4")
    monkeypatch.setenv("SKYLAPSE_QUANTIZE", "fp4")
    with pytest.raises(ValueError, match="SKYLAPSE_QUANTIZE must be none or fp8 or int8, got 'fp4'"):
        engine_of(folder, None)


def test_fp8_is_refused_on_a_gpu_that_cannot_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert parse_quantize("int8", device) == "int8"
    with pytest.raises(ValueError, match="fp8 needs a GPU of sm_89 or newer, and this is sm_86: int8 works there"):
        parse_quantize("fp8", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert parse_quantize("fp8", device) == "fp8"
    assert parse_quantize("none", device) is None


# --- who knows of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "other"), [("int8", None), (None, "fp8"), ("fp8", "int8")])
def test_a_job_does_not_go_on_in_another_precision(
    saved: str | None, other: str | None, folder: Path, tmp_path: Path
) -> None:
    engine = engine_of(folder, saved)
    engine.submit(REQUEST, checkpoint_every=1, checkpoint_dir=tmp_path)
    while not (tmp_path / "state.json").exists():
        engine.step()
    here, there = ("+".join(filter(None, ("float32", kind))) for kind in (other, saved))
    with pytest.raises(
        ValueError, match=f"was made with dtype '{there}', and this engine has '{here}'".replace("+", r"\+")
    ):
        engine_of(folder, other).resume(tmp_path)
    engine_of(folder, saved).resume(tmp_path)


def test_memory_profiles_are_kept_apart(
    folder: Path, exact: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLAPSE_PROFILE_DIR", str(tmp_path))
    engines = [engine_of(folder, kind) for kind in (None, *KINDS)]
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert engines[1].memory.available_bytes > engines[0].memory.available_bytes


def test_calibrations_of_quantised_weights_serve_no_others(folder: Path) -> None:
    exact = Calibration("unipc", 30, 5.0, 4.0, magnitudes=(1.0,) * 30)
    other = Calibration("unipc", 20, 5.0, 4.0)
    quantised = replace(exact, quantize="int8", magnitudes=(0.9,) * 30)
    for entry in (exact, other, quantised):
        write_calibration(folder, entry)
    file = read_calibrations(folder)
    assert len(file.entries) == 3
    assert file.serving("int8").find("unipc", 30, 5.0) == quantised
    assert file.serving("int8").find("unipc", 20, 5.0) == other
    assert file.serving("fp8").find("unipc", 30, 5.0) == exact
    assert file.serving(None).find("unipc", 30, 5.0) == exact and len(file.serving(None).entries) == 2
    assert engine_of(folder, "int8").model.calibrations.find("unipc", 30, 5.0) == quantised
    (folder / "cache.json").unlink()


# --- a format that nobody knew ----------------------------------------------------------------------------------------

BLOCK = 16


def int4_tensors(num_outputs: int, num_inputs: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the tensors' shapes: two values a byte, and an fp16 scale a block of 16, as NVFP4 has an fp8 one."""
    blocks = num_outputs, num_inputs // BLOCK
    return {"weight": ((num_outputs, num_inputs // 2), "uint8"), "block_scale": (blocks, "float16")}


def load_int4() -> Functions:
    def quantize(rows: Tensor) -> dict[str, Tensor]:
        blocks = rows.unflatten(1, (-1, BLOCK))
        scales = (blocks.abs().amax(-1) / 7).half()
        values = (blocks / scales[..., None].float()).round().clamp(-7, 7).flatten(1).to(torch.int8) + 8
        low, high = values[:, ::2].to(torch.uint8), values[:, 1::2].to(torch.uint8)
        return {"weight": low | high << 4, "block_scale": scales}

    def run(x: Tensor, bias: Tensor | None, activation: Any, *, weight: Tensor, block_scale: Tensor) -> Tensor:
        values = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).to(x.dtype) - 8
        exact = (values.unflatten(1, (-1, BLOCK)) * block_scale[..., None].to(x.dtype)).flatten(1)
        return linear(x, exact, bias, activation)

    return Functions(quantize, run)


def test_another_format_is_one_entry(
    folder: Path, exact: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A format is asked for by its name, loaded, predicted, kept apart and run, though no file knows of it."""
    form = WeightFormat("int4", int4_tensors, load_int4, multiple_of=BLOCK, needs=100)
    monkeypatch.setitem(FORMATS, "int4", form)
    engine = engine_of(folder, "int4")
    up = engine.model.experts[0].layers[0].ffn.up
    assert (up.format, up.weight.dtype, up.weight.shape) == (form, torch.uint8, (up.out_features, up.in_features // 2))
    plain = exact.model.experts[0].layers[0].ffn.up
    x = torch.randn(9, up.in_features, generator=torch.Generator().manual_seed(0))
    assert 0.02 < relative_l2(up(x, "gelu_tanh"), plain(x, "gelu_tanh")) < 0.2
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    off = relative_l2(engine.generate_latents(REQUEST, noise.clone()), exact.generate_latents(REQUEST, noise.clone()))
    assert 1e-4 < off < 0.5
    assert main(["models", "inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loaded_bytes"]["fp32+int4"] == engine.model.num_bytes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="int4 needs a GPU of sm_100 or newer, and this is sm_90: fp8 and int8 works"):
        parse_quantize("int4", torch.device("cuda"))


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_device_gets_the_files_own_bytes(tmp_path: Path) -> None:
    """Numbers are converted on the device: fp32 made on the host would be twice the traffic of a file in bf16."""
    weight = torch.randn(32, 64).bfloat16()
    save_file(
        {"blocks.0.up.weight": weight, "blocks.0.up.bias": torch.ones(32)},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    with torch.device("meta"):
        module = nn.Module()
        module.blocks = nn.ModuleList([nn.ModuleDict({"up": Linear(64, {"up": 32})})])
    form = quantized_weights(module, "int8")
    with Calls() as calls:
        load_weights(module, tmp_path, device=torch.device("meta"), dtype=torch.bfloat16, quantized=form)
    sent = [
        given["self"].dtype if given["dtype"] is None else given["dtype"]
        for name, given in calls.made
        if name == "aten._to_copy.default" and given["device"] == torch.device("meta") and not given["self"].is_meta
    ]
    assert sent == [torch.bfloat16]
