"""Memory at published widths: what a fresh process grows by a pixel is what the shape model says, within a quarter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from skylapse.benchmarks.record import SuiteReport, read
from skylapse.benchmarks.suites import real_width
from skylapse.benchmarks.suites.apart import run_apart
from skylapse.benchmarks.suites.memory import memory
from skylapse.benchmarks.suites.real_width import CASES, GIVES_BACK, SMALL, Case, resident, slope_of, told

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "memory_real_width.json"


@pytest.mark.slow
def test_a_process_grows_by_a_pixel_as_the_shape_model_says() -> None:
    case = Case("encode", SMALL, "encode", (6, 12))
    grown = run_apart(resident, {**case.asked, "seed": 0}, GIVES_BACK)
    if grown is None:
        pytest.skip("this system does not count the memory of a process")
    said = told(**case.asked)["told"]
    assert 0.75 < slope_of(grown) / slope_of(said) < 1.25
    for (_, peak), (_, predicted) in zip(grown, said, strict=True):  # never less, and libraries alone more
        assert 0 < peak - predicted < 60 * 2**20


def test_committed_slopes_are_within_a_quarter() -> None:
    report = read(RESULT, SuiteReport)
    assert report.is_publishable
    found = {one.name: one.samples for one in report.comparisons if one.name.endswith("resident/of-told")}
    assert {f"memory/{name}/resident/of-told" for name in ("wan2.1/decode", "wan2.1/encode", "1.3b/step")} <= set(found)
    for name, samples in found.items():
        assert len(samples) >= 3 and all(0.75 < ratio < 1.25 for ratio in samples), name


def test_weights_that_a_convolution_reorders_are_in_the_peak_beside_its_result() -> None:
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(16, 8, 3, 3)
    with torch.no_grad(), real_width.Reordered() as live:
        y = torch.conv2d(x, weight, padding=1)
    assert (live.live_bytes, live.peak_bytes) == (y.nbytes, y.nbytes + 2 * weight.nbytes)


def test_slopes_are_compared_round_by_round_and_the_rest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = iter([[(10, 1100), (20, 2000)], [(10, 1100), (20, 2200)]])

    def apart(function: object, asked: Mapping[str, Any], changed: Mapping[str, str] | None = None) -> Any:
        if function is told:
            return {"tensors": [(10, 800), (20, 1600)], "told": [(10, 1000), (20, 2000)]}
        return next(grown) if changed else [(10, 3000), (20, 5000)]

    monkeypatch.setattr(real_width, "run_apart", apart)
    out = tmp_path / "out.json"
    assert memory(["--real-width", "--case", "1.3b/step", "--rounds", "2", "--out", str(out)]) == 0
    report = read(out, SuiteReport)
    ratios = {one.name: sorted(one.samples) for one in report.comparisons}
    assert ratios["memory/1.3b/step/resident/of-told"] == [0.9, 1.1]
    assert ratios["memory/1.3b/step/malloc-default/of-tensors"] == [2.5]
    samples = {one.name: sorted(one.samples) for one in report.measurements}
    assert samples["memory/1.3b/step/rest/20"] == [0.0, 200.0]
    assert samples["memory/1.3b/step/resident"] == [90.0, 110.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--real-width --size 64x64x17", "--real-width must stand without --size and --model"),
        ("--real-width --model other", "--real-width must stand without --size and --model"),
        ("--case 1.3b/step", "--case must stand with --real-width"),
    ],
)
def test_options_that_do_not_go_together_are_told_in_one_line(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory(words.split())


def test_every_case_has_two_areas_and_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.sides[0] < case.sides[1] and case.sides[0] >= 4 for case in CASES)
