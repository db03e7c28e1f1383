"""Whole folders of two kinds of checkpoint, and the refusal of a folder by both commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import save_checkpoint

from skylapse.cli import main


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Wan2.1 image-to-video checkpoint, which has every part that there is."""
    return save_checkpoint("wan2.1-i2v", tmp_path_factory.mktemp("i2v") / "model")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Wan2.2 checkpoint, which has two experts."""
    return save_checkpoint("wan2.2-t2v-a14b", tmp_path_factory.mktemp("a14b") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def two(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair, tmp_path / "two"))


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[Path], str]:
    """Give a function that returns both commands' refusal of a folder, after the model's name.

    It asserts that both write the same single line and exit with code 2."""

    def refusal_of(folder: Path) -> str:
        lines = []
        for command in (
            ["models", "inspect", str(folder), "--device-memory", "80"],
            ["generate", "a", "--model", str(folder), "-o", str(tmp_path / "out.mp4")],
        ):
            assert main(command) == 2, capsys.readouterr()
            told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skylapse: loading")]
            assert len(told) == 1, told
            lines.append(told[0])
        assert lines[0] == lines[1]
        assert not (tmp_path / "out.mp4").exists()
        return lines[0].removeprefix(f"skylapse: error: model {str(folder)!r}: ")

    return refusal_of
