"""Model folders that people have: loaded rightly or refused in one line, by `models inspect` and `generate` alike."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_folders import IMAGE, INDEX, VAE, set_fields
from safetensors.torch import load_file, save_file

from skylapse import Engine, VideoRequest
from skylapse.cli import main
from skylapse.runtime.checkpoints.registry import inspect_model, read_folder

IMAGES = ("tokenizer", "scheduler", "text_encoder", "vae", "transformer", "image_encoder", "image_processor")


def frames_of(folder: Path) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    request = VideoRequest(prompt="a star", width=32, height=32, num_frames=5, num_inference_steps=2, image=picture)
    return Engine.from_pretrained(str(folder), device="cpu").generate(request).frames


# ----------------------------------------------------------------------------------------------- parts of the folder


@pytest.mark.parametrize("part", IMAGES)
def test_a_missing_part_is_named(part: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    shutil.rmtree(folder / part)
    assert refusal(folder).startswith((f"{part} is missing", f"{part}/config.json is missing"))


@pytest.mark.parametrize("part", IMAGES)
def test_a_part_that_is_not_promised_is_named(part: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    set_fields(folder / INDEX, **{part: [None, None]})
    assert f"model_index.json: there is no {part}" in refusal(folder)


def test_a_second_expert_that_is_promised_and_missing_is_named(two: Path, refusal: Callable[[Path], str]) -> None:
    shutil.rmtree(two / "transformer_2")
    assert refusal(two) == "transformer_2/config.json is missing"


def test_experts_of_two_kinds_are_named(two: Path, refusal: Callable[[Path], str]) -> None:
    set_fields(two / "transformer_2" / "config.json", num_layers=1)
    assert refusal(two) == "transformer_2/config.json: num_layers must be 2, as in transformer, got 1"


def test_a_second_expert_that_diffusers_would_not_use_is_ignored_by_name(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_fields(two / INDEX, boundary_ratio=None)
    set_fields(two / "transformer_2" / "config.json", num_layers="broken")  # nobody looks
    assert inspect_model(str(two)).ignored == {"transformer_2": "boundary_ratio is not set"}
    assert len(Engine.from_pretrained(str(two), device="cpu").model.experts) == 1
    assert "transformer_2 is ignored: boundary_ratio is not set" in caplog.text


def test_parts_that_nothing_uses_are_ignored_by_name(
    pair: Path, two: Path, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("image_encoder", "image_processor"):
        shutil.copytree(folder / part, two / part)
    set_fields(two / INDEX, image_encoder=["transformers", "CLIPVisionModel"], safety_checker=["a", "B"])
    report = inspect_model(str(two))
    assert list(report.ignored) == ["image_encoder", "safety_checker"]
    assert "image_encoder is ignored: the transformer has no image_dim" in caplog.text
    assert report.components == inspect_model(str(pair)).components
    engine = Engine.from_pretrained(str(two), device="cpu")
    assert engine.model.image_encoder is None and set(engine.model.folder.encoders) == {"text_encoder"}
    capsys.readouterr()
    assert main(["models", "inspect", str(two)]) == 0
    assert "ignored   safety_checker: a Wan model has no such part" in capsys.readouterr().out


def test_a_pipeline_that_we_do_not_know_is_told(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_fields(two / INDEX, _class_name="WanDMDPipeline")
    read_folder(two)
    assert 'names "WanDMDPipeline", and is run as WanPipeline would' in caplog.text


def test_weights_beside_the_vision_tower_change_no_frame(
    whole: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As CLIPVisionModelWithProjection and CLIPModel save them: a projection, a text model, longer names."""
    path = folder / "image_encoder" / "model.safetensors"
    tower = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    rest = {"visual_projection.weight": torch.ones(8, 20), "logit_scale": torch.ones(())}
    rest |= {
        "text_model.final_layer_norm.bias": torch.ones(4),
        "vision_model.embeddings.position_ids": torch.arange(17),
    }
    save_file(tower | rest, path, {"format": "pt"})
    fields = json.loads((folder / IMAGE).read_text())
    set_fields(folder / IMAGE, architectures=["CLIPVisionModelWithProjection"], projection_dim=8)
    caplog.set_level(logging.INFO)
    expected = frames_of(whole)
    assert np.array_equal(frames_of(folder), expected)
    assert "image_encoder: weights that nothing uses are left out: logit_scale, text_model" in caplog.text
    inspect_model(str(folder))
    (folder / IMAGE).write_text(json.dumps({"architectures": ["CLIPModel"], "vision_config": fields}))
    assert np.array_equal(frames_of(folder), expected)


# ---------------------------------------------------------------------------------------------------------- weights

WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_a_variant_alone_is_told_with_what_to_do(
    part: str, variant: str, folder: Path, refusal: Callable[[Path], str]
) -> None:
    stem = WEIGHTS[part]
    path = folder / part / f"{stem}.safetensors"
    path.rename(path.with_name(f"{stem}.{variant}.safetensors"))
    told = refusal(folder)
    assert f"only the variant {variant}, which is not taken by itself" in told
    assert told.endswith(f"rename {stem}.{variant}.safetensors to {stem}.safetensors")
    path.with_name(f"{stem}.{variant}.safetensors").rename(path)
    inspect_model(str(folder))


@pytest.mark.parametrize("name", ["{}.safetensors.index.bf16.json", "{}.bf16.safetensors.index.json"])
def test_a_variant_in_shards_is_renamed_by_its_index(name: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    stem = WEIGHTS["transformer"]
    path = folder / "transformer" / f"{stem}.safetensors"
    shard = f"{stem}.bf16-00001-of-00001.safetensors"
    path.rename(path.with_name(shard))
    index = path.with_name(name.format(stem))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(path.with_name(shard)), shard)}))
    assert refusal(folder).endswith(f"rename {index.name} to {stem}.safetensors.index.json")
    index.rename(path.with_name(f"{stem}.safetensors.index.json"))
    inspect_model(str(folder))


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        (None, "weight_map must be an object of tensors' names and files, got null"),
        ([], "weight_map must be an object of tensors' names and files, got []"),
        ({"a": 3}, 'weight_map must be an object of tensors\' names and files, got {"a": 3}'),
        ({}, "weight_map names no file"),
        ({"a": "../vae/x.safetensors"}, 'weight_map must name files of its own folder, got "../vae/x.safetensors"'),
        ({"a": "x.safetensors"}, "names files that are not there: x.safetensors"),
    ],
)
def test_an_index_that_maps_nothing_is_told(
    weight_map: Any, told: str, folder: Path, refusal: Callable[[Path], str]
) -> None:
    for part in ("transformer", "text_encoder"):
        path = folder / part / f"{WEIGHTS[part]}.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        path.with_name(f"{WEIGHTS[part]}.safetensors").rename(folder / f"{part}.gone")
        assert told in refusal(folder) and part in refusal(folder)
        path.unlink()
        (folder / f"{part}.gone").rename(path.with_name(f"{WEIGHTS[part]}.safetensors"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4200000000\n"


@pytest.mark.parametrize(
    "file",
    ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer.json", VAE],
)
def test_what_git_leaves_without_lfs_is_told(file: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    (folder / file).write_text(POINTER)
    assert (
        refusal(folder) == f"{file} is a pointer of Git LFS and not the file itself: run `git lfs pull` in the folder"
    )


def test_weights_of_whole_numbers_are_refused(folder: Path, refusal: Callable[[Path], str]) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"proj_out.weight": tensors["proj_out.weight"].to(torch.int8)}, path, {"format": "pt"})
    assert "not floating-point: proj_out.weight I8" in refusal(folder)


def test_a_kernel_of_other_sides_is_refused_though_it_has_as_many_numbers(
    folder: Path, refusal: Callable[[Path], str]
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    kernel = tensors["patch_embedding.weight"]
    save_file(tensors | {"patch_embedding.weight": kernel.view(48, 12, 1, 4, 1)}, path, {"format": "pt"})
    told = "wrong shape: patch_embedding.weight [48, 12, 1, 4, 1], expected [48, 12, 1, 2, 2]"
    assert told in refusal(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("diffusion_pytorch_model.bin", "pickled checkpoints are not read: convert it to safetensors"),
        ("model-Q4_K.gguf", "GGUF is not read: get the safetensors files"),
        ("wan.safetensors", "the weights there have other names: wan.safetensors"),
    ],
)
def test_weights_in_another_form_are_told(name: str, told: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name(name))
    assert told in refusal(folder)


def test_a_folder_of_json_alone_is_inspected_and_not_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {part.name: part.num_parameters for part in inspect_model(str(folder)).components}
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    report = inspect_model(str(folder))
    assert report.folder.endswith("without weights")
    assert {part.name: part.num_parameters for part in report.components} == counts
    with pytest.raises(ValueError, match=r"transformer: no diffusion_pytorch_model\.safetensors .* holds no weights"):
        Engine.from_pretrained(str(folder), device="cpu")
    assert main(["models", "inspect", str(folder)]) == 0
    assert "without weights" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ tokenizers, processors, others


def test_a_sentencepiece_model_names_the_package_that_reads_it(folder: Path, refusal: Callable[[Path], str]) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert refusal(folder) == "tokenizer has neither tokenizer.json nor spiece.model"
    (folder / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    set_fields(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    told = "tokenizer/spiece.model needs the package sentencepiece, since there is no tokenizer.json"
    assert refusal(folder) == f"{told}: pip install sentencepiece"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer/tokenizer.json", "{}"),
        ("tokenizer/tokenizer_config.json", "[]"),
        ("tokenizer/tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("image_processor/preprocessor_config.json", "["),
        ("image_processor/preprocessor_config.json", "[]"),
        ("image_processor/preprocessor_config.json", '{"size": "x"}'),
        ("image_processor/preprocessor_config.json", '{"crop_size": {"height": 16, "width": 16}}'),
        ("image_processor/preprocessor_config.json", '{"image_mean": 3}'),
        ("cache.json", "[]"),
        ("cache.json", '{"entries": [3], "weights": ""}'),
        ("cache.json", '{"entries": [{"solver": "unipc", "colour": 1}], "weights": ""}'),
    ],
)
def test_files_that_others_read_are_named(file: str, text: str, folder: Path, refusal: Callable[[Path], str]) -> None:
    (folder / file).write_text(text)
    assert refusal(folder).startswith(file.partition("/")[0])


def test_a_tokenizer_of_more_words_than_the_encoder_has_is_refused(
    folder: Path, refusal: Callable[[Path], str]
) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 500
    path.write_text(json.dumps(tokenizer))
    assert refusal(folder) == "tokenizer must have ids below the text encoder's vocab_size = 84, got 500"


# ------------------------------------------------------------------------------------------------- names of folders


def test_a_folder_without_an_index_is_named_as_it_was_given(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    for name, told in (
        (str(folder.parent / "empty"), "is missing: a model is a folder in diffusers' format"),
        ("empty", "is missing: a model is a folder in diffusers' format"),
        ("./model/vae", f"and this is one of its parts; the model is {folder}"),
        (".", "there is one in model"),
    ):
        for command in (["models", "inspect"], ["generate", "a", "--model"]):
            assert main([*command, name]) == 2
            line = capsys.readouterr().err.splitlines()[-1]
            assert (
                line.startswith(f"skylapse: error: model {name!r}: {name}/model_index.json is missing") and told in line
            )


def test_paths_and_hub_ids_that_are_not_there_are_told_apart(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("SKYLAPSE_CACHE_DIR", str(folder.parent / "cache"))
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", "wan.safetensors")
    download = "HF_HUB_OFFLINE forbids to download it: run `skylapse models download {}` where that is not set"
    for name, told in (
        ("wan.safetensors", "model must be a folder, got the file 'wan.safetensors'"),
        ("model/vae/config.json", "model must be a folder, got the file 'model/vae/config.json'"),
        ("model/wan.safetensors", "got 'model/wan.safetensors', and there is no such folder"),
        ("./models/wan", "got './models/wan', and there is no such folder"),
        ("models/wan/", "got 'models/wan/', and there is no such folder"),
        ("model/wan", "model 'model/wan' is no folder (model holds none of this name)"),
        ("model/wan", download.format("model/wan")),
        ("org/wan", "model 'org/wan' is not on this machine, and " + download.format("org/wan")),
    ):
        for command in (["models", "inspect"], ["generate", "a", "--model"]):
            assert main([*command, name]) == 2
            *_, line = capsys.readouterr().err.splitlines()
            assert line.startswith("skylapse: error: ") and told in line
