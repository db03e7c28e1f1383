"""A CUDA engine's settings of torch's memory allocator, which are there on a CPU build too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from skylapse.kernels import backends
from skylapse.runtime.core import device
from skylapse.runtime.core.config import configures_allocator
from skylapse.runtime.core.device import EXPANDABLE, expand_segments
from skylapse.runtime.engine import engine

CUDA = torch.device("cuda")
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def settings() -> str:
    told: str = torch._C._accelerator_getAllocatorSettings()
    return told


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    before = settings()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    yield
    torch._C._accelerator_setAllocatorSettings(before or "expandable_segments:False")


def test_segments_grow_on_cuda_and_a_cpu_is_left_alone() -> None:
    expand_segments(torch.device("cpu"))
    assert settings() == "expandable_segments:False"
    expand_segments(CUDA)
    assert settings() == EXPANDABLE


@pytest.mark.parametrize("name", NAMES)
def test_the_operators_word_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert configures_allocator()
    expand_segments(CUDA)
    assert settings() == "expandable_segments:False"


def test_an_empty_variable_says_nothing() -> None:
    assert not configures_allocator({"PYTORCH_ALLOC_CONF": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"})


def test_an_engine_sets_it_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def prepare(own: backends.Backends, where: torch.device) -> None:
        called.append("prepare")
        raise RuntimeError("no device")

    monkeypatch.setattr(engine, "parse_device", lambda name: CUDA)
    monkeypatch.setattr(engine, "expand_segments", lambda where: called.append(f"expand on {where}"))
    monkeypatch.setattr(backends.Backends, "prepare", prepare)
    with pytest.raises(RuntimeError, match="no device"):
        engine.Engine.from_pretrained("demo")
    assert called == ["expand on cuda", "prepare"] and device.expand_segments is expand_segments
