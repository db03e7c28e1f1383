"""Noise schedules: which noise levels a request visits, and which timesteps its denoiser is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from .config import SOLVERS as SOLVERS
from .config import SolverConfig as SolverConfig


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The noise levels of one trajectory; `make_schedule(schedule.config, schedule.num_steps)` gives it again.

    sigmas: num_steps + 1 noise levels, falling, the last one 0; the latents at sigma are
        `(1 - sigma) * clean + sigma * noise`. The values are float32 ones, bit-equal to diffusers'.
    timesteps: num_steps values, what the denoiser is given before each step, in [0, num_train_timesteps].
    config: the solver configuration with the request's overrides already applied.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    config: SolverConfig

    @property
    def num_steps(self) -> int:
        """How many times the denoiser runs."""
        return len(self.timesteps)


def make_schedule(
    config: SolverConfig, num_inference_steps: int, shift: float | None = None, solver: str | None = None
) -> NoiseSchedule:
    """The schedule that diffusers' `set_timesteps(num_inference_steps)` makes, to the last bit.

    shift, solver: the request's own, None for the checkpoint's. A solver that is not the checkpoint's gets the same
    shift, as `Scheduler.from_config(checkpoint_scheduler.config, flow_shift=shift)` does.
    Raises ValueError for an unknown solver, a step count below 1, or a shift so large that noise levels coincide.
    Source: the shift is equation 23 of Esser et al. 2024 (arXiv 2403.03206); the rest is diffusers' `set_timesteps`.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    config = replace(
        config,
        shift=config.shift if shift is None else float(shift),
        solver=config.solver if solver is None else solver,
    )
    sigmas, timesteps = _LEVELS[config.solver](config, num_inference_steps)
    levels = (*sigmas.astype(np.float32).tolist(), 0.0)
    # The multistep solvers divide by differences of log((1 - sigma) / sigma): no level may repeat, none may be 1.
    repeats = any(high <= low for high, low in pairwise(levels))
    if repeats or (config.solver != "euler" and levels[0] >= 1.0):
        raise ValueError(
            f"shift must leave {num_inference_steps} distinct noise levels below 1 in float32, got {config.shift}"
        )
    return NoiseSchedule(sigmas=levels, timesteps=tuple(float(t) for t in timesteps.tolist()), config=config)


def first_step_of(num_steps: int, strength: float | None) -> int:
    """The step that a trajectory begins with; with a strength it takes the last int(strength * num_steps), at least 1.

    Source: SDEdit (arXiv 2108.01073), rounded down as diffusers' WanVideoToVideoPipeline.get_timesteps does.
    """
    return 0 if strength is None else num_steps - max(1, int(strength * num_steps))


_Levels = tuple[npt.NDArray[np.float64], npt.NDArray[np.number]]  # sigmas without the final 0, timesteps


def _shift(sigmas: npt.NDArray[np.float64], shift: float) -> npt.NDArray[np.float64]:
    # Written exactly as diffusers writes it: another order of operations moves the last bit, and with it a timestep.
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _unipc_levels(config: SolverConfig, num_steps: int) -> _Levels:
    num_train = config.num_train_timesteps
    sigmas = _shift(np.linspace(1, 1 / num_train, num_steps + 1)[:-1], config.shift)
    if abs(sigmas[0] - 1) < 1e-6:  # at exactly 1, log(1 - sigma) is infinite
        sigmas[0] -= 1e-6
    return sigmas, (sigmas * num_train).astype(np.int64)


def _dpmpp_levels(config: SolverConfig, num_steps: int) -> _Levels:
    # Unlike UniPC's, the grid goes from 1 - 1 / num_train down to 0 (which is dropped), so it starts below 1.
    num_train = config.num_train_timesteps
    clean = np.linspace(1, 1 / num_train, num_steps + 1)
    sigmas = np.flip(_shift(1.0 - clean, config.shift))[:-1]
    return sigmas, (sigmas * num_train).astype(np.int64)


def _euler_levels(config: SolverConfig, num_steps: int) -> _Levels:
    # diffusers shifts twice: the ends of the grid in the constructor (in float32), then the whole grid. So the lowest
    # noise level is shift(shift(1 / num_train)): 0.0089 rather than 0.0030 at shift 3.
    num_train = config.num_train_timesteps
    ends = torch.tensor([num_train, 1], dtype=torch.float32) / num_train
    ends = config.shift * ends / (1 + (config.shift - 1) * ends)
    sigma_max, sigma_min = ends.tolist()
    sigmas = _shift(np.linspace(sigma_max * num_train, sigma_min * num_train, num_steps) / num_train, config.shift)
    return sigmas, sigmas.astype(np.float32) * np.float32(num_train)


_LEVELS: dict[str, Callable[[SolverConfig, int], _Levels]] = {
    "unipc": _unipc_levels,
    "dpmpp": _dpmpp_levels,
    "euler": _euler_levels,
}
