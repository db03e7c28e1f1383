"""A request's whole step in one launch, guidance and preview included, where the kernel serves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...kernels.solver_step import SolverStep, solver_step
from ...kernels.toolchain import launches
from .state import SolverState, StepWeights, after_step


def fuses(latents: Tensor) -> bool:
    """Whether the kernel serves these: on CUDA, with Triton. Elsewhere the same lines of torch are shorter apart."""
    return launches(latents)


def fused_step(
    state: SolverState,
    velocities: Sequence[Tensor],
    guidance_scale: float,
    latents: Tensor,
    preview: tuple[Tensor, Tensor] | None = None,
) -> tuple[SolverStep, SolverState]:
    """`combine`, then any solver's `step`; all [C, T, H, W], the velocities in the model's dtype.

    velocities: the prompt's and the unconditional one, or one alone, for which guidance_scale counts for nothing.
    preview: weight and bias of the map to pixels, or None.
    """
    weights = _weights(state)
    cond, uncond = (*velocities, None)[:2]
    assert cond is not None
    step = solver_step(
        latents,
        cond,
        uncond,
        guidance_scale,
        weights.sigma,
        weights.predictor,
        weights.corrector,
        state.last_sample,
        state.clean_predictions,
        preview,
    )
    return step, after_step(state, (step.clean, *state.clean_predictions), step.sample)


def _weights(state: SolverState) -> StepWeights:
    """Of the step that comes next; Euler's is latents + (next - sigma) (latents - clean) / sigma, and has no plan."""
    if state.plan:
        return state.plan[state.step_index - state.first_step]
    sigma, following = state.schedule.sigmas[state.step_index : state.step_index + 2]
    return StepWeights(sigma, (following / sigma, 1 - following / sigma))
