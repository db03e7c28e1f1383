"""Metrics of clips against values worked out by hand."""

import math
import sys

import numpy as np
import pytest

from skylapse.benchmarks.harness import Missing
from skylapse.benchmarks.metrics import (
    CAP_DB,
    LEAST_FLICKER,
    UNITS,
    compare_clips,
    flicker,
    lpips,
    radial_spectrum,
    spectrum_distance,
)


def grey(*levels: float, side: int = 16) -> np.ndarray:
    """A clip of even frames of these levels."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def waves(amplitude: float, cycles: int, side: int = 32, frames: int = 3) -> np.ndarray:
    """Vertical stripes of so many cycles a frame."""
    row = 128 + amplitude * np.cos(2 * math.pi * cycles * np.arange(side) / side)
    return np.broadcast_to(np.rint(row)[None, None, :, None], (frames, side, side, 3)).astype(np.uint8)


def test_equal_clips_have_the_best_of_every_metric() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    found = compare_clips(clip, clip)
    assert list(found) == list(UNITS)
    assert {found[name] for name, unit in UNITS.items() if name.startswith("psnr")} == {CAP_DB}
    assert [found[name] for name in ("ssim_mean", "ssim_p5", "flicker", "spectrum")] == pytest.approx([1, 1, 1, 0])


def test_pooled_mean_and_worst_psnr_of_one_frame_that_is_off_by_ten() -> None:
    found = compare_clips(grey(100, 110, 100, 100), grey(100, 100, 100, 100))
    assert found["psnr_pooled"] == pytest.approx(10 * math.log10(255**2 / 25))  # mean squared error 100 / 4
    assert found["psnr_worst"] == pytest.approx(10 * math.log10(255**2 / 100))
    assert found["psnr_mean"] == pytest.approx((3 * CAP_DB + found["psnr_worst"]) / 4)
    assert found["psnr_motion"] == pytest.approx(10 * math.log10(255**2 / (200 / 3)))  # of 3 differences two are off


def test_similarity_of_even_frames_is_the_luminance_term() -> None:
    found = compare_clips(grey(100, 100, 100), grey(110, 110, 110))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    assert [found["ssim_mean"], found["ssim_p5"]] == pytest.approx([expected, expected])


def test_flicker_is_the_mean_second_difference() -> None:
    assert flicker(grey(0, 4, 0, 4)) == 8
    assert flicker(grey(0, 10, 20, 30)) == 0, "steady motion has none"
    assert flicker(grey(0, 255)) == 0, "two frames say nothing"


def test_flicker_is_compared_as_a_ratio_that_is_finite_beside_a_still_clip() -> None:
    assert compare_clips(grey(0, 4, 0, 4), grey(0, 2, 0, 2))["flicker"] == 2
    assert compare_clips(grey(0, 4, 0, 4), grey(7, 7, 7, 7))["flicker"] == 8 / LEAST_FLICKER


def test_stripes_of_twice_the_amplitude_have_four_times_the_power_in_their_ring_alone() -> None:
    faint, strong = radial_spectrum(waves(20, 8)), radial_spectrum(waves(40, 8))  # four pixels a wave: nothing rounded
    assert len(faint) == 16
    ratios = strong / faint
    assert ratios[8 - 1] == pytest.approx(4, rel=0.02)
    assert np.delete(ratios, 8 - 1) == pytest.approx(1)
    distance = spectrum_distance(waves(40, 8), waves(20, 8))
    assert distance == pytest.approx(10 * math.log10(4) / math.sqrt(16), rel=0.02)  # one ring of 16


def test_blur_is_seen_in_the_spectrum() -> None:
    sharp = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(float)
    blurred = (sharp + np.roll(sharp, 1, axis=2)) / 2
    fine, coarse = radial_spectrum(blurred.astype(np.uint8)), radial_spectrum(sharp.astype(np.uint8))
    assert fine[14] / coarse[14] < 0.6 < 0.9 < fine[0] / coarse[0]


def test_frames_that_are_not_square_have_rings_of_the_shorter_side() -> None:
    wide = np.concatenate([waves(20, 4), waves(20, 4)], axis=2)  # 32 x 64: 8 cycles across, as far as 4 of 32 pixels
    assert len(radial_spectrum(wide)) == 16
    assert int(radial_spectrum(wide).argmax()) == 4 - 1


def test_a_learned_metric_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(Missing, match=r"skylapse\[quality\]"):
        lpips()
