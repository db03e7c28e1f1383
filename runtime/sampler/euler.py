"""The Euler solver: one straight step along the velocity."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .state import SolverState


class Euler:
    """First-order solver of the flow's ODE, d latents / d sigma = velocity; it remembers nothing but its step."""

    name = "euler"

    def start(self, schedule: NoiseSchedule, first_step: int = 0) -> SolverState:
        """The state before `first_step`; the caller has the latents, at noise level `schedule.sigmas[first_step]`."""
        return SolverState(schedule=schedule, first_step=first_step, step_index=first_step)

    def step(self, state: SolverState, velocity: Tensor, latents: Tensor) -> tuple[Tensor, SolverState]:
        """`latents + (next sigma - sigma) * velocity`, all float32 [C, T, H, W].

        Source: diffusers' FlowMatchEulerDiscreteScheduler.step.
        """
        sigmas, step_index = state.schedule.sigmas, state.step_index
        assert step_index < state.schedule.num_steps, "this trajectory has ended"
        next_latents = torch.add(latents, velocity, alpha=sigmas[step_index + 1] - sigmas[step_index])
        return next_latents, replace(state, step_index=step_index + 1)
