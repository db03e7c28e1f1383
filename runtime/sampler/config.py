"""A checkpoint's solver and noise schedule, as its scheduler_config.json has them; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.json_file import shown, typed_value

FILE = "scheduler/scheduler_config.json"
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
    """A checkpoint's solver settings, in diffusers' words; `shift` is `flow_shift` of UniPC and DPM-Solver++.

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
        if not 2 <= self.num_train_timesteps <= 100_000:
            raise ValueError(f"num_train_timesteps must be from 2 to 100000, got {self.num_train_timesteps}")
        if self.solver_order not in (1, 2, 3):
            raise ValueError(f"solver_order must be 1, 2 or 3, got {self.solver_order}")
        if self.solver_type not in ("midpoint", "heun"):
            raise ValueError(f"solver_type must be midpoint or heun, got {self.solver_type!r}")
        if self.solver == "unipc" and self.solver_order > 1 and not self.lower_order_final:
            # The last step goes to sigma 0, where the log signal-to-noise ratio is infinite: diffusers divides by 0.
            raise ValueError("lower_order_final must be true for unipc with solver_order above 1, got false")

    @classmethod
    def from_diffusers(cls, fields: Mapping[str, Any]) -> SolverConfig:
        """Read the object of a diffusers `scheduler_config.json`; null means the default, as does a missing field.

        Raises ValueError, naming the file and the field, for a value that is no such field's, and when it asks for
        anything that we do not implement.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return cls._of(given)
        except ValueError as error:
            raise ValueError(f"{FILE}: {error}") from None

    @classmethod
    def _of(cls, given: Mapping[str, Any]) -> SolverConfig:
        class_name = given.get("_class_name")
        if not isinstance(class_name, str) or class_name not in _CLASS_NAMES:
            raise ValueError(f"_class_name must be {' or '.join(_CLASS_NAMES)}, got {shown(class_name)}")
        solver = _CLASS_NAMES[class_name]
        is_euler = solver == "euler"  # always a flow, so its config need not say so; the other two default to not
        requirements = {
            **_MUST_EQUAL,
            "prediction_type": ("flow_prediction" if is_euler else "epsilon", "flow_prediction"),
            "use_flow_sigmas": (is_euler, True),
        }
        if solver == "unipc":
            requirements["solver_type"] = ("bh2", "bh2")
        for name, (assumed, required) in requirements.items():
            if (value := given.get(name, assumed)) != required:
                raise ValueError(f"{name} must be {shown(required)}, got {shown(value)}")
        for name, value in given.items():
            if name in _MUST_BE_OFF and value:
                raise ValueError(f"{name} is not supported, got {shown(value)}")
            # A field of a newer diffusers is harmless as long as it is switched off.
            if name not in _KNOWN and not name.startswith("_") and value is not False:
                raise ValueError(f"{name} is unknown, got {shown(value)}")
        read = {
            "shift": ("shift" if is_euler else "flow_shift", float),
            "num_train_timesteps": ("num_train_timesteps", int),
            "solver_order": ("solver_order", int),
            "lower_order_final": ("lower_order_final", bool),
            "euler_at_final": ("euler_at_final", bool),
            "disable_corrector": ("disable_corrector", Sequence[int]),
            **({"solver_type": ("solver_type", str)} if solver == "dpmpp" else {}),
        }
        found = {ours: typed_value(name, given[name], hint) for ours, (name, hint) in read.items() if name in given}
        if not found.get("shift", 1.0) > 0:  # told here, where it has the file's name
            raise ValueError(f"{read['shift'][0]} must be above 0, got {shown(found['shift'])}")
        return cls(solver=solver, **found)
