"""The memory budget: its profile is measured once, and every component's weights are taken off it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import save_checkpoint

from skylapse import Engine
from skylapse.runtime import memory
from skylapse.runtime.config import load_settings
from skylapse.runtime.models.model import load_model
from skylapse.runtime.models.registry import inspect_model


def engine_of(folder: Path, profiles: Path) -> Engine:
    settings = dataclasses.replace(load_settings(), profile_dir=profiles)
    model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=settings)
    return Engine(model, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("wan2.1-i2v", tmp_path_factory.mktemp("i2v"))


def test_a_later_start_reads_the_profile_and_measures_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = engine_of(folder, tmp_path / "profiles").memory.profile
    assert measured.token_bytes > 0 and measured.pixel_bytes > 0
    (path,) = (tmp_path / "profiles").iterdir()
    monkeypatch.setattr(memory, "measure", lambda model: pytest.fail("it is measured again"))
    assert engine_of(folder, tmp_path / "profiles").memory.profile == measured
    monkeypatch.undo()
    path.write_text('{"step_bytes": 1}')
    assert engine_of(folder, tmp_path / "profiles").memory.profile.token_bytes > 0
    assert path.read_text() != '{"step_bytes": 1}'  # what cannot be read is measured and stored again


def test_weights_of_every_component_are_taken_off_the_budget(folder: Path, tmp_path: Path) -> None:
    parts = inspect_model(str(folder)).components
    assert {part.name for part in parts} == {"transformer", "vae", "text_encoder", "image_encoder"}
    assert engine_of(folder, tmp_path).model.num_bytes == sum(part.num_bytes for part in parts)
