"""Noise schedules: which noise levels a request visits, and which timesteps its denoiser is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SOLVERS = ("unipc", "euler", "dpmpp")

_CLASS_NAMES = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpmpp",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
# Each of these changes the samples when it is on, and we implement none of them.
_MUST_BE_OFF = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_dynamic_shifting",
    "thresholding",
    "solver_p",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
)
# Each of these has a single value that we implement: what diffusers assumes when it is missing, then ours.
_MUST_EQUAL: dict[str, tuple[Any, Any]] = {
    "predict_x0": (True, True),
    "algorithm_type": ("dpmsolver++", "dpmsolver++"),
    # "sigma_min" repeats the last sigma, and then diffusers itself ends in 0 / 0.
    "final_sigmas_type": ("zero", "zero"),
}
_READ = (
    "num_train_timesteps",
    "flow_shift",
    "shift",
    "solver_order",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "disable_corrector",
    "prediction_type",
    "use_flow_sigmas",
)
# With flow sigmas, and with all of _MUST_BE_OFF off, diffusers never looks at these.
_WITHOUT_EFFECT = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "lambda_min_clipped",
    "variance_type",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "time_shift_type",
    "sigma_min",
    "sigma_max",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)
_KNOWN = frozenset((*_MUST_BE_OFF, *_MUST_EQUAL, *_READ, *_WITHOUT_EFFECT))


@dataclass(frozen=True, slots=True)
class SolverConfig:
    """What a checkpoint says about its solver, in diffusers' words; `shift` is `flow_shift` of UniPC and DPM-Solver++.

    A field that a solver does not read (`disable_corrector` for "dpmpp", say) is carried along, so that switching
    the solver and back loses nothing; diffusers' `from_config` does the same.
    """

    solver: str
    shift: float = 1.0
    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "midpoint"  # DPM-Solver++'s second-order rule, "midpoint" | "heun"; UniPC is always B2(h)
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()  # steps after which UniPC does not correct

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a positive number, got {self.shift}")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {self.num_train_timesteps}")
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {self.solver_order}")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type must be midpoint or heun, got {self.solver_type!r}")
        if self.solver == "unipc" and self.solver_order > 1 and not self.lower_order_final:
            # The last step goes to sigma 0, where the log signal-to-noise ratio is infinite: diffusers divides by 0.
            raise ValueError("lower_order_final must be true for unipc with solver_order above 1, got false")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SolverConfig:
        """Reads the dict of a diffusers `scheduler_config.json`.

        Raises ValueError, naming the field, when it asks for anything that we do not implement.
        """
        class_name = config.get("_class_name")
        if class_name not in _CLASS_NAMES:
            raise ValueError(f"_class_name must be one of {', '.join(_CLASS_NAMES)}, got {class_name!r}")
        solver = _CLASS_NAMES[class_name]
        is_euler = solver == "euler"  # always a flow, so its config need not say so; the other two default to not
        requirements = {
            **_MUST_EQUAL,
            "prediction_type": ("flow_prediction" if is_euler else "epsilon", "flow_prediction"),
            "use_flow_sigmas": (is_euler, True),
        }
        if solver == "unipc":
            requirements["solver_type"] = ("bh2", "bh2")
        for field, (assumed, required) in requirements.items():
            if config.get(field, assumed) != required:
                raise ValueError(f"scheduler field {field} must be {required!r}, got {config.get(field, assumed)!r}")
        for field, value in config.items():
            if field in _MUST_BE_OFF and value:
                raise ValueError(f"scheduler field {field} is not supported, got {value!r}")
            # A field of a newer diffusers is harmless as long as it is switched off.
            if field not in _KNOWN and not field.startswith("_") and value not in (None, False):
                raise ValueError(f"scheduler field {field} is unknown, got {value!r}")
        return cls(
            solver=solver,
            shift=float(config.get("shift" if is_euler else "flow_shift", 1.0)),
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
            solver_order=int(config.get("solver_order", 2)),
            solver_type=config.get("solver_type", "midpoint") if solver == "dpmpp" else "midpoint",
            lower_order_final=bool(config.get("lower_order_final", True)),
            euler_at_final=bool(config.get("euler_at_final", False)),
            disable_corrector=tuple(int(step) for step in config.get("disable_corrector") or ()),
        )


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
