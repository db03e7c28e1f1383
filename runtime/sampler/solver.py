"""What every solver offers, which ones there are, and how their states become checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Protocol

from torch import Tensor

from .dpmpp import DPMSolverPlusPlus
from .euler import Euler
from .schedule import SOLVERS, NoiseSchedule, SolverConfig, make_schedule
from .state import SolverState
from .unipc import UniPC


class Solver(Protocol):
    """A solver holds no state of its own: one object serves every request.

    `step` never writes into its arguments, but its state may keep `latents`: nobody may write into them afterwards.
    """

    name: str

    def start(self, schedule: NoiseSchedule, first_step: int = 0) -> SolverState:
        """The state before `first_step`; a trajectory from a noised source starts above 0 and warms up there."""
        ...

    def step(self, state: SolverState, velocity: Tensor, latents: Tensor) -> tuple[Tensor, SolverState]:
        """The next latents and state.

        velocity: float32 [C, T, H, W], the flow prediction at `latents`, after guidance.
        latents: float32 [C, T, H, W] at noise level `state.schedule.sigmas[state.step_index]`.
        """
        ...


_SOLVERS: dict[str, Solver] = {"unipc": UniPC(), "euler": Euler(), "dpmpp": DPMSolverPlusPlus()}


def get_solver(name: str) -> Solver:
    """The solver of that name; `schedule.config.solver` names the one that a schedule is made for."""
    if name not in _SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}")
    return _SOLVERS[name]


def state_record(state: SolverState) -> dict[str, Any]:
    """The state without its tensors (`state_tensors` has them), ready for JSON."""
    return {
        "config": asdict(state.schedule.config),
        "num_inference_steps": state.schedule.num_steps,
        "first_step": state.first_step,
        "step_index": state.step_index,
    }


def restore_state(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SolverState:
    """The state that `state_record` and `state_tensors` were taken from; its next step is bit-equal.

    tensors: on the device of the latents; names that are not a solver's are left alone.
    """
    config = dict(record["config"])
    config["disable_corrector"] = tuple(config["disable_corrector"])  # JSON knows lists only
    schedule = make_schedule(SolverConfig(**config), record["num_inference_steps"])
    num_clean = sum(name.startswith("clean_prediction_") for name in tensors)
    return replace(
        get_solver(schedule.config.solver).start(schedule, record["first_step"]),
        step_index=record["step_index"],
        clean_predictions=tuple(tensors[f"clean_prediction_{age}"] for age in range(num_clean)),
        last_sample=tensors.get("last_sample"),
    )
