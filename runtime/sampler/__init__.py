"""Noise schedules and solvers: pure functions of tensors, with one explicit state a request."""

from .guidance import combine, guidance_is_on
from .schedule import SOLVERS, NoiseSchedule, SolverConfig, first_step_of, make_schedule
from .solver import Solver, get_solver, restore_state, state_record
from .state import SolverState, add_noise, predict_clean, state_bytes, state_tensors

__all__ = [
    "SOLVERS",
    "NoiseSchedule",
    "Solver",
    "SolverConfig",
    "SolverState",
    "add_noise",
    "combine",
    "first_step_of",
    "get_solver",
    "guidance_is_on",
    "make_schedule",
    "predict_clean",
    "restore_state",
    "state_bytes",
    "state_record",
    "state_tensors",
]
