"""`skylapse serve` with a backend asked for that this machine cannot run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from skylapse.cli import main


def test_it_says_why_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=cudnn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(["serve", "--device", "cpu", "--data", str(tmp_path), "--port", str(port)]) == 2
    told = "skylapse: error: SKYLAPSE_KERNELS: attention=cudnn cannot serve on cpu: it needs a CUDA device\n"
    assert capsys.readouterr().err == told
