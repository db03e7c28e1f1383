"""The fitter chooses the cheapest way that fits, and names what moves: checked by hand on made-up peaks."""

from __future__ import annotations

import dataclasses
import random

import pytest
from peaks import coding, line, made_up

from skylapse.runtime.core.request import ModelLimits
from skylapse.runtime.memory.fit import Fit, Fitter, Needs, Size, Way, longest_of, nearest_of
from skylapse.runtime.memory.peaks import Curve
from skylapse.runtime.vae.tiling import Tiling

FRAME = 64 * 64
SIZE = Size(64, 64, 9)
LIMITS = ModelLimits(size_multiple=16, temporal_multiple=4, max_num_frames=81, max_pixels=10**9)
PARTS = dict(text_encoder=1000, transformer=2000, transformer_2=2000, encoder=100, decoder=150)
ONE_EXPERT = {name: num for name, num in PARTS.items() if name != "transformer_2"}
ORDER = ("text_encoder", "encoder", "transformer", "transformer_2", "decoder")
WHOLE, TILES = Tiling(), Tiling(threshold=0)


def needs(size: Size = SIZE, tokens: int = 10, held: int = 50, encodes: bool = True) -> Needs:
    return Needs(size, held, tokens, 2, encodes)


def fitter(budget: int = 10**6, **fields: object) -> Fitter:
    given: dict = dict(peaks=made_up(text=30), parts=PARTS, budget_bytes=budget, factor=8) | fields
    return Fitter(**given)


def best(budget: int, **fields: object) -> Fit:
    return fitter(budget, **fields).best(needs())


def test_everything_stays_together_in_chunks_of_four_where_there_is_room() -> None:
    fit = best(10**6)
    assert fit.fits and fit.way == Way((), "together", 4, WHOLE, 8)
    assert fit.always_bytes == sum(PARTS.values()) + 50 and fit.host_bytes == 0


def test_a_peak_is_what_is_always_there_and_what_is_brought_and_the_work() -> None:
    fit = fitter(fixed_bytes=7, peaks=made_up(text=30, workspace=3)).of(needs(), Way(ORDER, "apart", 1, WHOLE, 8))
    pixels = round(0.01 * FRAME)
    assert fit.always_bytes == 50 + 7 + 3 and fit.host_bytes == sum(PARTS.values())
    assert fit.brought_bytes == {"text": 1000, "encode": 100, "step": 2000, "decode": 150}
    assert fit.work_bytes == {"text": 30, "encode": pixels, "step": 20 * 60, "decode": pixels}
    assert fit.peak_bytes == {"text": 1090, "encode": 160 + pixels, "step": 3260, "decode": 210 + pixels}
    assert fit.most_bytes == 3200


def test_parts_that_are_needed_least_leave_first() -> None:
    tried = fitter()._ways
    moved = list(dict.fromkeys(way.moved for way in tried))
    assert moved == [(), ORDER[:1], ORDER[:2], ORDER[:4], ORDER]
    alone = list(dict.fromkeys(way.moved for way in fitter(parts=ONE_EXPERT)._ways))
    assert alone[-1] == ("text_encoder", "encoder", "decoder", "transformer") and len(alone) == 5


def test_each_budget_gets_the_cheapest_way_that_fits_it() -> None:
    """Ways from most room to least: all together, branches apart, the text encoder out, then more parts."""
    least: dict[tuple[tuple[str, ...], str], int] = {}
    one = fitter()
    for way in sorted(one._ways, key=lambda way: one._price(needs(), way)):
        fit = one.of(needs(), way)
        least.setdefault((way.moved, way.guidance), max(fit.peak_bytes[stage] for stage in fit.needs.stages))
    for (moved, guidance), num_bytes in least.items():
        found = best(num_bytes)
        cheaper = [key for key, needed in least.items() if needed <= num_bytes]
        assert found.fits and (found.way.moved, found.way.guidance) == cheaper[0], (moved, guidance)
    assert not best(min(least.values()) - 1).fits


def test_copies_of_experts_cost_more_than_guidance_apart_and_than_chunks_of_one() -> None:
    big = {name: num * 10**7 for name, num in PARTS.items()}
    one = fitter(parts=big)
    prices = {
        name: one._price(needs(Size(1280, 720, 81)), way)
        for name, way in {
            "all": Way((), "together", 4, WHOLE, 8),
            "apart": Way((), "apart", 4, WHOLE, 8),
            "chunk 1": Way((), "together", 1, WHOLE, 8),
            "text": Way(ORDER[:1], "together", 4, WHOLE, 8),
            "experts": Way(ORDER[:4], "together", 4, WHOLE, 8),
            "tiles": Way((), "together", 4, TILES, 8),
        }.items()
    }
    assert sorted(prices, key=prices.__getitem__) == ["all", "apart", "text", "chunk 1", "experts", "tiles"]


def test_chunks_of_one_are_for_who_has_no_room_for_four() -> None:
    peaks = made_up(decode=1.0)
    four, one = FRAME, FRAME // 2
    always = sum(PARTS.values()) + 50
    assert best(always + four, peaks=peaks).way == Way((), "together", 4, WHOLE, 8)
    tight = best(always + four - 1, peaks=peaks, offload="none")
    assert tight.fits and tight.way.chunk == 1
    assert not best(always + one - 1, peaks=peaks, offload="none").fits


def test_tiles_are_the_last_resort_of_decoding() -> None:
    size = Size(1024, 1024, 9)
    peaks = made_up(decode=1.0)
    always = sum(PARTS.values()) + 50
    found = fitter(always + 1024 * 1024 // 2 - 1, peaks=peaks, offload="none").best(needs(size))
    assert found.fits and found.way.tile(size) == 512
    assert found.work_bytes["decode"] == 512 * 512


def test_tiles_hold_states_of_all_of_them_and_two_buffers_of_the_frame() -> None:
    half = coding({4: 1.0}, state=0.25, output=2.0)
    tiles = 9  # 512 with an overlap of 128: starts at 0, 384 and 512
    expected = 512 * 512 * (1 + 0.25 * (tiles - 1)) + 2 * 2.0 * 4 * 1024 * 1024
    assert half.at(1024, 1024, 4, TILES, 8) == expected
    assert half.kept(1024, 1024, TILES, 8) == 0.25 * 512 * 512 * tiles
    assert half.kept(512, 256, WHOLE, 8) == 0.25 * 512 * 256


def test_none_moves_nothing_and_all_moves_everything() -> None:
    assert {way.moved for way in fitter(offload="none")._ways} == {()}
    assert {way.moved for way in fitter(offload="all")._ways} == {ORDER}
    assert best(sum(PARTS.values()), offload="none").blocked_by is not None
    assert best(10**6, offload="all").way.moved == ORDER


def test_the_host_says_no_where_pinned_copies_are_too_many() -> None:
    enough = sum(PARTS.values())
    assert best(10**6, offload="all", host_bytes=enough).fits
    assert best(10**6, offload="all", host_bytes=enough - 1).blocked_by == "host"
    for host_bytes in (0, 1000, 1100, 5100):
        found = best(7000, host_bytes=host_bytes)
        assert not found.fits or found.host_bytes <= host_bytes


def test_the_stage_that_needs_most_is_named() -> None:
    for stage, peaks in {
        "text": made_up(text=10**7),
        "encode": made_up(encode=10**4),
        "step": made_up(step=10**6, apart=10**6),
        "decode": made_up(decode=10**4),
    }.items():
        assert best(10**5, peaks=peaks).blocked_by == stage
    assert fitter(10**5, peaks=made_up(encode=10**4)).best(needs(encodes=False)).fits  # nothing is given


def test_where_none_fits_the_closest_is_told() -> None:
    found = best(1000)
    assert not found.fits and found.way.moved == ORDER and found.way.guidance == "apart"


def test_a_chunk_overlaps_a_step_where_both_fit() -> None:
    found = best(10**6)
    both = found.always_bytes + found.work_bytes["step"] + found.work_bytes["decode"]
    assert best(both).overlaps and not best(both - 1).overlaps and best(both - 1).way == found.way
    moved = fitter(10**6, moved=ORDER).best(needs())
    both = moved.always_bytes + sum(moved.brought_bytes[s] + moved.work_bytes[s] for s in ("step", "decode"))
    assert fitter(both, moved=ORDER).best(needs()).overlaps
    assert not fitter(both - 1, moved=ORDER).best(needs()).overlaps


def test_what_is_settled_is_not_chosen_again() -> None:
    assert {way.moved for way in fitter(moved=("encoder",))._ways} == {("encoder",)}


@pytest.mark.parametrize("longest", [1, 5, 41, 81])
def test_the_longest_clip_is_the_longest_that_fits(longest: int) -> None:
    def fits(size: Size) -> bool:
        return size.num_frames <= longest + 3

    found = longest_of(fits, SIZE, LIMITS)
    assert found == Size(64, 64, longest)
    assert longest_of(lambda size: False, SIZE, LIMITS) is None


def test_the_nearest_clips_fit_and_are_smaller_in_one_way_alone() -> None:
    asked = Size(640, 320, 81)
    for volume in (1, 10**4, 10**6, 10**7):
        found = nearest_of(lambda size: size.volume <= volume, asked, LIMITS)  # noqa: B023
        assert all(size.volume <= volume for size in found)
        for size in found:
            shorter = (size.width, size.height) == (640, 320) and size.num_frames < 81
            smaller = size.num_frames == 81 and size.volume < asked.volume
            assert shorter or smaller
            assert size.width % 16 == size.height % 16 == 0 and size.num_frames % 4 == 1
    assert [str(size) for size in nearest_of(lambda size: size.volume <= 10**7, asked, LIMITS)] == [
        "640x320x45",
        "496x240x81",
    ]


def test_more_memory_never_fits_less() -> None:
    draw = random.Random(0)
    for _ in range(15):
        parts = {name: draw.randint(1, 4000) for name in PARTS}
        peaks = made_up(draw.randint(1, 200), draw.randint(1, 200), draw.random(), draw.random())
        sizes = [needs(tokens=draw.randint(1, 100)) for _ in range(5)]
        for request in sizes:
            fits = [fitter(budget, parts=parts, peaks=peaks).best(request).fits for budget in range(500, 30000, 1500)]
            assert fits == sorted(fits)


def test_a_curve_is_lines_between_its_points_and_beyond_them() -> None:
    curve = Curve(((10, 100), (20, 200), (40, 1000)))
    assert [curve.at(count) for count in (0, 10, 15, 20, 30, 40, 50)] == [0, 100, 150, 200, 600, 1000, 1400]
    assert Curve(((10, 50), (20, 200))).at(0) == 0


@pytest.mark.parametrize("offset", [0, 70])
def test_the_most_that_fits_is_the_inverse_of_what_it_takes(offset: int) -> None:
    curve = Curve(((10, 100 + offset), (20, 150 + offset), (40, 900 + offset)))
    for num_bytes in range(0, 2000, 7):
        count = curve.most(num_bytes)
        assert count == 0 or curve.at(count) <= num_bytes + 1
        assert curve.at(count + 1) >= num_bytes
    assert line(100, 50).most(49) == 0 and line(100, 50).most(151) == 1


def test_a_chunk_that_was_not_measured_counts_as_the_next_smaller_one() -> None:
    half = coding({4: 4.0, 1: 1.0})
    assert [half.at(8, 8, chunk, WHOLE, 8) for chunk in (1, 2, 4, 8)] == [64, 64, 256, 256]
    assert dataclasses.asdict(half)["state_bytes"] == 0
