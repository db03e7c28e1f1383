"""UniPC, the predictor-corrector solver that Wan checkpoints ask for, orders 1 to 3."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .schedule import NoiseSchedule
from .state import SolverState, StepWeights, half_log_snr, multistep


class UniPC:
    """UniPC with B2(h) in the clean prediction (Zhao et al., arXiv 2302.04867); diffusers' UniPCMultistepScheduler."""

    name = "unipc"

    def start(self, schedule: NoiseSchedule, first_step: int = 0) -> SolverState:
        """The state before `first_step`; the caller has the latents, at noise level `schedule.sigmas[first_step]`."""
        return SolverState(
            schedule=schedule, first_step=first_step, step_index=first_step, plan=_plan(schedule, first_step)
        )

    def step(self, state: SolverState, velocity: Tensor, latents: Tensor) -> tuple[Tensor, SolverState]:
        """The next latents from the velocity at these, all float32 [C, T, H, W].

        The velocity serves twice: it corrects the latents that it was evaluated at, then predicts the next ones.
        """
        return multistep(state, velocity, latents)


def _plan(schedule: NoiseSchedule, first_step: int) -> tuple[StepWeights, ...]:
    config, num_steps, sigmas = schedule.config, schedule.num_steps, schedule.sigmas
    plan = []
    order = 0  # of the step before
    for index in range(first_step, num_steps):
        corrector: tuple[float, ...] = ()
        # `disable_corrector` names the step whose result is left alone, which is the one before the corrector's own.
        if index > first_step and index - 1 not in config.disable_corrector:
            corrector = _corrector_weights(sigmas, index, order)
        order = min(config.solver_order, index - first_step + 1)
        if config.lower_order_final:
            order = min(order, num_steps - index)
        predictor = _predictor_weights(sigmas, index + 1, order)
        plan.append(StepWeights(sigma=sigmas[index], predictor=predictor, corrector=corrector))
    return tuple(plan)


def _predictor_weights(sigmas: tuple[float, ...], target: int, order: int) -> tuple[float, ...]:
    """UniP: weights of (sample, clean prediction at target - 1, at target - 2, ...) for the latents at `target`."""
    h, ratios, scale = _interval(sigmas, target, order)
    # The paper's closed form for order 2, which diffusers uses too, is 1/2 and not the solution of the system.
    coefficients = (0.5,) if order == 2 else _solve(h, ratios)
    earlier = tuple(scale * c / r for c, r in zip(coefficients, ratios, strict=True))
    return sigmas[target] / sigmas[target - 1], scale - math.fsum(earlier), *earlier


def _corrector_weights(sigmas: tuple[float, ...], target: int, order: int) -> tuple[float, ...]:
    """UniC: weights of (last sample, clean prediction at target, at target - 1, ...) for the sample at `target`."""
    h, ratios, scale = _interval(sigmas, target, order)
    *coefficients, newest = (0.5,) if order == 1 else _solve(h, (*ratios, 1.0))
    earlier = tuple(scale * c / r for c, r in zip(coefficients, ratios, strict=True))
    new = scale * newest
    return sigmas[target] / sigmas[target - 1], new, scale - new - math.fsum(earlier), *earlier


def _interval(sigmas: tuple[float, ...], target: int, order: int) -> tuple[float, tuple[float, ...], float]:
    """Of the interval that ends at `target`: h, the positions r_k of order - 1 earlier levels, and -alpha * B2(h)."""
    lambda_s = half_log_snr(sigmas[target - 1])
    h = half_log_snr(sigmas[target]) - lambda_s
    ratios = tuple((half_log_snr(sigmas[target - 1 - age]) - lambda_s) / h for age in range(1, order))
    return h, ratios, -(1 - sigmas[target]) * math.expm1(-h)


def _solve(h: float, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """The coefficients that make the update exact for polynomials: the paper's theorem 3.1, B2(h) = exp(-h) - 1."""
    if not ratios:
        return ()
    b_h = math.expm1(-h)
    phi = b_h / -h - 1
    factorial = 1
    right_side = []
    for degree in range(1, len(ratios) + 1):
        right_side.append(phi * factorial / b_h)
        factorial *= degree + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(ratios, increasing=True).T  # row k holds r ** k
    return tuple(np.linalg.solve(powers, np.array(right_side)).tolist())
