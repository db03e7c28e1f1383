"""Whole trajectories, schedules and states of the solvers, against diffusers' schedulers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from skylapse.runtime.sampler.config import SolverConfig
from skylapse.runtime.sampler.guidance import combine, guidance_is_on
from skylapse.runtime.sampler.schedule import NoiseSchedule, make_schedule
from skylapse.runtime.sampler.solver import get_solver, restore_state, state_record
from skylapse.runtime.sampler.state import SolverState, predict_clean, state_bytes, state_tensors

# diffusers' DPM-Solver++ hands a tensor to np.array, which NumPy 2 warns about; it is none of our doing.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

# Relative L2 of a whole trajectory in float32. Ours has float64 coefficients, diffusers' are float32 tensor arithmetic.
TOLERANCE = {"unipc": 1e-6, "dpmpp": 1e-6, "euler": 1e-6}
STEPS = (1, 2, 3, 5, 8, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0)
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# The scheduler_config.json of Wan2.1-T2V-14B-Diffusers.
WAN: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


def velocity_at(latents: Tensor, timestep: float) -> Tensor:
    """A fake denoiser, nonlinear in latents and timestep and mixing neighbours, so that history matters."""
    return torch.tanh(latents.roll(1, -1)) + 0.5 * torch.sin(latents + timestep / 200) - 0.3 * latents.flip(-2)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def run(schedule: NoiseSchedule, latents: Tensor, first_step: int = 0) -> Tensor:
    solver = get_solver(schedule.config.solver)
    state = solver.start(schedule, first_step)
    for timestep in schedule.timesteps[first_step:]:
        latents, state = solver.step(state, velocity_at(latents, timestep), latents)
    return latents


def run_diffusers(scheduler: Any, num_steps: int, latents: Tensor, first_step: int = 0) -> Tensor:
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(first_step)
    latents = latents[None]
    for timestep in scheduler.timesteps[first_step:]:
        latents = scheduler.step(velocity_at(latents, float(timestep)), timestep, latents, return_dict=False)[0]
    return latents[0]


def config_of(scheduler: Any) -> SolverConfig:
    """Our configuration, read from the very file that diffusers would save."""
    return SolverConfig.from_diffusers(json.loads(scheduler.to_json_string()))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


MAKERS: dict[str, Callable[..., Any]] = {
    "unipc": partial(UniPCMultistepScheduler, **FLOW),
    "dpmpp": partial(DPMSolverMultistepScheduler, **FLOW),
    "euler": lambda flow_shift=1.0, **options: partial(FlowMatchEulerDiscreteScheduler, shift=flow_shift)(**options),
}


@pytest.mark.parametrize("solver", MAKERS)
@pytest.mark.parametrize("shift", (0.5, *SHIFTS))
@pytest.mark.parametrize("num_train_timesteps", (1000, 250))
def test_sigmas_and_timesteps_equal_diffusers_bit_for_bit(solver: str, shift: float, num_train_timesteps: int) -> None:
    scheduler = MAKERS[solver](flow_shift=shift, num_train_timesteps=num_train_timesteps)
    for num_steps in (*range(1, 21), 25, 30, 40, 50, 100):
        schedule = make_schedule(config_of(scheduler), num_steps)
        scheduler.set_timesteps(num_steps)
        assert list(schedule.timesteps) == scheduler.timesteps.tolist()
        assert list(schedule.sigmas) == scheduler.sigmas.tolist()
        assert schedule.num_steps == num_steps and schedule.sigmas[-1] == 0.0


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_order": 2}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"disable_corrector": [0, 1, 4]}),
        ("dpmpp", {"solver_order": 1}),
        ("dpmpp", {"solver_order": 2}),
        ("dpmpp", {"solver_order": 2, "solver_type": "heun"}),
        ("dpmpp", {"solver_order": 3, "lower_order_final": False}),
        ("dpmpp", {"solver_order": 3, "euler_at_final": True}),
        ("euler", {}),
    ],
)
def test_trajectory_equals_diffusers(solver: str, options: dict[str, Any], num_steps: int, shift: float) -> None:
    scheduler = MAKERS[solver](flow_shift=shift, **options)
    ours = run(make_schedule(config_of(scheduler), num_steps), noise())
    assert relative_error(ours, run_diffusers(scheduler, num_steps, noise())) <= TOLERANCE[solver]


@pytest.mark.parametrize("solver", MAKERS)
@pytest.mark.parametrize("num_steps", (8, 20))
def test_trajectory_from_a_later_step_equals_diffusers(solver: str, num_steps: int) -> None:
    scheduler = MAKERS[solver](flow_shift=3.0)
    ours = run(make_schedule(config_of(scheduler), num_steps), noise(), first_step=3)
    assert relative_error(ours, run_diffusers(scheduler, num_steps, noise(), first_step=3)) <= TOLERANCE[solver]


def test_a_different_order_corrector_or_rule_is_far_outside_the_tolerance() -> None:
    config = SolverConfig.from_diffusers(WAN)
    whole = run(make_schedule(config, 20), noise())
    others = [
        replace(config, disable_corrector=tuple(range(20))),
        replace(config, disable_corrector=(7,)),
        replace(config, solver_order=1),
        replace(config, solver_order=3),
        replace(config, shift=3.01),
        replace(config, solver="dpmpp"),
    ]
    for other in others:
        assert relative_error(run(make_schedule(other, 20), noise()), whole) > 20 * TOLERANCE["unipc"]


@pytest.mark.parametrize("solver", MAKERS)
def test_more_steps_come_closer_to_the_exact_solution(solver: str) -> None:
    config = SolverConfig(solver=solver, shift=3.0)
    # Judged by another solver's long run, so that a mistake shared with diffusers would show.
    exact = run(make_schedule(config, 400, solver="unipc" if solver == "dpmpp" else "dpmpp"), noise())
    errors = [relative_error(run(make_schedule(config, num_steps), noise()), exact) for num_steps in (8, 20, 60)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("asked", MAKERS)
@pytest.mark.parametrize("checkpoint", MAKERS)
def test_solver_and_shift_of_a_request_act_like_from_config(checkpoint: str, asked: str) -> None:
    order = {} if checkpoint == "euler" else {"solver_order": 3}
    scheduler = MAKERS[checkpoint](flow_shift=3.0, num_train_timesteps=500, **order)
    shift_field = "shift" if asked == "euler" else "flow_shift"
    forms: dict[str, Any] = {} if asked == "euler" else FLOW
    other = type(MAKERS[asked]()).from_config(scheduler.config, **{shift_field: 5.0}, **forms)
    schedule = make_schedule(config_of(scheduler), 7, shift=5.0, solver=asked)
    other.set_timesteps(7)
    assert list(schedule.timesteps) == other.timesteps.tolist()
    assert list(schedule.sigmas) == other.sigmas.tolist()
    assert relative_error(run(schedule, noise()), run_diffusers(other, 7, noise())) <= TOLERANCE[asked]


def test_a_switched_solver_keeps_the_shift_of_the_checkpoint() -> None:
    config = SolverConfig.from_diffusers(WAN)
    for solver, maker in MAKERS.items():
        scheduler = maker(flow_shift=3.0)
        scheduler.set_timesteps(9)
        assert list(make_schedule(config, 9, solver=solver).sigmas) == scheduler.sigmas.tolist()


@pytest.mark.parametrize("solver", MAKERS)
def test_interleaved_trajectories_equal_solo_ones_bit_for_bit(solver: str) -> None:
    config = SolverConfig(solver=solver)
    schedules = [make_schedule(config, 9, shift=3.0), make_schedule(config, 5, shift=8.0)]
    stepper = get_solver(solver)
    latents = [noise(1), noise(2)]
    states = [stepper.start(schedule) for schedule in schedules]
    for turn in range(9):
        for who in (0, 1):
            if turn < schedules[who].num_steps:
                velocity = velocity_at(latents[who], schedules[who].timesteps[turn])
                latents[who], states[who] = stepper.step(states[who], velocity, latents[who])
    assert torch.equal(latents[0], run(schedules[0], noise(1)))
    assert torch.equal(latents[1], run(schedules[1], noise(2)))


@pytest.mark.parametrize("solver", MAKERS)
@pytest.mark.parametrize("solver_order", (2, 3))
def test_state_restored_from_json_and_tensors_continues_bit_for_bit(solver: str, solver_order: int) -> None:
    schedule = make_schedule(SolverConfig(solver=solver, solver_order=solver_order, disable_corrector=(6,)), 10)
    stepper = get_solver(solver)
    latents, state = noise(), stepper.start(schedule, first_step=1)
    for timestep in schedule.timesteps[1:]:
        tensors = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
        restored = restore_state(json.loads(json.dumps(state_record(state))), tensors)
        velocity = velocity_at(latents, timestep)
        expected, state = stepper.step(state, velocity, latents)
        latents, _ = stepper.step(restored, velocity, latents)
        assert torch.equal(latents, expected)


def test_step_leaves_its_arguments_as_they_were() -> None:
    for solver in MAKERS:
        stepper = get_solver(solver)
        state = stepper.start(make_schedule(SolverConfig(solver=solver, shift=3.0), 6))
        latents = noise()
        for timestep in state.schedule.timesteps:
            velocity = velocity_at(latents, timestep)
            kept = {**state_tensors(state), "latents": latents, "velocity": velocity}
            before = {name: tensor.clone() for name, tensor in kept.items()}
            latents, state = stepper.step(state, velocity, latents)
            assert all(torch.equal(kept[name], before[name]) for name in kept)


def test_state_holds_only_what_the_next_step_reads() -> None:
    held: dict[str, list[int]] = {}
    one = noise().numel() * 4
    for solver, order in (("unipc", 2), ("unipc", 3), ("dpmpp", 2), ("euler", 2)):
        stepper = get_solver(solver)
        state: SolverState = stepper.start(make_schedule(SolverConfig(solver=solver, solver_order=order), 6))
        latents = noise()
        counts = held.setdefault(f"{solver}-{order}", [state_bytes(state) // one])
        for timestep in state.schedule.timesteps:
            latents, state = stepper.step(state, velocity_at(latents, timestep), latents)
            counts.append(state_bytes(state) // one)
    assert held == {
        "unipc-2": [0, 2, 3, 3, 3, 3, 0],
        "unipc-3": [0, 2, 3, 4, 4, 3, 0],
        "dpmpp-2": [0, 1, 1, 1, 1, 0, 0],
        "euler-2": [0, 0, 0, 0, 0, 0, 0],
    }


def test_a_step_after_the_last_one_is_refused() -> None:
    for solver in MAKERS:
        stepper = get_solver(solver)
        _, state = stepper.step(stepper.start(make_schedule(SolverConfig(solver=solver), 1)), noise(), noise())
        with pytest.raises(AssertionError, match="ended"):
            stepper.step(state, noise(), noise())


def test_wan_config_is_read_as_it_stands() -> None:
    assert SolverConfig.from_diffusers(WAN) == SolverConfig(solver="unipc", shift=3.0)
    assert SolverConfig.from_diffusers({**WAN, "disable_corrector": [0]}).disable_corrector == (0,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "HeunDiscreteScheduler"),
        ("prediction_type", "v_prediction"),
        ("use_flow_sigmas", False),
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_dynamic_shifting", True),
        ("thresholding", True),
        ("shift_terminal", 0.1),
        ("final_sigmas_type", "sigma_min"),
        ("predict_x0", False),
        ("solver_type", "bh1"),
        ("solver_p", "DDIMScheduler"),
        ("solver_order", 4),
        ("lower_order_final", False),
        ("num_train_timesteps", 0),
        ("a_field_of_tomorrow", 1.5),
    ],
)
def test_unsupported_config_field_is_named_in_the_error(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SolverConfig.from_diffusers({**WAN, field: value})


@pytest.mark.parametrize("field", ("prediction_type", "use_flow_sigmas"))
def test_missing_field_whose_diffusers_default_is_unsupported_is_named(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        SolverConfig.from_diffusers({name: value for name, value in WAN.items() if name != field})


def test_unsupported_fields_of_the_other_schedulers_are_named() -> None:
    for field, value in (("algorithm_type", "sde-dpmsolver++"), ("use_lu_lambdas", True), ("solver_type", "logrho")):
        with pytest.raises(ValueError, match=field):
            SolverConfig.from_diffusers({"_class_name": "DPMSolverMultistepScheduler", **FLOW, field: value})
    for field in ("invert_sigmas", "stochastic_sampling", "use_dynamic_shifting"):
        with pytest.raises(ValueError, match=field):
            SolverConfig.from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", field: True})


def test_users_mistakes_name_the_argument() -> None:
    config = SolverConfig.from_diffusers(WAN)
    with pytest.raises(ValueError, match="unipc, euler, dpmpp"):
        get_solver("heun")
    with pytest.raises(ValueError, match="unipc, euler, dpmpp"):
        make_schedule(config, 10, solver="heun")
    with pytest.raises(ValueError, match="num_inference_steps"):
        make_schedule(config, 0)
    for shift in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="shift"):
            make_schedule(config, 10, shift=shift)


def test_noise_levels_fall_strictly() -> None:
    for solver in MAKERS:
        sigmas = make_schedule(SolverConfig(solver=solver, shift=8.0), 50).sigmas
        assert all(high > low for high, low in pairwise(sigmas))


def test_clean_prediction_undoes_the_noising() -> None:
    clean, other = noise(3), noise(4)
    latents = 0.3 * clean + 0.7 * other
    torch.testing.assert_close(predict_clean(latents, other - clean, 0.7), clean)


def test_guidance_is_on_above_one_and_extrapolates() -> None:
    cond, uncond = noise(5), noise(6)
    torch.testing.assert_close(combine(cond, uncond, 4.0), uncond + 4.0 * (cond - uncond))
    assert torch.equal(combine(cond, uncond, 0.0), uncond)
    assert not guidance_is_on(1.0) and guidance_is_on(1.01)
