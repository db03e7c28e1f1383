"""Tiny checkpoints that several files of tests use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from batches import CALIBRATED_STEPS
from tiny import save_checkpoint

from skylapse.runtime.cache.calibration import Calibration, write_calibration


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("wan2.1-t2v", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b")
    folders = {name: save_checkpoint(name, tmp_path_factory.mktemp("tiny") / name) for name in names}
    for folder in folders.values():
        (folder / "skylapse.json").write_text(json.dumps({"teacache": [1.5, 0.0]}))
        magnitudes = (1.0, *(1 + 0.15 * (-1) ** step for step in range(1, CALIBRATED_STEPS)))
        write_calibration(folder, Calibration("unipc", CALIBRATED_STEPS, 5.0, 5.0, magnitudes))
    return folders
