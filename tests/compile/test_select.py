"""Choosing a backend: measured once, checked before it is trusted, demoted when it fails; a clip keeps its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from coded_clips import clip, coded, stream
from fake_backend import Fake
from torch import Tensor

from skylapse.compile.backend import Unavailable
from skylapse.compile.cache import BuildFailed, EngineCache
from skylapse.compile.select import MAX_ERROR, Selector
from skylapse.compile.stream import Coder, Plan, Run, States, copied

CPU = torch.device("cpu")
SIZE = (4, 6)


@pytest.fixture
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["distilled"]


def selector(coder: Coder, folder: Path, *backends: Fake, wanted: str = "auto", **times: float) -> Selector:
    """One whose measurements are given: seconds a clip, by backend."""
    made = Selector(coder, backends, EngineCache(folder), device=CPU, wanted=wanted)
    if times:
        made.measure = lambda runs, *_: {name: times[name] for name in runs}  # type: ignore[method-assign]
    return made


def test_nothing_built_is_decoded_by_eager(coder: Coder, tmp_path: Path) -> None:
    choice = selector(coder, tmp_path, Fake()).choose(*SIZE)
    assert choice.backend == "eager" and "nothing is built" in choice.why
    x = clip(coder, 3, SIZE)
    assert torch.equal(coded(choice.run, coder, x, 2), coded(coder, coder, x, 2))


@pytest.mark.parametrize(("fake", "eager", "chosen"), [(1.0, 2.0, "fake"), (2.0, 1.0, "eager")])
def test_faster_one_is_chosen_and_remembered(
    coder: Coder, tmp_path: Path, fake: float, eager: float, chosen: str
) -> None:
    chooser = selector(coder, tmp_path, Fake(), fake=fake, eager=eager)
    choice = chooser.build(chooser.backend("fake"), None, measure_at=SIZE)
    assert choice.backend == chosen and "measured at 4 x 6 latents" in choice.why
    later = selector(coder, tmp_path, Fake())
    later.measure = None  # type: ignore[assignment,method-assign]  # nothing is measured twice
    assert later.choose(*SIZE).backend == chosen
    assert later.choose(50, 60).backend == chosen  # of the nearest size that was measured


def test_backend_that_is_configured_is_used_though_eager_is_faster(coder: Coder, tmp_path: Path) -> None:
    chooser = selector(coder, tmp_path, Fake(), wanted="fake", fake=2.0, eager=1.0)
    assert chooser.choose(*SIZE).backend == "eager"  # until it is built
    assert chooser.build(chooser.backend("fake"), None, measure_at=SIZE).backend == "fake"


def test_real_measurement_prefers_the_quicker(coder: Coder, tmp_path: Path) -> None:
    """Against a coder whose eager half does its work twenty times."""

    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = coder.module

        def forward(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
            for _ in range(20):
                result = self.inner(x, states)
            return result

    slow = Coder("decoder", Slow(), 4, 3, 1, 4, 1, 1)
    fake = Fake()
    fake.load = lambda _, plan, folder: coder.__call__  # type: ignore[method-assign]
    chooser = selector(slow, tmp_path, fake)
    assert chooser.build(fake, None, measure_at=SIZE).backend == "fake"
    times = chooser.ledger.times(SIZE)
    assert times["eager"] > 3 * times["fake"] > 0


@pytest.mark.parametrize("adds", [2 * MAX_ERROR["fp32"], float("nan"), float("inf")])
def test_wrong_artifact_is_never_used(coder: Coder, tmp_path: Path, adds: float) -> None:
    chooser = selector(coder, tmp_path, Fake(adds=adds), fake=1.0, eager=2.0)
    choice = chooser.build(chooser.backend("fake"), None, measure_at=SIZE)
    assert choice.backend == "eager" and "fake was demoted: differs from eager by" in choice.why
    later = selector(coder, tmp_path, Fake(adds=adds), fake=1.0, eager=2.0)
    assert later.choose(*SIZE).backend == "eager" and len(later.demotions) == 1
    assert [s.state for s in later.standings(SIZE)] == ["built", "demoted"]


def test_what_is_built_is_judged_by_fp32_whatever_serves(coder: Coder, tmp_path: Path) -> None:
    """Eager serves in bf16, is what others are timed against, and takes inputs of fp32; no key depends on it."""
    served = copied(coder.module, CPU, torch.bfloat16)
    cache = EngineCache(tmp_path)
    chooser = Selector(coder, [Fake()], cache, device=CPU, eager=served)
    timed: list[torch.dtype] = []

    def measure(runs: dict[str, Run], *_: object) -> dict[str, float]:
        timed.append(runs["eager"](clip(coder, 1, SIZE), None)[0].dtype)
        return {"eager": 2.0, "fake": 1.0}

    chooser.measure = measure  # type: ignore[assignment,method-assign]
    assert chooser.build(chooser.backend("fake"), None, measure_at=SIZE).backend == "fake"
    key = chooser.key(chooser.backend("fake"), Plan())
    assert chooser.ledger.checked(key.id) == 0.0 and timed == [torch.bfloat16]
    assert key == Selector(coder, [Fake()], cache, device=CPU).key(chooser.backend("fake"), Plan())


def test_eager_takes_over_a_clip_and_empties_its_states(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    run = chooser.build(fake, None, measure_at=SIZE).run
    x = clip(coder, 3, SIZE)
    _, states = run(x[:, :, :1], None)
    kept = [state.clone() for state in states]
    fake.fails_at = fake.calls + 1
    y, _ = run(x[:, :, 1:], states)
    assert states == [] and torch.equal(y, coder(x[:, :, 1:], kept)[0])


def test_artifact_that_was_built_elsewhere_is_checked_here(coder: Coder, tmp_path: Path) -> None:
    """A folder baked into an image has artifacts, and no ledger of this machine."""
    baked, wrong = Fake(), Fake(name="wrong", adds=1.0)
    for backend in (baked, wrong):
        made = selector(coder, tmp_path / "baked", backend)
        made.cache.build(made.key(backend, Plan()), partial(backend.build, coder, Plan()))
    cache = EngineCache(tmp_path / "own", shared=[tmp_path / "baked"])
    chooser = Selector(coder, [baked, wrong], cache, device=CPU, wanted="auto")
    chooser.measure = lambda runs, *_: {name: 1.0 + (name == "eager") for name in runs}  # type: ignore
    assert chooser.choose(*SIZE).backend == "fake"
    assert chooser.demotions == [f"wrong: differs from eager by 1, {MAX_ERROR['fp32']:.3g} is allowed"]
    key = chooser.key(baked, Plan())
    assert chooser.ledger.checked(key.id) == 0.0


def test_chunk_that_fails_is_done_by_eager_and_the_backend_is_demoted(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    chooser.build(fake, None, measure_at=SIZE)
    choice = chooser.choose(*SIZE)
    x = clip(coder, 6, SIZE)
    fake.calls, fake.fails_at = 0, 3
    whole = coded(choice.run, coder, x, 1)
    assert torch.equal(whole, coded(coder, coder, x, 1)) and fake.calls == 3
    after = chooser.choose(*SIZE)
    assert after.backend == "eager" and "device-side assert" in after.why
    assert chooser.build(fake, None, measure_at=SIZE, again=True).backend == "fake"  # who builds it again pardons it


def test_clip_keeps_the_backend_that_it_began_with(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    x = clip(coder, 5, SIZE)
    before = stream(chooser.choose(*SIZE).run, coder, x, 1)
    next(before)
    chooser.build(fake, None, measure_at=SIZE)
    fake.calls = 0
    list(before)
    assert fake.calls == 0
    list(stream(chooser.choose(*SIZE).run, coder, x, 1))
    assert fake.calls == 5


def test_size_of_its_own_comes_before_any_size(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    chooser.build(fake, None, measure_at=SIZE)
    general = chooser.choose(*SIZE).artifact
    own = chooser.build(fake, SIZE, measure_at=SIZE).artifact
    assert [plan.size for plan in fake.built] == [None, SIZE]
    assert own != general == chooser.choose(5, 6).artifact
    assert chooser.standings(SIZE)[1].detail == "for this size"
    assert chooser.standings((5, 6))[1].detail == "for any size"


def test_new_version_weights_or_threads_begin_anew(coder: Coder, coders: dict[str, Coder], tmp_path: Path) -> None:
    chooser = selector(coder, tmp_path, Fake(of={"runner": "1"}), fake=1.0, eager=2.0)
    assert chooser.build(chooser.backend("fake"), None, measure_at=SIZE).backend == "fake"
    assert selector(coder, tmp_path, Fake(of={"runner": "2"})).choose(*SIZE).backend == "eager"
    assert selector(coders["2.1"], tmp_path, Fake(of={"runner": "1"})).choose(*SIZE).backend == "eager"


def test_absent_backend_says_what_to_install(coder: Coder, tmp_path: Path) -> None:
    chooser = selector(coder, tmp_path, Fake(absent="fake is not there: pip install fake"))
    with pytest.raises(Unavailable, match="pip install fake"):
        chooser.build(chooser.backend("fake"), None, measure_at=SIZE)
    with pytest.raises(Unavailable, match="backend must be fake, got 'tensorrt'"):
        chooser.backend("tensorrt")
    assert [s.state for s in chooser.standings(SIZE)] == ["built", "missing"]


def test_failed_build_is_told_and_remembered(coder: Coder, tmp_path: Path) -> None:
    fake = Fake(build_error=RuntimeError("no tactic for node 7"))
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    with pytest.raises(BuildFailed, match="no tactic for node 7"):
        chooser.build(fake, None, measure_at=SIZE)
    standing = chooser.standings(SIZE)[1]
    assert (standing.state, standing.detail) == ("failed", "RuntimeError: no tactic for node 7")
    fake.build_error = None
    with pytest.raises(BuildFailed, match="tried before"):
        chooser.build(fake, None, measure_at=SIZE)
    assert chooser.build(fake, None, measure_at=SIZE, again=True).backend == "fake"


def test_artifact_that_does_not_load_is_thrown_away(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    chooser.build(fake, None, measure_at=SIZE)
    chooser.refresh()
    fake.load = lambda *_: (_ for _ in ()).throw(RuntimeError("of another version"))  # type: ignore[method-assign]
    assert chooser.choose(*SIZE).backend == "eager"
    assert chooser.cache.find(chooser.key(fake, Plan())) is None and chooser.demotions == []


def test_verifying_measures_and_compares_again(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    chooser.build(fake, None, measure_at=SIZE)
    chooser.measure = lambda runs, *_: dict.fromkeys(runs, 5.0)  # type: ignore[method-assign]
    standings = {standing.backend: standing for standing in chooser.verify(SIZE)}
    assert standings["fake"].seconds == 5.0 and standings["fake"].error == 0.0
    fake.adds = 1.0
    (chooser.cache.root / chooser.key(fake, Plan()).id / "plan.bin").write_text("1.0")
    assert {s.backend: s.state for s in chooser.verify(SIZE)}["fake"] == "not built"  # altered on the disk
    chooser.build(fake, None, measure_at=SIZE, again=True)
    assert {s.backend: s.state for s in chooser.verify(SIZE)}["fake"] == "demoted"


def test_ledger_that_cannot_be_written_is_kept_in_memory(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    made = selector(coder, tmp_path / "baked", fake)
    made.cache.build(made.key(fake, Plan()), lambda folder: fake.build(coder, Plan(), folder))
    (tmp_path / "file").write_text("no folder")
    cache = EngineCache(tmp_path / "file" / "own", shared=[tmp_path / "baked"])
    chooser = Selector(coder, [fake], cache, device=CPU)
    measured: list[object] = []
    chooser.measure = lambda runs, *_: measured.append(1) or {"eager": 2.0, "fake": 1.0}  # type: ignore
    assert chooser.choose(*SIZE).backend == "fake"
    chooser.refresh()
    assert chooser.choose(*SIZE).backend == "fake" and len(measured) == 1


def test_artifact_that_the_machine_cannot_run_just_now_is_kept(coder: Coder, tmp_path: Path) -> None:
    fake = Fake()
    chooser = selector(coder, tmp_path, fake, fake=1.0, eager=2.0)
    chooser.build(fake, None, measure_at=SIZE)
    chooser.refresh()
    fake.load = lambda *_: (_ for _ in ()).throw(Unavailable("no provider works"))  # type: ignore[method-assign]
    assert chooser.choose(*SIZE).backend == "eager"
    assert chooser.cache.find(chooser.key(fake, Plan())) is not None and chooser.demotions == []
