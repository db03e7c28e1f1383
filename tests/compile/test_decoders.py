"""A codec decodes by what is chosen for it, and a service goes on while what is faster is built."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_backend import Fake

from skylapse.compile.stream import Plan
from skylapse.runtime.core.config import Settings
from skylapse.runtime.vae import backends as module
from skylapse.runtime.vae.backends import Decoders
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.coders import WanDecoder, WanEncoder
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


def codec_of(vae: WanVAE, tiling: Tiling | None = None, dtype: torch.dtype | None = None) -> VideoCodec:
    return VideoCodec(vae, device=CPU, chunk=2, tiling=tiling, decoder_dtype=dtype)


def decoders_of(codec: VideoCodec, folder: Path, **settings: object) -> Decoders:
    settings = {"encoder": "eager"} | settings  # but where a test is of encoders
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
    source = exported("2.2", backend.plans(plan)[0])
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
    decoders = decoders_of(codec_of(vae, dtype=torch.bfloat16), tmp_path, decoder="onnxruntime")
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
        monkeypatch.setattr(module, "backends", lambda device, *_: [fake])
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
        monkeypatch.setattr(decoders, "command", lambda part, name: [sys.executable, "-c", script])
        decoders.attach()
        return decoders, gate

    return start


def test_service_decodes_eagerly_until_the_build_has_ended(service: Callable) -> None:
    decoders, gate = service("pass")
    assert decoders.build_in_background() and not decoders.build_in_background()
    codec, z = decoders.codec, latents()
    begun = codec.decode(z)
    first = next(begun)
    assert decoders.report.backend == "eager" and decoders.report.why == "fake is being built in the background"
    gate.write_text("")  # waits until the builder reads it
    decoders._building.join(60)
    assert decoders.report.backend == "fake" and "being built" not in decoders.report.why
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


def builds(
    monkeypatch: pytest.MonkeyPatch, decoders: Decoders, command: tuple[str, ...] = ("false",)
) -> list[tuple[str, str]]:
    """(part, backend) of what is built in the background, to its end; in place of each build runs `command`."""
    built: list[tuple[str, str]] = []

    def note(part: str, name: str) -> list[str]:
        built.append((part, name))
        return [*command]

    monkeypatch.setattr(decoders, "command", note)
    assert decoders.build_in_background() == (decoders._building is not None)
    if decoders._building is not None:
        decoders._building.join(60)
    return built


def test_first_backend_that_can_be_had_is_built(vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that is missing, has failed or was found wrong; and nothing where the first of the others is there."""
    fakes = [Fake(name="tensorrt", absent="no GPU"), *(Fake(name=n) for n in ("onnxruntime", "inductor", "last"))]
    monkeypatch.setattr(module, "backends", lambda device, *_: fakes)

    def build() -> list[tuple[str, str]]:
        return builds(monkeypatch, decoders_of(codec_of(vae), tmp_path))

    selector = decoders_of(codec_of(vae), tmp_path).selector
    keys = {fake.name: selector.key(fake, Plan()) for fake in fakes}
    assert build() == [("decoder", "onnxruntime")]
    selector.cache.fail(keys["onnxruntime"], "killed")
    assert build() == [("decoder", "inductor")]
    selector.ledger.demote(keys["inductor"].id, "inductor", "it is wrong")
    assert build() == [("decoder", "last")]
    selector.cache.build(keys["last"], lambda folder: (folder / "plan.bin").write_text("0.0"))
    assert build() == []
    assert [fake.built for fake in fakes] == [[]] * 4  # each in a process of its own


def test_build_that_is_killed_makes_way_for_the_next_backend(
    vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backends", lambda device, *_: [Fake(name="onnxruntime"), Fake(name="inductor")])
    kill = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    for name in ("onnxruntime", "inductor"):
        assert builds(monkeypatch, decoders_of(codec_of(vae), tmp_path), kill) == [("decoder", name)]
    assert not decoders_of(codec_of(vae), tmp_path).build_in_background()


def test_decoder_and_encoder_are_built_one_after_the_other(
    vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backends", lambda device, *_: [Fake()])
    decoders = decoders_of(codec_of(vae), tmp_path, encoder=None)
    assert builds(monkeypatch, decoders) == [("decoder", "fake"), ("encoder", "fake")]
    command = Decoders.command(decoders, "encoder", "fake")
    assert command[2:7] == ["skylapse", "compile", "tiny", "--part", "encoder"] and "--size" not in command


def test_frames_too_large_for_a_plan_for_any_size_are_built_by_their_own(
    vae: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "backends", lambda device, *_: [Fake()])
    decoders = decoders_of(codec_of(vae), tmp_path)
    selector = decoders.selector
    selector.coder = replace(selector.coder, max_any_area=23)  # of the 24 latents of 24 x 16 pixels
    command = decoders.command("decoder", "fake")
    assert command[command.index("--size") + 1] == "24x16"
    selector.cache.fail(selector.key(selector.backend("fake"), Plan(size=(4, 6))), "too large")
    assert builds(monkeypatch, decoders) == []


# --- encoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(coders: dict) -> WanVAE:
    """The encoder that `exported` has exported, in a whole VAE."""
    encoder: WanEncoder = coders["encoder"].module
    vae = WanVAE(encoder.config).requires_grad_(False)
    vae.encoder, vae.quant_conv = encoder.encoder, encoder.quant_conv
    return vae


def pixels(num_frames: int = 9, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_latents_of_onnx_runtime_are_eagers(whole: WanVAE, exported: Exported, tmp_path: Path) -> None:
    codec = codec_of(whole)
    decoders = Decoders("tiny", codec, (12, 8), Settings(profile_dir=tmp_path, decoder="eager", encoder="onnxruntime"))
    plan = Plan(size=(4, 6))
    key = decoders.encoder.key(decoders.encoder.backend("onnxruntime"), plan)
    source = exported("encoder", decoders.encoder.backend("onnxruntime").plans(plan)[0])
    decoders.encoder.cache.build(key, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))
    decoders.attach()
    ours, theirs = codec.encode(pixels()), codec_of(whole).encode(pixels())
    assert decoders.report.encoder == "onnxruntime" and decoders.report.backend == "eager"
    assert ours.shape == theirs.shape == (4, 5, 4, 6) and theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    other = pixels(height=12, width=16)  # of a size that nothing was built for
    assert torch.equal(codec.encode(other), codec_of(whole).encode(other))


def test_encoder_that_fails_or_is_wrong_is_demoted_and_eager_encodes(
    whole: WanVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [Fake(), Fake(name="wrong", adds=0.1)]
    monkeypatch.setattr(module, "backends", lambda device, *_: fakes)
    codec = codec_of(whole)
    decoders = Decoders("tiny", codec, (12, 8), Settings(profile_dir=tmp_path, decoder="eager", encoder="auto"))
    decoders.encoder.measure = lambda runs, *_: {name: float(name == "eager") for name in runs}  # type: ignore
    decoders.attach()
    for fake in fakes:
        decoders.encoder.build(fake, None, measure_at=(4, 6))
    expected = codec_of(whole).encode(pixels())
    fakes[0].calls = 0
    assert torch.equal(codec.encode(pixels()), expected) and fakes[0].calls == 3
    fakes[0].calls, fakes[0].fails_at = 0, 2
    assert torch.equal(codec.encode(pixels()), expected)
    report = decoders.report
    assert report.encoder == "eager" or "demoted" in decoders.encoder.choose(4, 6).why
    assert [told.partition(": ")[2].partition(":")[0] for told in report.demotions] == ["wrong", "fake"]
    assert report.facts["encoder"] == report.encoder and report.facts["decoder_demotions"] == 2
