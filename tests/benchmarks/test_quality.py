"""The comparison of ways of making a clip: what it pairs with what, its control and floor, its table, bad input."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skylapse.benchmarks.metrics import CAP_DB
from skylapse.benchmarks.record import SuiteReport, read, write
from skylapse.benchmarks.sheet import Sheet
from skylapse.benchmarks.suites.quality import Run, markdown, quality
from skylapse.benchmarks.suites.quality_ways import EXACT, MIXED, Made, Row, Way, parse_way

EASY, FAST = Way("cache", "easy"), Way("cache", "fast")


class FakeMakers:
    """Seconds count calls; a clip's levels say how far its way is off; caches compute fewer steps at odd seeds."""

    def __init__(self, interrupt_at: int = 10**6) -> None:
        self.made: list[tuple[str, int]] = []
        self.interrupt_at = interrupt_at

    def warm_up(self, asked: dict) -> None:
        pass

    def make(self, way: Way, asked: dict) -> Made:
        self.made.append((way.name, asked["seed"]))
        if len(self.made) == self.interrupt_at:
            raise KeyboardInterrupt
        steps, odd = asked["num_inference_steps"], asked["seed"] % 2
        evaluations = {"cache": steps // 2 + odd, "steps": int(way.value or 0) if way.kind == "steps" else 0}
        off = {"exact": 0, "batch": 0, "cache": 2, "steps": 4}[way.kind]
        alone = way != MIXED
        return Made(
            frames=np.full((3, 12, 12, 3), 100 + off, np.uint8),
            seconds=float(len(self.made)) if alone else None,
            evaluations=evaluations.get(way.kind, steps),
            tokens=1000 if alone else None,
            state_bytes=2048 * (way.kind == "cache"),
            close_calls=0,
        )


def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(threads=None, out=tmp_path / "q.json", quick=False, seed=0, limit=None, model="fake")


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., tuple[Sheet, FakeMakers, Run]]:
    def make(ways: list[Way], prompts: int = 2, interrupt_at: int = 10**6) -> tuple[Sheet, FakeMakers, Run]:
        sheet = Sheet("quality", options(tmp_path), {"steps": 10, "judged": False})
        makers = FakeMakers(interrupt_at)
        asked: list[tuple[dict, dict]] = [
            ({"prompt": "p", "seed": i, "num_inference_steps": 10}, {}) for i in range(prompts)
        ]
        return sheet, makers, Run(sheet, makers, [Row(way) for way in ways], asked)

    return make


def samples(report: SuiteReport, name: str) -> list[float]:
    return next(one.samples for one in report.measurements if one.name == name)


def test_each_way_is_timed_beside_an_exact_clip_of_its_prompt_and_the_order_turns(begin: Callable) -> None:
    sheet, makers, run = begin([EASY, FAST, MIXED])
    run.through(run.rows)
    first, second = makers.made[:4], makers.made[4:]
    assert first == [("exact=", 0), ("cache=easy", 0), ("cache=fast", 0), ("batch=mixed", 0)]
    assert second == [("exact=", 1), ("batch=mixed", 1), ("cache=fast", 1), ("cache=easy", 1)]
    run.record()
    report = sheet.report()
    ratios = {one.name: one.samples for one in report.comparisons}
    assert ratios["quality/denoise/cache=easy"] == pytest.approx([1 / 2, 5 / 8], rel=1e-4)
    assert "quality/denoise/batch=mixed" not in ratios, "beside others it has no time of its own"
    assert samples(report, "quality/psnr_pooled/batch=mixed") == [CAP_DB, CAP_DB]


def test_after_so_many_ways_the_exact_clip_is_timed_again_but_stays_the_reference(begin: Callable) -> None:
    _, makers, run = begin([Way("cache", f"easy:{i / 100}") for i in range(1, 7)], prompts=1)
    run.through(run.rows)
    assert [name for name, _ in makers.made].count("exact=") == 2
    assert len(run.exact) == 1


def test_control_has_as_many_steps_as_the_cache_computes_in_the_mean(begin: Callable) -> None:
    _, _, run = begin([EASY, MIXED], prompts=3)  # 5, 6 and 5 evaluations
    run.through(run.rows)
    assert [row.way for row in run.controls(10, scale=False)] == [Way("steps", "5")]
    assert [row.way.value for row in run.controls(10, scale=True)] == ["5", "7", "8"]  # all ten would be the exact clip


def test_table_sets_a_cache_beside_its_control(begin: Callable) -> None:
    sheet, _, run = begin([EASY, MIXED])
    run.through(run.rows)
    run.through(run.controls(10, scale=False))
    run.record()
    lines = markdown(sheet.report()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    assert [row[0] for row in cells] == ["`easy`", "`mixed`", "6 of 10 steps"]
    assert cells[0][1] == "5.5" and cells[0][3].startswith("42.1 ") and cells[0][4] == "36.1"
    assert cells[0][-1] == "2", "KiB of state"
    assert len(markdown(sheet.report(), only="batch=").splitlines()) == 3


def test_interrupted_run_keeps_whole_clips_and_says_so(begin: Callable, tmp_path: Path) -> None:
    sheet, _, run = begin([EASY, MIXED], prompts=3, interrupt_at=6)
    with sheet.running():
        try:
            run.through(run.rows)
        finally:
            run.record()
    report = read(tmp_path / "q.json", SuiteReport)
    assert (report.partial, sheet.status) == ("interrupted", 130)
    assert len(samples(report, "quality/psnr_pooled/cache=easy")) == 1
    assert len(samples(report, "quality/psnr_pooled/batch=mixed")) == 2


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> SuiteReport:
    out = tmp_path_factory.mktemp("quality") / "q.json"
    ways = ["quantize=int8", "cache=easy:0", "steps=1"]
    arguments = ["--ways", *ways, "--steps", "3", "--prompts", "1", "--no-control", "--out", str(out)]
    assert quality([*arguments, "--clips", str(out.parent / "clips")]) == 0
    return read(out, SuiteReport)


def test_clip_of_quantised_weights_lies_between_fewer_steps_and_the_exact_one(real: SuiteReport) -> None:
    fewer, int8 = (samples(real, f"quality/psnr_pooled/{way}")[0] for way in ("steps=1", "quantize=int8"))
    assert fewer < int8 < CAP_DB
    weights = real.settings["weights_bytes"]
    assert weights["int8"] < 0.6 * weights["exact"]


def test_exact_request_in_a_mixed_batch_and_a_cache_that_never_skips_are_the_floor(real: SuiteReport) -> None:
    assert samples(real, "quality/psnr_pooled/batch=mixed")[0] > 70
    assert samples(real, "quality/psnr_pooled/cache=easy:0") == [CAP_DB]
    evaluations = {way: samples(real, f"quality/evaluations/{way}") for way in ("exact", "cache=easy:0", "steps=1")}
    assert evaluations == {"exact": [3], "cache=easy:0": [3], "steps=1": [1]}
    tokens = {way: samples(real, f"quality/tokens/{way}")[0] for way in ("exact", "steps=1")}
    assert tokens["exact"] == 3 * tokens["steps=1"] > 0
    judged = next(one for one in real.measurements if one.name == "quality/judge/exact")
    assert set(judged.labels) == {"colour", "shape", "direction", "background", "size"}


def test_table_of_a_file_is_shown_without_a_model(
    real: SuiteReport, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "result.json"
    write(real, path)
    assert quality(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() == markdown(real)
    write(replace(real, benchmark="decode"), path)
    with pytest.raises(ValueError, match="must be a result of quality, got one of decode"):
        quality(["--show", str(path)])


@pytest.mark.parametrize("text", ["cache=nonsense", "quantize=int3", "steps=0", "easy", "batch=other", "dtype="])
def test_unknown_way_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_way(text)


def test_known_ways_are_read() -> None:
    assert parse_way("steps=020") == Way("steps", "20")
    assert parse_way("cache=easy:0.1").name == "cache=easy:0.1"
    assert parse_way("dtype=bf16").loads == (None, "bf16")
    assert EXACT.loads == parse_way("batch=mixed").loads == (None, None)
