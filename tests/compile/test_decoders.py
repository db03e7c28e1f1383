"""A codec decodes by what is chosen for it, and a service goes on while what is faster is built."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_backend import Fake

from skylapse.compile.stream import Plan
from skylapse.runtime import decoders as module
from skylapse.runtime.config import Settings
from skylapse.runtime.decoders import Decoders
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.coders import WanDecoder
from skylapse.runtime.vae.tiling import Tiling
from skylapse.runtime.vae.wan import WanVAE

Exported = Callable[[str, Plan], Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(coders: dict) -> WanVAE:
    """The decoder that `exported` has exported, in a whole VAE."""
    decoder: WanDecoder = coders["2.2"].module
    whole = WanVAE(decoder.config).requires_grad_(False)
    whole.decoder, whole.post_quant_conv = decoder.decoder, decoder.post_quant_conv
    return whole


def codec_of(vae: WanVAE, tiling: Tiling | None = None) -> VideoCodec:
    return VideoCodec(vae, device=CPU, chunk=2, tiling=tiling)


def decoders_of(codec: VideoCodec, folder: Path, **settings: object) -> Decoders:
    return Decoders("tiny", codec, (24, 16), Settings(profile_dir=folder, **settings))


def latents(height: int = 4, width: int = 6, num_frames: int = 5) -> torch.Tensor:
    return torch.randn(4, num_frames, height, width, generator=torch.Generator().manual_seed(3))


def frames(codec: VideoCodec, z: torch.Tensor) -> np.ndarray:
    return np.concatenate(list(codec.decode(z)))


@pytest.mark.parametrize("tiling", [None, Tiling(tile=16, overlap=8, threshold=0)], ids=["whole", "tiles"])
def test_frames_of_onnx_runtime_differ_by_one_level_at_most(
    vae: WanVAE, exported: Exported, tmp_path: Path, tiling: Tiling | None
) -> None:
    codec = codec_of(vae, tiling)
    decoders = decoders_of(codec, tmp_path, decoder="onnxruntime")
    backend, plan = decoders.selector.backend("onnxruntime"), Plan()
    key = decoders.selector.key(backend, plan)
    source = exported("2.2", backend.plan(plan))
    decoders.selector.cache.build(key, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))
    decoders.attach()
    eager, z = codec_of(vae, tiling), latents(6, 9)
    ours, theirs = frames(codec, z), frames(eager, z)
    assert decoders.report.backend == "onnxruntime" and decoders.report.demotions == []
    assert ours.shape == theirs.shape == (9, 24, 36, 3) and len(np.unique(theirs)) > 50
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_eager_is_left_alone_when_it_is_configured(vae: WanVAE, tmp_path: Path) -> None:
    codec = codec_of(vae)
    before = codec.choose_decoder
    decoders = decoders_of(codec, tmp_path, decoder="eager")
    decoders.attach()
    assert codec.choose_decoder is before and not decoders.build_in_background()
    assert decoders.report.backend == "eager" and not (tmp_path / "compiled").exists()


def test_configured_backend_that_is_absent_says_what_to_install(vae: WanVAE, tmp_path: Path) -> None:
    decoders = decoders_of(codec_of(vae), tmp_path, decoder="onnxruntime", decoder_dtype="bf16")
    with pytest.raises(ValueError, match="SKYLAPSE_DECODER=onnxruntime: onnxruntime's CPU provider has no convolution"):
        decoders.attach()


BUILDER = """
import os, sys
from pathlib import Path
from skylapse.compile.cache import EngineCache, Key

def build(folder):
    Path({told!r}).write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))
    sys.stdin = open({gate!r})  # a pipe: opens when the test has seen enough
    {then}
    (folder / "plan.bin").write_text("0.0")

EngineCache(Path({root!r})).build(Key({fields!r}), build)
"""


@pytest.fixture
def service(vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[Decoders, Path]]:
    """Decoders whose background build waits for a gate, and then does as it is told."""

    def start(then: str) -> tuple[Decoders, Path]:
        fake = Fake()
        monkeypatch.setattr(module, "backends", lambda device: [fake])
        decoders = decoders_of(codec_of(vae), tmp_path)
        decoders.selector.measure = lambda runs, *_: {name: float(name == "eager") for name in runs}  # type: ignore
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        script = BUILDER.format(
            told=str(tmp_path / "nice"),
            gate=str(gate),
            then=then,
            root=str(decoders.selector.cache.root),
            fields=decoders.selector.key(fake, Plan()).fields,
        )
        monkeypatch.setattr(decoders, "command", lambda name: [sys.executable, "-c", script])
        decoders.attach()
        return decoders, gate

    return start


def test_service_decodes_eagerly_until_the_build_has_ended(service: Callable) -> None:
    decoders, gate = service("pass")
    assert decoders.build_in_background() and not decoders.build_in_background()
    codec, z = decoders.codec, latents()
    begun = codec.decode(z)
    first = next(begun)
    assert decoders.report.backend == "eager"
    gate.write_text("")  # waits until the builder reads it
    decoders._building.join(60)
    assert decoders.report.backend == "fake"
    fake = decoders.selector.backend("fake")
    fake.calls = 0
    rest = list(begun)
    assert fake.calls == 0  # a clip ends with what it began with
    expected = frames(codec_of(decoders.codec.vae), z)
    assert np.array_equal(np.concatenate([first, *rest]), expected)
    assert np.array_equal(frames(codec, z), expected) and fake.calls == 3
    assert int((gate.parent / "nice").read_text()) == module.NICE
    assert not decoders_of(codec, gate.parent).build_in_background()  # the next service finds it


def test_build_that_is_killed_is_remembered_and_eager_goes_on(service: Callable) -> None:
    decoders, gate = service("os.kill(os.getpid(), 9)")
    decoders.prepare()
    assert decoders.build_in_background()
    gate.write_text("")
    decoders._building.join(60)
    failure = decoders.selector.cache.failure(decoders.selector.key(decoders.selector.backend("fake"), Plan()))
    assert failure is not None and "killed by signal 9, as happens when memory runs out" in failure.reason
    assert decoders.report.backend == "eager"
    assert frames(decoders.codec, latents()).shape == (9, 16, 24, 3)
    assert not decoders_of(decoders.codec, gate.parent).build_in_background()


def test_build_that_takes_too_long_is_ended_and_remembered(service: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILD_TIMEOUT_S", 0.2)
    decoders, _ = service("pass")
    assert decoders.build_in_background()
    decoders._building.join(60)
    assert decoders._process.poll() is not None
    failure = decoders.selector.cache.failure(decoders.selector.key(decoders.selector.backend("fake"), Plan()))
    assert failure is not None and failure.reason == "not built within 0.2 s"


def test_closing_ends_a_running_build(service: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders, _ = service("pass")
    started = threading.Event()
    finish = decoders._finish

    def told(command: list[str]) -> tuple[int | None, str]:
        started.set()
        return finish(command)

    monkeypatch.setattr(decoders, "_finish", told)
    assert decoders.build_in_background() and started.wait(60)
    for _ in itertools.count():
        if decoders._process is not None:
            break
    decoders.close()
    assert decoders._process.poll() is not None and not decoders._building.is_alive()
