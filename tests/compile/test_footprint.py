"""A compiled backend's memory is weighed when it is chosen, kept in the ledger, and asked for at admission."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_backend import Fake
from tiny import with_room
from torch import Tensor

from skylapse import Engine, VideoRequest
from skylapse.compile import footprint as module
from skylapse.compile.cache import EngineCache
from skylapse.compile.footprint import Footprint, watch
from skylapse.compile.select import Selector
from skylapse.compile.stream import Coder, Plan, Run, States
from skylapse.runtime.core.events import RequestTooLarge
from skylapse.runtime.vae import backends as decoders

CPU = torch.device("cpu")
MIB = 2**20
SIZE = (6, 8)


def hungry() -> Fake:
    """It holds 48 MiB, and takes 32 more the first time that it codes the larger of two sizes."""
    fake = Fake()
    plain = fake.load

    def load(coder: Coder, plan: Plan, folder: Path) -> Run:
        inner, held = plain(coder, plan, folder), [np.ones(48 * MIB, np.uint8)]

        def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            if tuple(x.shape[3:]) == SIZE and len(held) == 1:
                held.append(np.ones(32 * MIB, np.uint8))
            y, new = inner(x, states)
            return y, new

        return run

    fake.load = load
    return fake


def test_peak_is_watched_though_it_is_given_back() -> None:
    with watch(CPU) as grown:
        np.ones(64 * MIB, np.uint8).sum()
    assert 60 * MIB < grown.num_bytes < 80 * MIB
    with watch(CPU) as grown:
        pass
    assert grown.num_bytes < 8 * MIB


def test_where_the_mark_cannot_be_reset_what_is_held_at_the_end_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clear_refs").mkdir()
    (tmp_path / "status").write_text("VmHWM:\t900 kB\nVmRSS:\t100 kB\n")
    monkeypatch.setattr(module, "PROC", tmp_path)
    with watch(CPU) as grown:
        (tmp_path / "status").write_text("VmHWM:\t900 kB\nVmRSS:\t140 kB\n")
    assert grown.num_bytes == 40 * 1024


@pytest.fixture
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["distilled"]


def chooser_of(coder: Coder, folder: Path, fake: Fake) -> Selector:
    chooser = Selector(coder, [fake], EngineCache(folder), device=CPU)
    chooser.measure = lambda runs, *_: {name: float(name == "eager") for name in runs}  # type: ignore[method-assign]
    return chooser


def test_what_a_backend_takes_is_weighed_once_and_scaled_by_area(coder: Coder, tmp_path: Path) -> None:
    fake = hungry()
    assert chooser_of(coder, tmp_path, fake).build(fake, None, measure_at=SIZE).backend == "fake"
    later = chooser_of(coder, tmp_path, Fake())  # which takes next to nothing: it is not weighed again
    found = later.choose(*SIZE).footprint
    assert found is not None and found.area == 48
    assert 46 * MIB < found.held_bytes < 64 * MIB and 30 * MIB < found.work_bytes < 48 * MIB
    assert found.work_at(12, 16) == 4 * found.work_bytes
    assert later.choose(5, 6).footprint is not None  # of the size closest to it
    again = later.build(later.backend("fake"), None, measure_at=SIZE, again=True).footprint
    assert again is not None and again.held_bytes < 16 * MIB and again.work_bytes < 16 * MIB
    assert Selector(coder, [], EngineCache(tmp_path), device=CPU).choose(*SIZE).footprint is None  # eager's


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    monkeypatch.setattr(decoders, "backends", lambda device, *_: [Fake()])
    monkeypatch.setenv("SKYLAPSE_COMPILED_DIR", str(tmp_path))
    monkeypatch.setenv("SKYLAPSE_DECODER", "auto")
    return Engine.from_pretrained("demo", device="cpu")


def test_admission_counts_the_greater_of_eager_and_compiled(
    engine: Engine, choose: Callable[[Footprint], None]
) -> None:
    request = VideoRequest(prompt="a star", width=96, height=64)
    t = engine.prepare(request)

    def needed() -> int:
        return engine.memory.work_bytes([engine.memory.fit(t.needs)])

    eager = needed()
    choose(Footprint(10 * MIB, 1, 64))
    assert needed() == eager + 10 * MIB  # held beside whatever is done
    choose(Footprint(10 * MIB, 2 * eager, 64))
    assert needed() == 10 * MIB + 3 * eager  # of 8 x 12 latents, weighed at 8 x 8
    assert engine.decoders.footprint(96, 64) == (10 * MIB, 3 * eager)
    with pytest.raises(RequestTooLarge, match="64 x 96"):
        with_room(engine.memory, needed() + t.resident_bytes - 1).check(t)
    assert with_room(engine.memory, needed() + t.resident_bytes).check(t).fits


@pytest.fixture
def choose(engine: Engine) -> Callable[[Footprint], None]:
    """Let the decoder's choice, which is eager, have a footprint."""
    selector = engine.decoders.selector
    size = engine.decoders.default_size

    def chosen(footprint: Footprint) -> None:
        selector._choices[size] = dataclasses.replace(selector.choose(*size), footprint=footprint)

    return chosen
