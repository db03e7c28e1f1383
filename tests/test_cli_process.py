"""The real command in a process of its own, with the demo model: exit codes, Ctrl-C, and what is left in the folder."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def skylapse_process(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "skylapse", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would every process that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_process_exits_with_2_and_one_line_after_a_mistake(tmp_path: Path) -> None:
    process = skylapse_process(tmp_path, "generate", "a red circle", "-o", "no/out.mp4")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (2, "")
    assert stderr == "skylapse: error: output must be in an existing folder, got 'no/out.mp4'\n"


@pytest.mark.usefixtures("demo_folder")
def test_reader_that_stops_early_is_not_complained_about(tmp_path: Path) -> None:
    process = skylapse_process(tmp_path, "models", "list")
    assert process.stdout and process.stderr
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.usefixtures("demo_folder")
def test_ctrl_c_stops_within_a_step_and_leaves_no_file(tmp_path: Path) -> None:
    process = skylapse_process(tmp_path, "generate", "a red circle", "--steps", "1000", "--sheet", "sheet.png")
    assert process.stderr
    for line in process.stderr:
        if "step 1 of 1000" in line:
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "skylapse: interrupted\n"  # no tenth of the 1000 steps was reached, and no traceback
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("demo_folder")
def test_demo_model_makes_a_video_and_a_sheet(tmp_path: Path) -> None:
    arguments = ("generate", "a red circle moving right", "--steps", "2", "--sheet", "sheet.png", "--json")
    process = skylapse_process(tmp_path, *arguments)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["num_inference_steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "sheet.png"]


def test_unknown_model_and_truncated_checkpoint_are_mistakes(tmp_path: Path, demo_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_folder, copy)
    weights = next((copy / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    for model in ("no-such-model", "copy"):
        process = skylapse_process(tmp_path, "generate", "a red circle", "--model", model)
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout) == (2, ""), stderr
        assert stderr.splitlines()[-1].startswith("skylapse: error: ")
        assert model in stderr.splitlines()[-1]
        assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
