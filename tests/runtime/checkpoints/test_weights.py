"""Checkpoints: what does not fit is named, nothing is guessed, nothing but safetensors is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BASE, VARIANTS, save_checkpoint

from skylapse import Engine
from skylapse.runtime.checkpoints.registry import inspect_model, list_models, read_folder
from skylapse.runtime.checkpoints.weights import load_weights, weight_files
from skylapse.runtime.families.wan.denoiser import WanConfig, WanDenoiser

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-t2v", tmp_path_factory.mktemp("complete"))


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Engine.from_pretrained(str(folder), device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_key_is_named(folder: Path) -> None:
    change_weights(folder / WEIGHTS, lambda tensors: tensors.pop("blocks.1.attn1.to_k.weight"))
    assert "missing: blocks.1.attn1.to_k.weight" in refusal(folder)


def test_an_unexpected_key_is_named(folder: Path) -> None:
    change_weights(folder / WEIGHTS, lambda tensors: tensors.update({"blocks.7.extra": torch.zeros(1)}))
    assert "unexpected: blocks.7.extra" in refusal(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    change_weights(folder / WEIGHTS, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)}))
    assert "wrong shape: proj_out.bias [3], expected [16]" in refusal(folder)


def test_a_transposed_patch_embedding_does_not_fit(folder: Path) -> None:
    change_weights(
        folder / WEIGHTS, lambda tensors: tensors.update({"patch_embedding.weight": torch.zeros(48, 15, 1, 1, 1)})
    )
    assert "wrong shape: patch_embedding.weight" in refusal(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "transformer/diffusion_pytorch_model.safetensors is not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_truncated_components_are_named(folder: Path, part: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    assert part in refusal(folder)


def test_a_text_encoder_without_a_key_is_refused(folder: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    change_weights(folder / "text_encoder" / "model.safetensors", lambda tensors: tensors.pop(name))
    assert name in refusal(folder)


def test_a_pickled_checkpoint_is_not_read(folder: Path) -> None:
    path = folder / WEIGHTS
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert "pickled checkpoints are not read" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_missing_or_broken_json_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    assert Path(name).name in refusal(folder)
    (folder / name).unlink()
    assert Path(name).name in refusal(folder)


def test_an_unknown_config_field_is_refused_unless_it_is_off(folder: Path) -> None:
    change_json(folder / "transformer" / "config.json", mystery_gate=None)
    Engine.from_pretrained(str(folder), device="cpu")
    change_json(folder / "transformer" / "config.json", mystery_gate=2)
    assert "unknown field mystery_gate = 2" in refusal(folder)


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    change_json(folder / "model_index.json", transformer=["diffusers", "HunyuanVideoTransformer3DModel"])
    assert "transformer must be WanTransformer3DModel, got HunyuanVideoTransformer3DModel" in refusal(folder)


@pytest.mark.parametrize("name", ["no-such-model", "../x", "a/b/c", ""])
def test_an_unknown_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model must be"):
        Engine.from_pretrained(name)


def test_sharded_weights_equal_a_single_file(folder: Path) -> None:
    path = folder / WEIGHTS
    tensors = load_file(path)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, path.with_name(shard))
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    whole = load(folder / "transformer")
    path.unlink()
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))
    assert len(weight_files(folder / "transformer")) == 2
    for (name, one), (_, other) in zip(
        whole.named_parameters(), load(folder / "transformer").named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    path.with_name("b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"files that are not there: b\.safetensors"):
        load(folder / "transformer")


def load(folder: Path) -> WanDenoiser:
    with torch.device("meta"):
        denoiser = WanDenoiser(WanConfig(**BASE))
    load_weights(denoiser, folder, device=torch.device("cpu"), dtype=torch.float32)
    return denoiser


def test_inspect_counts_parameters_and_names_tasks(complete: Path) -> None:
    report = inspect_model(str(complete))
    (transformer,) = (part for part in report.components if part.name == "transformer")
    assert transformer.num_parameters == sum(p.numel() for p in load(complete / "transformer").parameters())
    assert transformer.dtypes == ("F32",) and transformer.num_bytes == 4 * transformer.num_parameters
    assert report.tasks == ["text-to-video", "video-to-video"] and report.native_sizes == [(832, 480)]
    assert report.defaults.num_inference_steps == 50 and report.defaults.guidance_scale == 5.0  # WanPipeline.__call__'s
    assert report.limits.size_multiple == 16


@pytest.mark.parametrize(
    ("variant", "tasks"),
    [
        ("wan2.1-i2v", ["image-to-video", "video-extension"]),
        ("wan2.1-flf2v", ["image-to-video", "first-and-last-frame-to-video", "video-extension"]),
        ("wan2.2-i2v-a14b", ["image-to-video", "first-and-last-frame-to-video", "video-extension"]),
        (
            "wan2.2-ti2v-5b",
            [
                "text-to-video",
                "video-to-video",
                "image-to-video",
                "first-and-last-frame-to-video",
                "video-extension",
            ],
        ),
    ],
)
def test_tasks_follow_from_the_configs(variant: str, tasks: list[str], tmp_path: Path) -> None:
    assert variant in VARIANTS
    assert read_folder(save_checkpoint(variant, tmp_path)).tasks == tasks


def test_the_demo_model_is_listed() -> None:
    assert list_models()[0].name == "demo"
