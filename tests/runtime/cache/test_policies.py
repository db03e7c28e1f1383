"""Cache policies: their rules by hand, their presets, and what happens without a calibration."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from skylapse.runtime.cache.budget import Budget, warm_mask
from skylapse.runtime.cache.calibration import Calibration
from skylapse.runtime.cache.easy import EasyCache
from skylapse.runtime.cache.first_block import FirstBlockCache
from skylapse.runtime.cache.magcache import MagCache
from skylapse.runtime.cache.policy import Point, Run, extrapolate
from skylapse.runtime.cache.spec import POLICIES, PRESETS, WAN_PRESETS, choose, parse_policy, policy_spec
from skylapse.runtime.cache.step_cache import StepCache
from skylapse.runtime.cache.taylorseer import TaylorSeer
from skylapse.runtime.cache.teacache import TeaCache


def run_of(num_steps: int, **fields: object) -> Run:
    sigmas = tuple(1 - k / num_steps for k in range(num_steps + 1))
    return Run(sigmas=sigmas, num_blocks=4, **fields)  # type: ignore[arg-type]


def marks(mask: tuple[bool, ...] | None) -> str:
    assert mask is not None
    return "".join("1" if computed else "0" for computed in mask)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_forecast_is_exact_on_polynomials_up_to_its_order_on_uneven_levels(order: int) -> None:
    sigmas = (0.97, 0.91, 0.83, 0.6)
    powers = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-1.5, 0.7], [0.9, 4.0]], dtype=torch.float64)[: order + 1]

    def at(sigma: float) -> torch.Tensor:
        return sum(row * sigma**degree for degree, row in enumerate(powers))  # type: ignore[return-value]

    points = [Point(sigma, (at(sigma),)) for sigma in reversed(sigmas)]
    (forecast,) = extrapolate(points, 0.42, order)
    assert torch.allclose(forecast, at(0.42), atol=1e-11)
    (higher,) = extrapolate([Point(s, (torch.tensor(s ** (order + 1)),)) for s in reversed(sigmas)], 0.42, order)
    assert abs(float(higher) - 0.42 ** (order + 1)) > 1e-3


def test_easycache_follows_its_rule() -> None:
    """Latents move by 1, velocity by 0.5 of mean 2: k / mean|v| = 0.25, so each moved step adds 0.25."""
    policy = EasyCache(threshold=0.6)
    state = policy.commit(None, 1.0, [torch.zeros(4)], [torch.full((4,), 1.5)], [])
    assert not policy.is_ready(state)
    state = policy.commit(state, 0.9, [torch.ones(4)], [torch.full((4,), 2.0)], [])
    value = float(policy.indicator(state, [torch.full((4,), 2.0)], [torch.ones(4)]))
    assert value == pytest.approx(0.25)
    assert policy.decide(0.0, value) == (False, 0.25)
    assert policy.decide(0.25, value) == (False, 0.5)
    assert policy.decide(0.5, value) == (True, 0.0)
    (predicted,) = policy.predict(state, 0.5, [torch.full((4,), 3.0)])
    assert torch.equal(predicted, torch.full((4,), 4.0))  # x + (v - x) of the last computed step


def test_an_indicator_that_is_no_number_computes() -> None:
    nan = float("nan")
    assert EasyCache().decide(0.0, nan)[0] and FirstBlockCache().decide(0.0, nan)[0]


def test_first_block_takes_the_branch_that_has_moved_most() -> None:
    policy = FirstBlockCache(threshold=0.3)
    probes = [torch.ones(2, 3), torch.ones(2, 3)]
    state = policy.commit(None, 1.0, [torch.zeros(2, 3)] * 2, [torch.ones(2, 3)] * 2, probes)
    value = float(policy.indicator(state, [torch.ones(2, 3), torch.full((2, 3), 1.5)], []))
    assert value == pytest.approx(0.5) and policy.decide(0.0, value) == (True, 0.0)


def test_first_block_forecasts_in_sigma() -> None:
    policy = FirstBlockCache(order=1)
    zero = [torch.zeros(1)]
    state = policy.commit(None, 1.0, zero, [torch.tensor([1.0])], zero)
    state = policy.commit(state, 0.75, zero, [torch.tensor([2.0])], zero)
    (out,) = policy.predict(state, 0.25, [torch.tensor([10.0])])
    assert float(out) == pytest.approx(14.0)  # 1 a quarter: 4 at 0.25, added to the tokens


def test_taylorseer_computes_every_interval_the_first_steps_and_the_last() -> None:
    assert marks(TaylorSeer(interval=3, warmup=2).plan(run_of(12))) == "110010010011"
    assert marks(TaylorSeer(interval=1).plan(run_of(5))) == "11111"


@pytest.mark.parametrize("num_steps", [5, 20, 30, 50])
@pytest.mark.parametrize("warmup", [1, 3])
def test_a_budget_computes_as_many_steps_as_it_says(num_steps: int, warmup: int) -> None:
    for num_computed in range(warmup + 1, num_steps + 1):
        mask = warm_mask(num_steps, num_computed, warmup)
        assert len(mask) == num_steps and sum(mask) == num_computed and all(mask[:warmup]) and mask[-1]
    assert sum(Budget(share=1).plan(run_of(num_steps))) == num_steps


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_a_budget_of_few_steps_is_spread_from_the_first_to_the_last(num_steps: int) -> None:
    for num_computed in range(1, num_steps + 1):
        mask = marks(Budget(share=num_computed / num_steps).plan(run_of(num_steps)))
        assert mask.count("1") == num_computed and mask[0] == "1"
        gaps = [len(gap) for gap in mask.split("1")[1:]]  # skipped steps behind each computed one
        assert num_computed == 1 or (gaps[-1] == 0 and max(gaps[:-1]) - min(gaps[:-1]) <= 1)


def test_a_budget_of_few_steps_keeps_a_warmup_that_was_asked_for() -> None:
    assert [marks(Budget(0.5, 1, warmup).plan(run_of(6))) for warmup in (0, 1, 3)] == ["100101", "101001", "111000"]
    assert marks(Budget(0.5).plan(run_of(9))) == marks(warm_mask(9, 5, 3))


def test_restarts_are_computed_whatever_the_mask_says() -> None:
    mask = TaylorSeer(interval=4, warmup=1).plan(run_of(12, restarts=frozenset({0, 6})))
    assert marks(mask) == "100010100011"
    assert Budget(share=0.2).plan(run_of(12, restarts=frozenset({0, 7})))[7]


def test_magcache_follows_its_rule() -> None:
    """Each magnitude is 0.9: errors 0.1, then 0.1 + 0.19 = 0.29; a third step would reach 0.56."""
    table = Calibration("unipc", 10, 3.0, 4.0, magnitudes=(0.9,) * 10)
    mask = MagCache(threshold=0.3, max_skips=4, warmup=2).plan(run_of(10, calibration=table))
    assert marks(mask) == "1100100100"
    assert marks(MagCache(threshold=9, max_skips=2, warmup=1).plan(run_of(10, calibration=table))) == "1001001001"


def test_teacache_follows_its_rule() -> None:
    """The polynomial 2 x makes 0.08 of each step's 0.04; the threshold 0.2 is reached by the third."""
    distances = (0.0, *(0.04,) * 9)
    run = run_of(10, embedding_distances=distances, coefficients=(2.0, 0.0))
    assert marks(TeaCache(threshold=0.2).plan(run)) == "1001001001"
    table = Calibration("unipc", 10, 3.0, 4.0, coefficients=(9.0, 0.0))
    calibrated = dataclasses.replace(run, calibration=table)
    assert marks(TeaCache(threshold=0.2).plan(calibrated)) == "1111111111"


@pytest.mark.parametrize("policy", [TeaCache(), MagCache()])
def test_a_missing_calibration_is_an_error_that_says_what_to_run(policy: TeaCache | MagCache) -> None:
    with pytest.raises(ValueError, match=f"cache policy {policy.name} needs a calibration of 'x' for"):
        policy.plan(run_of(10, missing="a calibration of 'x' for unipc"))


def test_a_calibrated_mask_is_used_at_its_own_guidance_alone() -> None:
    table = Calibration("unipc", 10, 3.0, 4.0, masks={"1,5": "1111000001"})
    policy = Budget(share=0.5)
    assert marks(policy.plan(run_of(10, calibration=table, guidance_scale=4.0))) == "1111000001"
    assert marks(policy.plan(run_of(10, calibration=table, guidance_scale=2.0))) == marks(warm_mask(10, 5, 3))
    explicit = dataclasses.replace(policy, warmup=2)
    assert marks(explicit.plan(run_of(10, calibration=table, guidance_scale=4.0))) == marks(warm_mask(10, 5, 2))


def test_skips_in_a_row_are_bounded() -> None:
    cache = StepCache(choose("easy:threshold=10,max_skips=3,warmup=1", 20, WAN_PRESETS, False), run_of(20))
    latents = torch.ones(4)
    while len(cache.trace) < 20:
        if cache.must_compute() is None:
            cache.decide(float(cache.indicator([latents])))
        if cache.must_compute():
            cache.computed(cache.commit(0.5, [latents], [latents * 2]), latents)
        else:
            cache.skipped(latents)
        latents = latents + 0.01
    assert cache.trace == "11000100010001000101"


def test_a_close_call_is_noted() -> None:
    cache = StepCache(choose("first_block:threshold=0.5,warmup=0", 9, WAN_PRESETS, False), run_of(9))
    cache.decide(0.50005)
    assert cache.close_calls == (0,) and cache.must_compute()


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_a_policy_is_read_back_from_its_own_text(name: str) -> None:
    policy = parse_policy(name)
    assert policy_spec(parse_policy(policy_spec(policy))) == policy_spec(policy)


def test_the_first_parameter_needs_no_name() -> None:
    assert policy_spec(parse_policy("easy:0.2,max_skips=2")) == policy_spec(EasyCache(threshold=0.2, max_skips=2))
    with pytest.raises(ValueError, match="cache policy easy has no parameter '3'"):
        parse_policy("easy:0.2,3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("easy:0.1,threshold=0.2", "threshold of cache policy easy is given twice"),
        ("easy:warmup=1.0", r"warmup of cache policy easy must be whole, or a share below 1, got 1\.0"),
        ("easy:11", "threshold of cache policy easy must be from 0 to 10, got 11"),
        ("first_block:nan", "threshold of cache policy first_block must be from 0 to 10, got nan"),
    ],
)
def test_parameters_out_of_range_or_in_doubt_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_none_where_it_would_do_harm_and_says_why(preset: str) -> None:
    assert choose(preset, 9, WAN_PRESETS, False).policy.name != "none"
    few = choose(preset, 8, WAN_PRESETS, False)
    assert few.policy.name == "none" and few.reason == "8 steps are too few to skip any (fewest: 9)"
    distilled = choose(preset, 50, WAN_PRESETS, True)
    assert distilled.policy.name == "none" and "distilled" in str(distilled.reason)


@pytest.mark.parametrize(("num_steps", "distilled", "why"), [(4, False, "too few"), (50, True, "distilled")])
def test_a_policy_by_name_is_used_all_the_same_and_logged(
    num_steps: int, distilled: bool, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    choice = choose("easy:0.1", num_steps, WAN_PRESETS, distilled)
    assert choice.reason is None and policy_spec(choice.policy) == policy_spec(EasyCache(threshold=0.1))
    assert why in caplog.text and "easy:0.1" in caplog.text


def test_a_policy_by_name_is_not_worth_a_warning_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    choose("easy:0.1", 50, WAN_PRESETS, False)
    choose("none", 4, WAN_PRESETS, True)
    assert not caplog.text
