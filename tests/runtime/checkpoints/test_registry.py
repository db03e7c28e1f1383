"""The listed models are the one in the package, and those in the folder of downloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skylapse.cli import main
from skylapse.runtime.checkpoints.registry import TRANSFORMER_CLASS, list_models


def download(cache_dir: Path, name: str, index: dict[str, object], has_weights: bool = True) -> None:
    """Make the files that `snapshot_download` leaves of a repository, as far as a scan looks."""
    snapshot = cache_dir / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text(json.dumps(index))
    if has_weights:
        (snapshot / "transformer").mkdir()
        (snapshot / "transformer" / "diffusion_pytorch_model.safetensors").touch()


def test_models_in_the_folder_of_downloads_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    download(tmp_path, "org/wan", {"transformer": ["diffusers", TRANSFORMER_CLASS]})
    download(tmp_path, "org/configs", {"transformer": ["diffusers", TRANSFORMER_CLASS]}, has_weights=False)
    download(tmp_path, "org/other", {"transformer": ["diffusers", "FluxTransformer2DModel"]})
    monkeypatch.setenv("SKYLAPSE_CACHE_DIR", str(tmp_path))
    assert main(["models", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["demo", "org/wan"]


def test_before_the_first_download_there_is_the_demo_model_alone(tmp_path: Path) -> None:
    assert [entry.name for entry in list_models(tmp_path / "not-yet-there")] == ["demo"]
