"""Memory is asked before it is taken: a build, a comparison and a measurement wait for a GPU that has room for them."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from coded_clips import clip, coded
from fake_backend import Fake
from torch import Tensor, nn

from skylapse.compile import footprint
from skylapse.compile.backend import in_chunks
from skylapse.compile.cache import BuildFailed, EngineCache
from skylapse.compile.footprint import CONTEXT_BYTES, GIB, NoRoom, build_bytes, clip_bytes
from skylapse.compile.select import Selector
from skylapse.compile.stream import Coder, Plan, States
from skylapse.runtime.checkpoints.configs import parse_config
from skylapse.runtime.checkpoints.published import component
from skylapse.runtime.core.config import Settings
from skylapse.runtime.memory.peaks import _coding_curves
from skylapse.runtime.vae import backends as module
from skylapse.runtime.vae.backends import Decoders
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.coders import decoder_of
from skylapse.runtime.vae.tiling import Tiling
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

CPU = torch.device("cpu")
SIZE = (4, 6)
Free = Callable[[int], None]


@pytest.fixture
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["distilled"]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Say how much of the device is free, as if it were a GPU."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(footprint, "free_bytes", lambda device, cached=False: num_bytes)

    set_free(2**50)
    return set_free


class Fixed(Fake):  # type: ignore[misc]
    """A backend whose plans are of one latent frame at a time."""

    def plans(self, plan: Plan) -> Sequence[Plan]:
        return [dataclasses.replace(plan, chunk=1)]


def chooser_of(coder: Coder, folder: Path, *backends: Fake, wanted: str = "auto") -> Selector:
    """One that measures, and says whatever it has measured that eager is slower."""
    made = Selector(coder, backends, EngineCache(folder), device=CPU, wanted=wanted)
    measure = made.measure

    def measured(*arguments: object) -> dict[str, float]:
        return {name: 1.0 + (name == "eager") for name in measure(*arguments)}  # type: ignore[arg-type]

    made.measure = measured  # type: ignore[method-assign,assignment]
    return made


# --- what is predicted ------------------------------------------------------------------------------------------------


def test_bytes_of_a_clip_are_those_of_its_tensors_at_their_most() -> None:
    class Sums(nn.Module):
        """A product, and its sum with the old state."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
            y = x * self.weight
            y = y + 1 if states is None else y + states[0]
            return y, [y[:, :, -1:].clone()]

    coder = Coder("decoder", Sums(), 3, 3, 1, 1, 1, 1)
    frame = 3 * 4 * 5 * 2  # bytes of bf16
    # In the sum of a later chunk: x, product and sum, of four frames each, and the old state.
    assert clip_bytes(coder, (4, 5), 4, torch.bfloat16) == 3 * 4 * frame + frame
    assert clip_bytes(coder, (4, 5), 1, torch.float32) == 2 * (3 * frame + frame)
    assert clip_bytes(coder, (8, 5), 1, torch.float32) == 2 * clip_bytes(coder, (4, 5), 1, torch.float32)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 6.37), (torch.float32, 12.74)], ids=["bf16", "fp32"])
def test_bytes_of_a_clip_of_wan_2_1_at_720p_are_those_that_admission_predicts(
    dtype: torch.dtype, expected: float
) -> None:
    """GiB of one latent frame at a time, at the size itself; admission draws a line through two smaller ones."""
    config = parse_config(WanVAEConfig, component("wan2.1-vae"), "vae")
    with torch.device("meta"):
        decoder = decoder_of(WanVAE(config))
    found = clip_bytes(decoder, (90, 160), 1, dtype)
    assert found / GIB == pytest.approx(expected, rel=0.01)
    _, decoding = _coding_curves(config, dtype, 90, (1,))
    assert decoding.at(720, 1280, 1, Tiling(), 8) == pytest.approx(found, rel=0.02)


def test_a_build_takes_scratch_and_the_greatest_of_what_stands_beside_it(coders: dict[str, Coder]) -> None:
    coder, bf16 = coders["2.1"], torch.bfloat16
    weights = 6 * sum(p.numel() for p in coder.module.parameters())
    scratch = clip_bytes(coder, SIZE, 1, bf16) - coder.states.num_bytes(*SIZE, 2)
    judge = clip_bytes(coder, SIZE, 1, torch.float32)
    assert build_bytes(coder, SIZE, 1, bf16, 0) == 2 * CONTEXT_BYTES + weights + scratch + judge
    assert build_bytes(coder, SIZE, 1, bf16, GIB) == 2 * CONTEXT_BYTES + weights + scratch + GIB


# --- judging ----------------------------------------------------------------------------------------------------------


def test_what_there_is_no_room_to_compare_is_neither_trusted_nor_demoted(
    coder: Coder, tmp_path: Path, free: Free, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake()
    chooser = chooser_of(coder, tmp_path, fake)
    free(1000)
    with pytest.raises(BuildFailed, match=r"fake is built, but not used yet: to compare with eager .* are free"):
        chooser.build(fake, None, measure_at=SIZE)
    assert fake.calls == 0 and "fake is not used yet: to compare with eager at 4 x 6 latents" in caplog.text
    choice = chooser.choose(*SIZE)
    assert choice.backend == "eager" and "fake is built and not used yet: to compare with eager" in choice.why
    assert "not used yet: to compare" in chooser.standings((4, 6))[1].detail
    assert chooser.demotions == [] and chooser.cache.failure(chooser.key(fake, Plan())) is None
    free(2**40)
    chooser.refresh()
    assert chooser.choose(*SIZE).backend == "fake"
    assert fake.built == [Plan()]


def test_running_out_while_comparing_is_no_fault_of_the_artifact(
    coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    chooser = chooser_of(coder, tmp_path, fake)

    def out(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(chooser, "compare", out)
        with pytest.raises(BuildFailed, match="not used yet: CUDA out of memory"):
            chooser.build(fake, None, measure_at=SIZE)
    assert chooser.demotions == []
    chooser.refresh()
    assert chooser.choose(*SIZE).backend == "fake"


def test_what_there_is_no_room_to_measure_is_used_where_it_is_configured(
    coder: Coder, tmp_path: Path, free: Free
) -> None:
    fake = Fake()
    chooser_of(coder, tmp_path, fake).build(fake, None, measure_at=SIZE)  # compared, and measured at this size
    (ledger,) = tmp_path.glob("*.ledger.json")
    ledger.write_text(json.dumps({"checks": json.loads(ledger.read_text())["checks"]}))  # without the times
    free(1000)
    for wanted, chosen in (("auto", "eager"), ("fake", "fake")):
        choice = chooser_of(coder, tmp_path, fake, wanted=wanted).choose(*SIZE)
        assert choice.backend == chosen and choice.why.startswith("not measured: to compare with eager")


def test_a_build_without_room_to_measure_says_so(coder: Coder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    chooser = chooser_of(coder, tmp_path, fake)

    def out(*_: object) -> dict[str, float]:
        raise NoRoom("9 GiB are needed")

    monkeypatch.setattr(chooser, "measure", out)
    with pytest.raises(BuildFailed, match="fake is built, but not measured: 9 GiB are needed"):
        chooser.build(fake, None, measure_at=SIZE)
    assert chooser.cache.failure(chooser.key(fake, Plan())) is None


def test_chunk_that_runs_out_of_memory_is_eagers_and_the_next_one_its_own(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = chooser_of(coder, tmp_path, fake)
    run = chooser.build(fake, None, measure_at=SIZE).run
    plain, calls = fake.load(coder, Plan(), chooser.cache.find(chooser.key(fake, Plan())).folder), []  # type: ignore

    def once(x: Tensor, states: States | None) -> tuple[Tensor, States]:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x, states)

    candidate = chooser.find(fake, Plan())
    assert candidate is not None
    run = chooser._guarded(candidate, once)
    x = clip(coder, 4, SIZE)
    assert torch.equal(coded(run, coder, x, 1), coded(coder, coder, x, 1))
    assert len(calls) == 4 and chooser.demotions == []


def test_plans_of_one_latent_frame_take_chunks_of_any_number(coder: Coder, tmp_path: Path) -> None:
    lengths: list[int] = []
    fixed = Fixed()
    plain = fixed.load

    def load(coder: Coder, plan: Plan, folder: Path) -> object:
        inner = plain(coder, plan, folder)

        def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            lengths.append(x.shape[2])
            return inner(x, states)

        return run

    fixed.load = load  # type: ignore[method-assign,assignment]
    chooser = chooser_of(coder, tmp_path, fixed)
    choice = chooser.build(fixed, None, measure_at=SIZE)
    assert choice.backend == "fake" and {*lengths} == {1}, "compared, weighed and measured as it was built"
    chooser.verify(SIZE)
    x = clip(coder, 8, SIZE)
    ours = coded(chooser.choose(*SIZE).run, coder, x, 4)
    assert {*lengths} == {1} and torch.equal(ours, coded(coder, coder, x, 1))


def test_encoders_chunks_are_split_by_frames(coders: dict[str, Coder]) -> None:
    coder = coders["encoder"]
    seen: list[int] = []

    def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
        seen.append(x.shape[2])
        return coder(x, states)

    x = clip(coder, 4, SIZE)
    ours, theirs = coded(in_chunks(run, coder, 1), coder, x, 3), coded(coder, coder, x, 1)
    assert {*seen} == {1, coder.in_frames} and torch.equal(ours, theirs)


# --- building beside a service ----------------------------------------------------------------------------------------


def decoders_of(folder: Path, coders: dict[str, Coder], monkeypatch: pytest.MonkeyPatch) -> tuple[Decoders, list[str]]:
    """Decoders of a service, and the names of what it builds."""
    config: WanVAEConfig = coders["2.1"].module.config  # type: ignore[assignment]
    monkeypatch.setattr(module, "backends", lambda device, *_: [Fake()])
    codec = VideoCodec(WanVAE(config).requires_grad_(False), device=CPU)
    decoders = Decoders("tiny", codec, (12, 8), Settings(profile_dir=folder, encoder="eager"))
    built: list[str] = []

    def command(part: str, name: str) -> list[str]:
        built.append(f"{name} {part}")
        return [sys.executable, "-c", ""]

    monkeypatch.setattr(decoders, "command", command)
    return decoders, built


def test_no_build_is_begun_beside_a_full_gpu_and_it_is_asked_for_again(
    coders: dict[str, Coder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: Free,
    caplog: pytest.LogCaptureFixture,
) -> None:
    decoders, built = decoders_of(tmp_path, coders, monkeypatch)
    caplog.set_level(logging.INFO)
    asked: list[int] = []

    def wait(timeout: float | None = None) -> bool:
        """In place of ten minutes; after the third of them the GPU is empty."""
        assert timeout == module.ASK_AGAIN_S
        asked.append(len(built))
        told = decoders.report.facts["decoder_why"]
        assert "building fake's decoder takes about 1.0" in told and "0.50 GiB are free" in told
        if len(asked) == 3:
            free(2**40)
        return False

    monkeypatch.setattr(decoders._closing, "wait", wait)
    free(GIB // 2)
    assert decoders.build_in_background()
    assert decoders._building is not None
    decoders._building.join(60)
    assert asked == [0, 0, 0] and built == ["fake decoder"]
    told = [record.getMessage() for record in caplog.records if "takes about" in record.getMessage()]
    assert len(told) == 2 and "eager goes on" in told[0] and "0.50 GiB are free" in told[0], (
        "told once, and when it fits"
    )
    fake = decoders.selector.backends[0]
    assert decoders.selector.cache.failure(decoders.selector.key(fake, Plan())) is None
    assert "takes about" not in decoders.report.why


def test_a_service_that_ends_waits_for_no_memory(
    coders: dict[str, Coder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Free
) -> None:
    decoders, built = decoders_of(tmp_path, coders, monkeypatch)
    free(0)
    assert decoders.build_in_background()
    decoders.close()
    assert decoders._building is not None and not decoders._building.is_alive() and built == []


def test_a_build_is_of_the_services_own_dtype_and_size(
    coders: dict[str, Coder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders, _ = decoders_of(tmp_path, coders, monkeypatch)
    decoders.selector.dtype = "bf16"
    command = Decoders.command(decoders, "decoder", "fake")
    assert command[command.index("--dtype") + 1] == "bf16" and "--size" not in command
    decoders.selector.backends[0].max_any_pixels = 11
    command = Decoders.command(decoders, "decoder", "fake")
    assert command[command.index("--size") + 1] == "12x8"
