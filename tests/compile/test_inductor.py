"""Inductor's library codes as eager does, in chunks of any length, and its compiler's absence is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from coded_clips import clip, coded

from skylapse.compile.inductor import Inductor
from skylapse.compile.stream import Coder, Plan

CPU = torch.device("cpu")


@pytest.mark.slow
def test_library_for_any_size_decodes_as_eager_does(coders: dict[str, Coder], tmp_path: Path) -> None:
    coder, backend = coders["distilled"], Inductor(CPU)
    if reason := backend.missing(Plan()):
        pytest.skip(reason)
    backend.build(coder, Plan(), tmp_path)
    run = backend.load(coder, Plan(), tmp_path)
    for size, chunk in (((4, 6), 3), ((5, 3), 1), ((7, 8), 4)):
        x = clip(coder, 7, size)
        expected = coded(coder, coder, x, chunk)
        assert (coded(run, coder, x, chunk) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert Inductor(CPU).missing(Plan()) == "inductor needs a C++ compiler: install g++"
