"""Whole requests beside diffusers: who stands in a round, what is compared with what, and who is left out and why."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from skylapse import VideoRequest
from skylapse.benchmarks.harness import Missing
from skylapse.benchmarks.metrics import CAP_DB
from skylapse.benchmarks.peers.command import Race, markdown, peak_of, peers, requests
from skylapse.benchmarks.peers.contestants import ALL, EAGER, OURS, QUICK, Contestants, uncached, words_of
from skylapse.benchmarks.peers.diffusers_wan import Timed, cache_dit
from skylapse.benchmarks.record import SuiteReport, read
from skylapse.benchmarks.sheet import Sheet

SECONDS = {"exact": 2.0, EAGER: 6.0, "high": 1.0, "diffusers-mag": 3.0}
LEVELS = {"exact": 100, EAGER: 101, "high": 102, "diffusers-mag": 103}
REQUEST = VideoRequest(prompt="p", width=16, height=16, num_frames=5, num_inference_steps=3)


class FakeContestants:
    """Clips of one level; time that doubles in the second round; a peer may be missing, or fail in a round."""

    def __init__(
        self,
        missing: str = "",
        fails_in_round: tuple[str, int] | None = None,
        error: BaseException | None = None,
    ) -> None:
        self.settings: dict[str, str] = {}
        self.order: list[str] = []
        self.missing, self.fails, self.error = missing, fails_in_round, error or RuntimeError("broke")

    def ready(self, name: str, warm: VideoRequest) -> Callable[[VideoRequest], Timed]:
        if name == self.missing:
            raise Missing("is not there")
        calls = 0

        def run(request: VideoRequest) -> Timed:
            nonlocal calls
            calls += 1
            self.order.append(name)
            if (name, calls) == self.fails:
                raise self.error
            seconds = SECONDS[name] * calls
            frames = np.full((5, 16, 16, 3), LEVELS[name], np.uint8)
            return Timed(frames, dict(encode=0.1, denoise=seconds - 0.2, decode=0.1, whole=seconds), 2 * seconds)

        return run


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[SuiteReport, FakeContestants]]:
    monkeypatch.setattr(Race, "_labels", lambda self, name: {})  # no engine to ask for its decoder

    def run(names: list[str], rounds: int = 2, **fake: object) -> tuple[SuiteReport, FakeContestants]:
        options = argparse.Namespace(
            threads=None, out=tmp_path / "p.json", quick=True, seed=0, limit=None, model="fake"
        )
        sheet, contestants = Sheet("peers", options, {}), FakeContestants(**fake)
        it = Race(sheet, contestants, "16x16x5,3")
        with sheet.running():
            try:
                it.line_up(names, REQUEST)
                for _ in range(rounds):
                    it.round(REQUEST)
            finally:
                it.record()
        return read(tmp_path / "p.json", SuiteReport), contestants

    return run


def samples(report: SuiteReport, name: str) -> list[float]:
    return next(one.samples for one in report.measurements if one.name == f"peers/16x16x5,3/{name}")


def test_order_turns_round_with_each_round_and_ratios_are_taken_within_it(race: Callable) -> None:
    report, contestants = race(["exact", EAGER, "high"])
    assert contestants.order == ["exact", EAGER, "high", "high", EAGER, "exact"]
    ratios = {one.name.removeprefix("peers/16x16x5,3/"): one for one in report.comparisons}
    assert ratios["whole/exact"].samples == [3, 3], "the second round is twice as slow for all"
    assert ratios["whole/high"].samples == ratios["whole/high/cpu"].samples == [6, 6]
    assert (ratios["whole/high"].of, ratios["whole/high"].to) == (EAGER, "high")
    assert samples(report, "whole/exact") == [2, 4] and samples(report, "whole/exact/cpu") == [4, 8]


def test_each_is_compared_with_its_own_uncached_clip_and_exact_frames_with_diffusers(race: Callable) -> None:
    report, _ = race(["exact", EAGER, "high", "diffusers-mag"], rounds=1)
    two_levels = 10 * np.log10(255**2 / 4)
    assert samples(report, "psnr_pooled/high") == pytest.approx([two_levels])  # 102 beside our 100
    assert samples(report, "psnr_pooled/diffusers-mag") == pytest.approx([two_levels])  # 103 beside diffusers' 101
    assert samples(report, "largest_difference/exact") == [1]
    assert samples(report, "off_by_more_than_1/exact") == [0]
    assert not any("psnr_pooled/exact" in one.name for one in report.measurements)


def test_peer_that_is_not_there_is_missing_and_one_that_breaks_is_out_with_its_figures(race: Callable) -> None:
    report, _ = race(["exact", EAGER, "high", "diffusers-mag"], missing="high", fails_in_round=("diffusers-mag", 2))
    assert report.missing == {"peers/16x16x5,3/high": "is not there"}
    assert report.failures == {"peers/16x16x5,3/diffusers-mag": "RuntimeError: broke"}
    assert samples(report, "whole/exact") == [2, 4]
    assert not any("diffusers-mag" in one.name for one in (*report.measurements, *report.comparisons))


def test_round_that_is_interrupted_counts_for_nobody(race: Callable) -> None:
    report, _ = race(["exact", EAGER], fails_in_round=("exact", 2), error=KeyboardInterrupt())  # diffusers had its turn
    assert report.partial == "interrupted"
    assert samples(report, "whole/exact") == [2] and samples(report, f"whole/{EAGER}") == [6]


def test_table_has_a_row_of_each_and_says_who_was_left_out(race: Callable) -> None:
    report, _ = race(["exact", EAGER, "high", "diffusers-mag"], missing="diffusers-mag")
    lines = markdown(report).splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["exact", EAGER, "high"]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "| 3.00x (3.00-3.00) |" in rows[0] and "| 42.1 |" in rows[2]
    assert "differ by at most 1 of 255; at most 0 % of values by more than 1." in markdown(report)
    assert lines[-1] == "Left out: diffusers-mag (is not there)."


def test_references_are_the_same_engine_s_uncached_clips() -> None:
    assert {name: uncached(name) for name in QUICK} == {
        "exact": None,
        EAGER: None,
        "high": "exact",
        "balanced": "exact",
        "fast": "exact",
        "diffusers-first-block": EAGER,
    }
    assert all(uncached(name) == EAGER for name in ALL if name not in (*OURS, EAGER))


def test_requests_differ_in_prompt_and_seed_and_repeat_with_the_run_s_seed() -> None:
    options = argparse.Namespace(model="demo", size=(64, 64, 9), steps=7, seed=3)
    first, again = requests(options, 4), requests(options, 4)
    assert first == again
    assert len({one.prompt for one in first}) > 1 and len({one.seed for one in first}) == 4
    assert {(one.size, one.num_inference_steps) for one in first} == {((64, 64, 9), 7)}


def test_cache_dit_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(Missing, match=r"skylapse\[peers\]"):
        cache_dit(None)


def test_peer_s_error_while_warming_up_is_a_reason_but_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = Contestants("demo", "fp32", torch.device("cpu"))

    def breaks(warm: VideoRequest) -> Timed:
        raise IndexError("tuple index out of range\nmore")

    for name in ("diffusers-faster", "exact"):
        monkeypatch.setitem(contestants._makers, name, lambda warm: breaks)
    with pytest.raises(Missing, match=r"does not run on this model: IndexError: tuple index out of range$"):
        contestants.ready("diffusers-faster", REQUEST)
    with pytest.raises(IndexError):
        contestants.ready("exact", REQUEST)


def test_settings_of_a_peer_are_told_in_numbers() -> None:
    @dataclass
    class Config:
        threshold: float = 0.05
        use_lite_mode: bool = False
        callback: object = None
        cache_identifiers: list[str] | None = None

    assert words_of(Config()) == "Config(threshold=0.05, use_lite_mode=False)"
    assert words_of(Config(cache_identifiers=["a"])).endswith("cache_identifiers=['a'])")


@pytest.mark.parametrize(("said", "error"), [("no JSON", ValueError), ('{"missing": "gone"}', Missing)])
def test_process_apart_that_has_no_figure_says_why(
    said: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    options = argparse.Namespace(
        model="demo", size=None, steps=None, threads=1, dtype="fp32", device=torch.device("cpu")
    )
    with pytest.raises(error):
        peak_of("exact", options)


def test_real_round_beside_diffusers_has_the_same_frames(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    names = ["exact", EAGER, "diffusers-mag", "diffusers-text-kv"]
    arguments = ["--contestants", *names, "--rounds", "1", "--steps", "9", "--size", "64x64x5", "--no-memory"]
    assert peers([*arguments, "--out", str(out)]) == 0
    report = read(out, SuiteReport)
    found = {one.name.removeprefix("peers/64x64x5,9/"): one.samples[0] for one in report.measurements}
    assert found["largest_difference/exact"] <= 1
    assert 20 < found["psnr_pooled/diffusers-mag"] <= CAP_DB
    assert found["whole/exact"] >= found["encode/exact"] + found["denoise/exact"] + found["decode/exact"] - 0.01 > 0
    assert report.missing == {"peers/64x64x5,9/diffusers-text-kv": "hooks nothing of WanTransformer3DModel"}
    assert json.loads(out.read_text())["settings"]["of_contestants"]["diffusers-mag"].startswith("MagCacheConfig(")
