"""`skylapse kernels doctor`: what it says with and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from skylapse.cli import main
from skylapse.kernels import attention_backends, backends, doctor
from skylapse.kernels.backends import CHOICES


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SKYLAPSE_KERNELS", raising=False)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that answers as one with an H100 does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "fault_of_triton", lambda device: None)
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: 91900)
    monkeypatch.setattr(attention_backends, "try_out", lambda name, device: None)
    attention_backends.trial.cache_clear()
    driver = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:21:08 UTC 2025\nGCC version: x\n"
    (tmp_path / "version").write_text(driver)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")


def test_without_a_gpu_torch_serves_and_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "GPU             none that torch can use"
    served = [line.split(maxsplit=2) for line in lines[lines.index("") + 1 :]]
    assert [op for op, _, _ in served] == [*CHOICES, *doctor.CALLS, *doctor.OPERATIONS]
    assert {name for _, name, _ in served} == {"torch"}
    assert {reason for _, _, reason in served} <= {"no CUDA device", "this torch is built without CUDA"}


@pytest.mark.usefixtures("h100")
def test_with_a_gpu_it_names_device_driver_and_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=sdpa")
    assert main(["kernels", "doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["gpu"], report["capability"], report["driver"]) == ("NVIDIA H100 80GB HBM3", "sm_90", "580.65.06")
    assert report["versions"]["torch"] == torch.__version__
    sdpa = {"name": "sdpa", "reason": "asked for", "fallback": False, "lossy": False}
    assert report["operations"]["attention"] == report["operations"]["attention_biased"] == sdpa
    assert report["operations"]["adaln"]["name"] == "triton"


@pytest.mark.usefixtures("h100")
def test_without_a_wish_it_tells_the_fastest_known_for_each_kind_of_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "doctor", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["operations"]
    assert [served[op]["name"] for op in ("attention", *doctor.CALLS)] == ["cudnn", "triton", "triton"]


@pytest.mark.usefixtures("h100")
def test_what_was_asked_for_and_cannot_serve_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=sage")
    assert main(["kernels", "doctor"]) == 0
    assert "sage cannot serve: sageattention is not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("h100")
def test_broken_triton_is_told_for_every_operation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "fault_of_triton", lambda device: "Triton is broken: no C compiler")
    assert main(["kernels", "doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "Triton is broken: no C compiler" in line]
    assert len(lines) == len(doctor.CALLS) + len(doctor.OPERATIONS), "cuDNN needs none"


def test_unknown_backend_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=best")
    assert main(["kernels", "doctor"]) == 2
    assert capsys.readouterr().err.startswith("skylapse: error: SKYLAPSE_KERNELS must be like attention=triton|")


def test_operations_are_those_that_are_registered() -> None:
    from skylapse.kernels import (  # noqa: F401
        adaln,
        attention_sparse,
        linear_quantized,
        patch_embed,
        qk_norm_rope,
        rms_norm,
        solver_step,
    )

    assert all(hasattr(torch.ops.skylapse, name) for name in doctor.OPERATIONS)
