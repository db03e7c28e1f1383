"""`skylapse compile`: what it builds, prints and refuses, and that generate uses what it has built."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_backend import Fake
from torch import Tensor

from skylapse.cli import main
from skylapse.compile import footprint
from skylapse.compile.select import Selector
from skylapse.compile.stream import Coder, Plan, States
from skylapse.compile.stream import Run as CoderRun
from skylapse.runtime.vae import backends as decoders

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """One command in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.setenv("SKYLAPSE_COMPILED_DIR", str(tmp_path))
    monkeypatch.delenv("SKYLAPSE_DECODER", raising=False)
    monkeypatch.setattr(Selector, "measure", lambda self, runs, *_: {name: 1.0 + (name == "eager") for name in runs})

    def command(*arguments: str) -> tuple[int, str, str]:
        status = main([*arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    found = [Fake(name="onnxruntime"), Fake(name="inductor")]
    monkeypatch.setattr(decoders, "backends", lambda device, *_: found)
    return found


def test_built_decoder_is_what_generate_decodes_with(run: Run, fakes: list[Fake], tmp_path: Path) -> None:
    status, out, _ = run("compile", "demo")
    assert status == 0 and "64x64 is decoded by onnxruntime: measured at 8 x 8 latents" in out
    assert "64x64 is encoded by onnxruntime: measured at 8 x 8 latents" in out
    assert fakes[0].built == [Plan(), Plan()] and fakes[1].built == []
    fakes[0].calls = 0
    clip = str(tmp_path / "clip.mp4")
    assert run("generate", "a red circle", "--steps", "1", "--frames", "9", "-o", clip)[0] == 0
    assert fakes[0].calls == 2  # the first latent frame, and the two others at once
    report = json.loads(run("compile", "demo", "--status", "--json")[1])
    for part in ("decoder", "encoder"):
        assert report[part]["backend"] == "onnxruntime"
        assert [(b["backend"], b["state"]) for b in report[part]["backends"]] == [
            ("eager", "built"),
            ("onnxruntime", "built"),
            ("inductor", "not built"),
        ]
    assert len(fakes[0].built) == 2


def test_part_is_built_alone_and_the_encoder_is_fp32(run: Run, fakes: list[Fake]) -> None:
    assert run("compile", "demo", "--part", "encoder", "--dtype", "bf16")[0] == 0
    assert fakes[0].built == [Plan("fp32")]
    report = json.loads(run("compile", "demo", "--status", "--json")[1])
    assert [report[part]["backend"] for part in ("decoder", "encoder")] == ["eager", "onnxruntime"]
    status, out, _ = run("compile", "demo", "--status", "--part", "encoder")
    assert status == 0 and out.startswith("encoder") and "decoded" not in out


def test_size_is_built_for_alone(run: Run, fakes: list[Fake]) -> None:
    assert run("compile", "demo", "--size", "96x64", "--backend", "inductor", "--part", "decoder")[0] == 0
    assert fakes[1].built == [Plan(size=(8, 12))] and fakes[0].built == []
    assert json.loads(run("compile", "demo", "--status", "--json")[1])["decoder"]["backend"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "63x64"], "width must be a multiple of"),
        (["--size", "64"], "must be WIDTHxHEIGHT"),
        (["--backend", "eager"], "eager needs no building"),
        (["--backend", "openvino"], "got 'openvino'"),
        (["--dtype", "fp8"], "got 'fp8'"),
        (["--status", "--verify"], "exclude each other"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_line(
    run: Run, fakes: list[Fake], arguments: list[str], message: str
) -> None:
    status, out, err = run("compile", "demo", *arguments)
    assert (status, out) == (2, "") and message in err
    assert not fakes[0].built


def test_missing_backend_says_what_to_install_or_the_next_is_built(
    run: Run, fakes: list[Fake], caplog: pytest.LogCaptureFixture
) -> None:
    fakes[0].absent = "onnxruntime is not there: pip install 'skylapse[compile]'"
    status, _, err = run("compile", "demo", "--backend", "onnxruntime")
    assert status == 2 and "pip install 'skylapse[compile]'" in err
    status, out, _ = run("compile", "demo", "--backend", "onnxruntime", "--fallback")
    assert status == 0 and "is decoded by inductor" in out
    assert "onnxruntime is not there" in caplog.text and "the next backend is tried" in caplog.text


def test_failed_build_is_told_in_the_builders_words(run: Run, fakes: list[Fake]) -> None:
    fakes[0].build_error = MemoryError("40 GiB are needed")
    status, _, err = run("compile", "demo")
    assert status == 1 and "MemoryError: 40 GiB are needed" in err
    out = run("compile", "demo", "--status")[1]
    assert "failed" in out and "40 GiB are needed" in out and "64x64 is decoded by eager" in out
    fakes[0].build_error = None
    assert run("compile", "demo")[0] == 0


def test_verify_fails_where_something_built_is_wrong(run: Run, fakes: list[Fake]) -> None:
    assert run("compile", "demo")[0] == 0
    status, out, _ = run("compile", "demo", "--verify")
    assert status == 0 and "onnxruntime" in out

    def load(coder: Coder, plan: Plan, folder: Path) -> CoderRun:
        def wrong(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            y, new = coder(x, states)
            return y + 1, new

        return wrong

    fakes[0].load = load  # type: ignore[method-assign]
    status, out, _ = run("compile", "demo", "--verify")
    assert status == 1 and "demoted" in out and "differs from eager by 1" in out


def test_dtype_is_the_configured_one_where_none_is_given(
    run: Run, fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYLAPSE_DECODER_DTYPE", "fp16")
    assert run("compile", "demo", "--part", "decoder")[0] == 0
    assert run("compile", "demo", "--part", "decoder", "--dtype", "fp32")[0] == 0
    assert [plan.dtype for plan in fakes[0].built] == ["fp16", "fp32"]


def test_plan_that_is_bound_to_smaller_frames_is_built_by_size(run: Run, fakes: list[Fake]) -> None:
    fakes[0].max_any_pixels = 63  # of the demo's 64
    assert run("compile", "demo", "--part", "decoder")[0] == 0
    assert fakes[0].built == [Plan(size=(8, 8))]
    report = json.loads(run("compile", "demo", "--status", "--json")[1])["decoder"]
    assert report["backend"] == "onnxruntime" and report["backends"][1]["detail"] == "for this size"


def test_build_that_there_is_no_room_to_judge_is_told_and_kept(
    run: Run, fakes: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(footprint, "free_bytes", lambda device, cached=False: 1000)
        status, out, err = run("compile", "demo", "--part", "decoder")
        assert (status, out) == (1, "") and "onnxruntime is built, but not used yet: to compare with eager" in err
        assert "0.00 GiB are free" in err.splitlines()[-1]
    status, out, _ = run("compile", "demo", "--part", "decoder", "--verify")
    assert status == 0 and "is decoded by onnxruntime" in out and fakes[0].built == [Plan()]


def test_bf16_is_no_dtype_of_this_cpu(run: Run) -> None:
    status, _, err = run("compile", "demo", "--backend", "onnxruntime", "--dtype", "bf16", "--device", "cpu")
    assert status == 2 and "no convolution of bf16" in err


def test_tensorrt_without_a_gpu_is_told_and_status_lists_it(run: Run) -> None:
    status, _, err = run("compile", "demo", "--backend", "tensorrt", "--device", "cpu")
    assert status == 2 and "TensorRT needs an NVIDIA GPU" in err
    report = json.loads(run("compile", "demo", "--status", "--json", "--device", "cpu")[1])
    for part in report.values():
        assert part["backend"] == "eager"
        assert [b["backend"] for b in part["backends"]] == ["eager", "tensorrt", "onnxruntime", "inductor"]
        assert part["backends"][1]["state"] == "missing"
