"""The memory budget: its profile is measured once, and every component's weights are taken off it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_checkpoint

from skylapse import Engine, VideoRequest
from skylapse.runtime.config import MIB, load_settings
from skylapse.runtime.models import placement
from skylapse.runtime.models.model import load_model
from skylapse.runtime.models.registry import inspect_model

PICTURE = np.full((64, 64, 3), 90, np.uint8)


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
    measured = engine_of(folder, tmp_path / "profiles").memory.fitter.peaks
    assert measured.step.at(100) > 0 and measured.decode.chunks[4].at(64 * 64) > 0
    (path,) = (tmp_path / "profiles").iterdir()
    monkeypatch.setattr(placement, "measure_peaks", lambda *_: pytest.fail("it is measured again"))
    assert engine_of(folder, tmp_path / "profiles").memory.fitter.peaks == measured
    monkeypatch.undo()
    path.write_text('{"step_bytes": 1}')
    assert engine_of(folder, tmp_path / "profiles").memory.fitter.peaks == measured
    assert path.read_text() != '{"step_bytes": 1}'  # what cannot be read is measured and stored again


def test_weights_of_every_component_are_taken_off_the_budget(folder: Path, tmp_path: Path) -> None:
    parts = inspect_model(str(folder)).components
    assert {part.name for part in parts} == {"transformer", "vae", "text_encoder", "image_encoder"}
    assert engine_of(folder, tmp_path).model.num_bytes == sum(part.num_bytes or 0 for part in parts)


def test_the_profile_is_there_when_an_engine_has_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLAPSE_PROFILE_DIR", str(tmp_path / "profiles"))
    engine = Engine.from_pretrained(str(folder), device="cpu")
    monkeypatch.setattr(placement, "measure_peaks", lambda *_: pytest.fail("it is measured after the start"))
    assert engine.memory.fitter.peaks.step.at(100) > 0 and len(list((tmp_path / "profiles").iterdir())) == 1


def test_the_text_cache_is_taken_off_the_budget_and_is_small_in_a_small_memory(folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(load_settings(), profile_dir=tmp_path, text_cache_bytes=256 * MIB)
    model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32, settings=settings)
    for memory_bytes, cache_bytes in ((4096 * MIB, 256 * MIB), (512 * MIB, 64 * MIB)):
        engine = Engine(model, dataclasses.replace(settings, memory_bytes=memory_bytes))
        assert engine.text_cache.budget_bytes == cache_bytes
        assert engine.memory.available_bytes == memory_bytes - cache_bytes - model.num_bytes


def test_a_video_tells_the_most_memory_held_where_the_device_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: list[torch.device] = []
    monkeypatch.setattr("skylapse.runtime.batch.reset_peak", resets.append)
    monkeypatch.setattr("skylapse.runtime.trajectory.peak_bytes", lambda device: 1234)
    engine = engine_of(folder, tmp_path)
    small = VideoRequest(prompt="a", image=PICTURE, width=64, height=64, num_frames=5, num_inference_steps=2)
    for _ in range(2):
        assert engine.generate(small).metadata.peak_bytes == 1234
    assert resets == [engine.device] * 2  # it is of the request, not of all before it
    monkeypatch.undo()
    assert engine.generate(small).metadata.peak_bytes is None
