"""DPM-Solver++, the multistep solver in the clean prediction, orders 1 to 3."""

from __future__ import annotations

import math

from torch import Tensor

from .schedule import NoiseSchedule
from .state import SolverState, StepWeights, half_log_snr, multistep


class DPMSolverPlusPlus:
    """DPM-Solver++ (Lu et al., arXiv 2211.01095), without noise; diffusers' DPMSolverMultistepScheduler."""

    name = "dpmpp"

    def start(self, schedule: NoiseSchedule, first_step: int = 0) -> SolverState:
        """The state before `first_step`; the caller has the latents, at noise level `schedule.sigmas[first_step]`."""
        return SolverState(
            schedule=schedule, first_step=first_step, step_index=first_step, plan=_plan(schedule, first_step)
        )

    def step(self, state: SolverState, velocity: Tensor, latents: Tensor) -> tuple[Tensor, SolverState]:
        """The next latents from the velocity at these, all float32 [C, T, H, W]."""
        return multistep(state, velocity, latents)


def _plan(schedule: NoiseSchedule, first_step: int) -> tuple[StepWeights, ...]:
    config, num_steps = schedule.config, schedule.num_steps
    # diffusers lowers the order of the last two steps only in short trajectories; the very last one goes to sigma 0,
    # where orders above 1 are undefined, so that one is always an Euler step (and `euler_at_final` changes nothing).
    lower_last_two = config.lower_order_final and num_steps < 15
    plan = []
    for index in range(first_step, num_steps):
        order = min(config.solver_order, index - first_step + 1)
        if index == num_steps - 1:
            order = 1
        elif index == num_steps - 2 and lower_last_two:
            order = min(order, 2)
        weights = _weights(schedule.sigmas, index, order, config.solver_type)
        plan.append(StepWeights(sigma=schedule.sigmas[index], predictor=weights))
    return tuple(plan)


def _weights(sigmas: tuple[float, ...], index: int, order: int, solver_type: str) -> tuple[float, ...]:
    """Weights of (sample, clean prediction, the one before, ...) for the step from sigmas[index] to the next level.

    In the paper's terms: s0 is where we are, t where we go, s1 and s2 the levels before;
    D0 = m0, D1 = (m0 - m1) / r0 and so on are differences of clean predictions m, which are multiplied out here.
    """
    alpha_t = 1 - sigmas[index + 1]
    lambda_t, lambda_s0 = half_log_snr(sigmas[index + 1]), half_log_snr(sigmas[index])
    h = lambda_t - lambda_s0
    phi_1 = math.expm1(-h)
    keep = sigmas[index + 1] / sigmas[index]
    first = -alpha_t * phi_1
    if order == 1:
        return keep, first

    lambda_s1 = half_log_snr(sigmas[index - 1])
    r0 = (lambda_s0 - lambda_s1) / h
    slope = alpha_t * (phi_1 / h + 1)  # the exact integral of a linear clean prediction
    if order == 2:
        slope_0 = (slope if solver_type == "heun" else 0.5 * first) / r0
        return keep, first + slope_0, -slope_0

    r1 = (lambda_s1 - half_log_snr(sigmas[index - 2])) / h
    curvature = -alpha_t * ((phi_1 + h) / h**2 - 0.5)
    tilt = (slope * r0 + curvature) / (r0 + r1)  # weight of the second difference
    slope_0, slope_1 = (slope + tilt) / r0, -tilt / r1
    return keep, first + slope_0, slope_1 - slope_0, -slope_1
