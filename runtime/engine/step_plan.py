"""What each step of a request is, known before the first one: noise level, timestep, expert and guidance."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import VideoRequest
from ..models.model import Model
from ..sampler.guidance import guidance_is_on


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step."""

    sigma: float
    timestep: float
    expert: int
    guidance_scale: float | None  # None: the prompt's branch alone

    @property
    def num_branches(self) -> int:
        return 1 if self.guidance_scale is None else 2


def plan_steps(
    model: Model, request: VideoRequest, sigmas: tuple[float, ...], timesteps: tuple[float, ...]
) -> tuple[StepPlan, ...]:
    """Expert and guidance of every step; diffusers' rule: without guidance on the first expert there is none at all."""
    assert request.guidance_scale is not None
    low, high = request.guidance_interval or (0.0, 1.0)
    plans = []
    for sigma, timestep in zip(sigmas, timesteps, strict=False):
        expert = model.expert_at(timestep)
        scale = request.guidance_scale
        if expert == 1 and request.guidance_scale_2 is not None:
            scale = request.guidance_scale_2
        is_guided = guidance_is_on(request.guidance_scale) and scale != 1 and low <= sigma <= high
        plans.append(StepPlan(sigma, timestep, expert, scale if is_guided else None))
    return tuple(plans)
