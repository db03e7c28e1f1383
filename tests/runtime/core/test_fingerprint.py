"""The fingerprint: whatever component of a folder changes, it is another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint

from skylapse.runtime.cache.calibration import Calibration, read_calibrations, write_calibration
from skylapse.runtime.core.fingerprint import _digest, fingerprint


@pytest.fixture
def folder(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.2-t2v-a14b", tmp_path_factory.mktemp("a14b"))


def test_a_copy_is_the_same_model_whatever_lies_beside_its_components(folder: Path, original: Path) -> None:
    (folder / "skylapse.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / "vae" / "unfinished.part").write_bytes(b"x")
    assert fingerprint(folder) == fingerprint(original)


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae", "text_encoder"])
def test_a_change_of_any_tensor_of_any_component_is_another_model(component: str, folder: Path) -> None:
    seen = {fingerprint(folder)}
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor * 1.01 + 0.01}, path, {"format": "pt"})
        _digest.cache_clear()  # a file system's clock may tick every 4 ms only
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(tensors)


@pytest.mark.parametrize("name", ["vae/config.json", "tokenizer/tokenizer.json", "model_index.json"])
def test_another_config_or_tokenizer_is_another_model(name: str, folder: Path, original: Path) -> None:
    (folder / name).write_text((folder / name).read_text() + " ")
    assert fingerprint(folder) != fingerprint(original)


def test_both_ends_of_a_large_tensor_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    seen = set()
    for place in (None, 0, 99_999):
        tensor = torch.zeros(100_000)
        if place is not None:
            tensor[place] = 1
        save_file({"large": tensor, "small": torch.zeros(3)}, tmp_path / "vae" / "weights.safetensors")
        _digest.cache_clear()
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 3


def test_unchanged_files_are_read_once_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(folder)
    monkeypatch.setattr(Path, "open", lambda *args: pytest.fail("a file is read again"))
    assert fingerprint(folder) == first


def test_a_calibration_made_with_another_vae_is_stale(folder: Path) -> None:
    write_calibration(folder, Calibration("unipc", 9, 5.0, 5.0))
    assert read_calibrations(folder).stale is None
    (path,) = (folder / "vae").glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    assert read_calibrations(folder).stale == "was made for other weights"
