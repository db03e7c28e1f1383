"""`skylapse models inspect --device-memory` tells the sizes that fit, from configs alone, and refuses bad numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from skylapse.cli import main
from skylapse.runtime.checkpoints.published import published
from skylapse.runtime.checkpoints.registry import describe, inspect_model

SMALLEST = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
KEYS = {
    *("width", "height", "num_frames", "dtype", "quantize", "fits", "budget_bytes", "host_bytes", "peak_bytes"),
    *("resident", "moved", "guidance", "decode_chunk", "tiles", "blocked_by", "nearest"),
}


@pytest.fixture(autouse=True)
def nothing_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKYLAPSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SKYLAPSE_PROFILE_DIR", str(tmp_path / "profiles"))


def test_rows_have_the_keys_that_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "inspect", "demo", "--device-memory", "16", "--host-memory", "32", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["fit"]
    sizes = {(row["width"], row["height"]) for row in rows}
    assert sizes == set(describe("demo").native_sizes) and {row["quantize"] for row in rows} == {None, "fp8"}
    for row in rows:
        assert row.keys() >= KEYS and set(row["peak_bytes"]) == {"text", "encode", "step", "decode"}
        assert row["fits"] and row["blocked_by"] is None and row["nearest"] == [] and row["moved"] == []
        assert row["budget_bytes"] == int(0.92 * 16e9) and row["host_bytes"] == 0


def test_a_published_checkpoint_is_described_without_its_weights(tmp_path: Path) -> None:
    for name in published():
        folder = describe(name, tmp_path)
        assert not folder.path.exists() and folder.native_sizes and folder.defaults.num_frames in (81, 121)
    report = inspect_model(SMALLEST, tmp_path)
    counts = {part.name: part.num_parameters for part in report.components}
    assert report.folder == "not downloaded" and all(part.num_bytes is None for part in report.components)
    assert counts["transformer"] == 1_418_996_800 and round(counts["text_encoder"] / 1e9, 2) == 5.68
    assert report.tasks == ["text-to-video", "video-to-video"]


def test_a_size_that_does_not_fit_says_which_gpu_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "inspect", "demo", "--device-memory", "0.01"]) == 0
    shown = capsys.readouterr().out
    assert "no: step" in shown or "no: decode" in shown or "no: text" in shown
    assert "a GPU of " in shown


def test_weights_that_cannot_be_quantised_are_told_in_their_row(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 10 have sides that are no multiples of 16; all else is told as ever."""
    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "cache.json"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 10}))
    asked = ["models", "inspect", str(folder), "--device-memory", "16"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    exact, quantized = ([row for row in told["fit"] if row["quantize"] == kept] for kept in (None, "fp8"))
    assert len(exact) == len(quantized) == 3 and all(row["fits"] for row in exact)
    why = "blocks.0.attn1.qkv.weight cannot be quantised to fp8: its sides must be multiples of 16, got [40, 40]"
    for row in quantized:
        assert row.keys() >= KEYS and not row["fits"] and (row["blocked_by"], row["why"]) == ("quantize", why)
        assert set(row["peak_bytes"].values()) == {None}
    assert set(told["loaded_bytes"]) == {"bf16", "fp32"}
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert shown.count(why) == 3 and "(--quantize does not take its sides)" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-memory", "0"], "--device-memory must be a number of GB above 0, got '0'"),
        (["--device-memory", "nan"], "--device-memory must be a number of GB above 0, got 'nan'"),
        (["--device-memory", "80GB"], "--device-memory must be a number of GB above 0, got '80GB'"),
        (["--device-memory", "80", "--host-memory", "-1"], "--host-memory must be a number of GB above 0"),
        (["--device-memory", "80", "--offload", "some"], "--offload must be auto or none or all, got 'some'"),
        (["--host-memory", "64"], "--host-memory and --offload need --device-memory"),
    ],
)
def test_bad_numbers_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "inspect", "demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"skylapse: error: {message}") and told.count("\n") == 1


@pytest.mark.parametrize("word", ["some", "ALL", "1"])
def test_offload_words_that_do_not_exist_are_one_line(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLAPSE_OFFLOAD", word)
    assert main(["models", "list"]) == 2
    assert capsys.readouterr().err == f"skylapse: error: SKYLAPSE_OFFLOAD must be auto or none or all, got '{word}'\n"
