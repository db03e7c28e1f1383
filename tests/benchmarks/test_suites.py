"""The local suites: traffic by a clock that is told, processes of their own, what is missing, tiny whole runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skylapse.benchmarks.harness import Budget, Missing
from skylapse.benchmarks.record import SuiteReport, read
from skylapse.benchmarks.suites import decode, denoise, engine, everything, memory, startup, traffic
from skylapse.benchmarks.suites.apart import Died
from skylapse.benchmarks.suites.overhead import measure_ticks
from skylapse.benchmarks.suites.traffic import MODES, Arrival, Driver, draw_trace, request_of
from skylapse.runtime.core.events import Failed, Finished
from skylapse.runtime.engine.engine import Engine

TWICE = Budget(seconds=0.0, least=2, most=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> Engine:
    return Engine.from_pretrained("demo")


def result(path: Path) -> SuiteReport:
    return read(path, SuiteReport)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "words", "message"),
    [
        (denoise.denoise, "--steps 0", "--steps must be 1 or more, got 0"),
        (denoise.denoise, "--size 64x64", "must be WIDTHxHEIGHTxFRAMES, for example 64x64x17, got '64x64'"),
        (denoise.denoise, "--size 64x0x17", "must be WIDTHxHEIGHTxFRAMES"),
        (decode.decode, "--size 20", "--size must be a multiple of 16, got 20"),
        (decode.decode, "--model other", "--model must be demo"),
        (decode.decode, "--backend vulkan", "got 'vulkan'"),
        (engine.engine, "--load 0", "--load must be above 0 and 10 at most, got 0"),
        (engine.engine, "--requests 0", "--requests must be 1 or more, got 0"),
        (memory.memory, "--rounds 0", "--rounds must be 1 or more, got 0"),
        (startup.startup, "--rounds -1", "--rounds must be 1 or more, got -1"),
        (everything.everything, "--limit 0", "--limit must be above 0 s, got 0"),
        (everything.everything, "--only serve", "--only must be kernels, .*, got serve"),
        (everything.everything, "--results pyproject.toml", "--results must be a folder, got the file"),
    ],
)
def test_bad_input_is_told_in_one_line(
    suite: Callable[[Sequence[str]], int],
    words: str,
    message: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    with pytest.raises(ValueError, match=message):
        suite(words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]  # and no result is begun


# --- traffic ----------------------------------------------------------------------------------------------------------


class FakeEngine:
    """A step takes a second and advances everyone who is in; a small request needs 2, a large one 5."""

    max_batch_tokens = 200

    def __init__(self) -> None:
        self.now, self.running, self.most = 0.0, dict[int, int](), 0
        self.together: list[set[tuple[int, int, int]]] = []
        self._sizes: dict[int, tuple[int, int, int]] = {}

    def submit(self, request: Any) -> int:
        ticket = len(self._sizes) + 1
        self._sizes[ticket] = request.size
        self.running[ticket] = 2 if request.size == traffic.SHAPES["small"] else 5
        return ticket

    def prepare(self, request: Any) -> Any:
        return type("Prepared", (), {"num_tokens": 48 if request.size == traffic.SHAPES["small"] else 384})

    def step(self) -> list[Any]:
        self.now += 1
        self.most = max(self.most, len(self.running))
        self.together.append({self._sizes[ticket] for ticket in self.running})
        self.running = {ticket: left - 1 for ticket, left in self.running.items()}
        done = [ticket for ticket, left in self.running.items() if not left]
        for ticket in done:
            del self.running[ticket]
        return [Finished(ticket, None) for ticket in done]  # type: ignore[arg-type]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def arrivals(*whens: tuple[float, str]) -> list[Arrival]:
    return [Arrival(at_s, kind, request_of(kind, 2, index)) for index, (at_s, kind) in enumerate(whens)]


def play(mode: str, trace: Sequence[Arrival]) -> tuple[traffic.Played, FakeEngine]:
    fake = FakeEngine()
    driver = Driver(fake, trace, MODES[mode], lambda: fake.now, fake.sleep)  # type: ignore[arg-type]
    return driver.play(), fake


TRACE = arrivals((0.0, "large"), (0.5, "small"), (1.5, "small"), (20.0, "small"))


def test_continuous_lets_everyone_in_at_once() -> None:
    played, fake = play("continuous", TRACE)
    assert played.latencies_s == [5.0, 2.5, 2.5, 2.0]  # from when each was due, not from when a step ended
    assert (played.of("small"), played.of("all")) == ([2.5, 2.5, 2.0], [5.0, 2.5, 2.5, 2.0])
    assert (played.span_s, fake.most) == (22.0, 3)


def test_one_at_a_time_waits_in_order() -> None:
    played, fake = play("one-at-a-time", TRACE)
    assert (played.latencies_s, fake.most) == ([5.0, 6.5, 7.5, 2.0], 1)


def test_static_batches_are_of_one_shape_and_fit() -> None:
    played, fake = play("static-batches", TRACE)
    assert played.latencies_s == [5.0, 6.5, 5.5, 2.0]
    assert all(len(shapes) == 1 for shapes in fake.together)
    _, fake = play("static-batches", arrivals(*[(0.0, "small")] * 5))
    assert fake.most == 2  # 96 tokens each, 200 in all


def test_failed_request_ends_the_play() -> None:
    fake = FakeEngine()
    fake.step = lambda: [Failed(1, RuntimeError("out of memory"))]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        Driver(fake, TRACE, MODES["continuous"], lambda: fake.now, fake.sleep).play()  # type: ignore[arg-type]


def test_trace_is_its_seed_s_and_offers_the_load() -> None:
    service_s = {"small": 1.0, "large": 6.0}
    trace = draw_trace(1000, 0.8, 5, service_s, seed=3)
    assert trace == draw_trace(1000, 0.8, 5, service_s, seed=3)
    assert trace != draw_trace(1000, 0.8, 5, service_s, seed=4)
    assert sum(arrival.kind == "large" for arrival in trace) == 200
    work_s = sum(service_s[arrival.kind] for arrival in trace)
    assert work_s / trace[-1].at_s == pytest.approx(0.8, rel=0.1)


def test_overhead_is_a_share_and_leaves_the_engine_as_it_was(demo: Engine) -> None:
    expert = demo.model.experts[0]
    before = dict(vars(expert))
    ticks = measure_ticks(demo, 1, "none", num_steps=4)
    assert vars(expert) == before
    assert "embed_time" not in vars(expert.condition_embedder)
    assert len(ticks.seconds) == 2  # the first step shares its tick with the text encoder, the last one ends the stage
    assert all(0 < solver < share < 0.5 for solver, share in zip(ticks.solver_shares, ticks.shares, strict=True))
    assert ticks.steps_a_tick == 1


# --- tiny whole runs --------------------------------------------------------------------------------------------------


def test_engine_suite_writes_percentiles_of_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, size in {"small": (32, 32, 1), "large": (32, 32, 5)}.items():
        monkeypatch.setitem(traffic.SHAPES, kind, size)
    monkeypatch.setattr(engine, "COUNTS", (1,))
    monkeypatch.setattr(engine, "CACHES", ("none",))
    monkeypatch.setattr(engine, "measure_preview", lambda *_: ([0.1, 0.3], [1.0, 1.0]))
    words = "--quick --requests 3 --steps 3 --seeds 2 --rounds 1 --lockstep 2 --load 9 --out"
    assert engine.engine([*words.split(), str(tmp_path / "engine.json")]) == 0
    report = result(tmp_path / "engine.json")
    found = {m.name: m for m in report.measurements}
    raw = [found[f"engine/poisson/seed-{seed}/continuous/small"].samples for seed in (0, 1)]
    assert [len(samples) for samples in raw] == [2, 2]
    medians = [pytest.approx(float(np.median(samples))) for samples in raw]
    assert found["engine/poisson/continuous/small/p50"].samples == medians
    assert len(found["engine/lockstep/static-batches"].samples) == 1
    assert found["engine/overhead/preview/share"].samples == [0.1, 0.3]
    assert {c.name for c in report.curves} == {f"engine/poisson/{mode}" for mode in MODES}
    assert len(report.curves[0].points) == 6
    one = next(c for c in report.comparisons if c.name == "engine/poisson/one-at-a-time/all/p95")
    assert (one.of, one.to, len(one.samples)) == ("one-at-a-time", "continuous", 2)


def test_denoise_suite_measures_steps_packs_and_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "Budget", lambda **_: TWICE)
    monkeypatch.setattr(denoise, "SAME", 1)
    monkeypatch.setattr(denoise, "MIXED", ((32, 32, 1), (32, 48, 5)))
    out = tmp_path / "denoise.json"
    assert denoise.denoise(["--quick", "--size", "32x48x5", "--steps", "10", "--out", str(out)]) == 0
    report = result(out)
    found = {m.name: m for m in report.measurements if not m.name.endswith("/cpu")}
    labels = {"width": 32, "height": 48, "num_frames": 5, "tokens": 24}  # 2 x 2 x 3 of both branches
    assert found["denoise/step/32x48x5/eager"].labels == labels
    assert found["denoise/pack/mixed/apart"].labels == {"requests": 2, "tokens": 24 + 8}
    assert {name for name in found if "/loop/" in name} == {
        f"denoise/loop/32x48x5/{cache}" for cache in ("exact", "high", "balanced", "fast")
    }
    assert report.missing == {"denoise/step/32x48x5/compiled": "only with --compile: it takes most of a minute a size"}


def test_presets_are_missing_where_they_mean_no_caching(tmp_path: Path, demo: Engine) -> None:
    options = denoise._parser().parse_args(["--quick", "--steps", "8", "--out", str(tmp_path / "a.json")])
    suite = denoise.Denoising(options, demo)
    suite.budget = TWICE
    suite.loop((32, 32, 1))
    assert [m.name for m in suite.sheet.measurements] == [f"denoise/loop/32x32x1/exact{end}" for end in ("", "/cpu")]
    assert set(suite.sheet.absent) == {f"denoise/loop/32x32x1/{preset}" for preset in ("high", "balanced", "fast")}
    assert all("8" in reason for reason in suite.sheet.absent.values())


def test_compiled_model_shares_weights_and_leaves_the_eager_one(demo: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = demo.model.experts[0]
    with pytest.raises(Missing, match="install g"):
        denoise.Compiled(demo.model, True, lambda name: None).model()
    with pytest.raises(Missing, match="only with --compile"):
        denoise.Compiled(demo.model, False).model()
    monkeypatch.setattr(denoise, "compile_trunk", lambda expert: setattr(expert, "trunk", expert.embed))
    compiled = denoise.Compiled(demo.model, True, lambda name: "g++").model().experts[0]
    assert compiled is not eager
    assert "trunk" not in vars(eager)
    ours, theirs = dict(compiled.named_parameters()), dict(eager.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)


def test_decoders_that_are_missing_or_break_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(part: str, decoder: str, backend: str, *_: object) -> Any:
        if backend == "tensorrt":
            raise Missing("TensorRT needs an NVIDIA GPU")
        if backend == "inductor":
            raise RuntimeError("g++: out of memory")
        return decode.codec_of(decoder, CPU)

    theirs = decode.codec_of("demo", CPU)
    long: list[Mapping[str, object]] = []

    def apart(function: object, asked: Mapping[str, object]) -> dict[str, float | None]:
        long.append(asked)
        if asked["num_frames"] == 65:
            raise Died("signal 9: it said nothing")
        return dict.fromkeys(decode.LONG_UNITS, 2.0) | {"above_bytes": None}

    monkeypatch.setattr(decode, "built", built)
    monkeypatch.setattr(decode, "diffusers_of", lambda part, *_: partial(decode.WORK[part], theirs))
    monkeypatch.setattr(decode, "run_apart", apart)
    monkeypatch.setattr(decode, "Budget", lambda **_: TWICE)
    words = ["--quick", "--size", "16", "--out", str(tmp_path / "decode.json")]
    words += [word for backend in decode.BACKENDS for word in ("--backend", backend)]
    assert decode.decode(words) == 1
    report = result(tmp_path / "decode.json")
    assert report.failures == {
        "decode/demo/inductor": "RuntimeError: g++: out of memory",
        "decode/long/65/eager": "Died: signal 9: it said nothing",
        "decode/long/65/onnxruntime": "Died: signal 9: it said nothing",
    }
    assert set(report.missing) == {
        f"{case}/tensorrt" for case in ("decode/demo", "encode/demo", "decode/long/17", "decode/long/65")
    }
    found = {m.name: m.samples for m in report.measurements}
    assert found["decode/demo/onnxruntime/difference"] == found["decode/demo/diffusers/difference"] == [0]
    assert found["encode/demo/onnxruntime/difference"] == found["encode/demo/diffusers/difference"] == [0]
    assert found["decode/long/17/eager/peak"] == [2]
    assert "decode/long/17/eager/above" not in found  # nobody has counted it
    over = [c.name for c in report.comparisons if "/over-" in c.name]
    names = [f"{group}/demo/diffusers/over-onnxruntime" for group in ("decode", "encode")]
    assert over == [name + suffix for name in names for suffix in ("", "/cpu")]
    assert {asked["backend"] for asked in long} == {"eager", "onnxruntime"}


def test_long_clip_tells_its_first_frame_before_the_rest() -> None:
    found = decode.long_clip("eager", 9, 32, "", None)
    assert found.keys() == decode.LONG_UNITS.keys()
    assert found["first_frame_s"] is not None
    assert found["whole_s"] is not None
    assert 0 < found["first_frame_s"] < found["whole_s"]


def test_admission_predicts_no_less_than_a_request_takes() -> None:
    found = memory.peak_of_a_request("demo", None, [64, 32, 5], 0, "tensors")
    assert 0 < found["measured"] <= found["predicted"]
    assert found["tokens"] == 2 * 2 * 4 * 2  # branches, latent frames, columns and rows of patches


def test_memory_suite_compares_round_by_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(function: object, asked: Mapping[str, Any]) -> dict[str, Any]:
        if asked["size"] == (16, 16, 1):
            raise Died("exit code 1: ValueError: width must be a multiple of 32")
        counted = asked["kind"] == "tensors"
        return {"measured": 100 if counted else None, "predicted": 150, "tokens": 8}

    monkeypatch.setattr(memory, "run_apart", apart)
    out = tmp_path / "memory.json"
    assert memory.memory(["--size", "32x32x5", "--size", "16x16x1", "--rounds", "2", "--out", str(out)]) == 1
    report = result(out)
    [ratio] = report.comparisons
    assert (ratio.name, ratio.of, ratio.samples) == ("memory/32x32x5/tensors/predicted", "predicted", [1.5, 1.5])
    assert report.missing == {"memory/32x32x5/resident": "this system does not count the memory of a process"}
    assert "width must be a multiple of 32" in report.failures["memory/16x16x1/tensors"]


def test_cold_starts_have_new_folders_and_warm_ones_a_filled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[tuple[Path, bool]] = []

    def first_step(options: object, folder: Path, compiles: bool) -> dict[str, list[float]]:
        assert folder.is_dir()
        folders.append((folder, (folder / "filled").exists()))
        (folder / "filled").touch()
        return {mark: [float(len(folders)), 1.0] for mark in startup.MARKS}

    monkeypatch.setattr(startup, "_first_step", first_step)
    monkeypatch.setattr(startup, "COMMANDS", {"nothing": ["true"]})
    assert startup.startup(["--quick", "--rounds", "2", "--out", str(tmp_path / "startup.json")]) == 0
    report = {m.name: m.samples for m in result(tmp_path / "startup.json").measurements}
    assert [filled for _, filled in folders] == [False, False, True, True, False]  # filled once, then in turns
    assert report["startup/eager/first-step/cold"] == [2, 5]
    assert report["startup/eager/first-step/warm"] == [3, 4]
    assert len(report["startup/nothing"]) == 2
    assert not any(folder.exists() for folder, _ in folders)


def test_marks_of_a_start_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = startup.marks_of_a_start("demo", None, "a red circle moving right")
    walls = [marks[name][0] for name in startup.MARKS]
    assert walls == sorted(walls)
    assert 0 < walls[0] < walls[1]
