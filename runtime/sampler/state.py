"""The state of one request's solver, and the step that every multistep solver shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import NoiseSchedule


@dataclass(frozen=True, slots=True)
class StepWeights:
    """One step as two weighted sums, computed on the host in float64 before the first step.

    Every update of UniPC and DPM-Solver++ is linear in the tensors it reads, so a step is its weights:

    sigma: the noise level that the step starts from.
    predictor: weights of (sample, clean prediction of this step, of the step before, ...), which sum to the next
        latents.
    corrector: weights of (sample before the last predictor, clean prediction of this step, of the step before, ...),
        which sum to the sample that the predictor starts from; empty: it starts from the latents as they are.
    """

    sigma: float
    predictor: tuple[float, ...]
    corrector: tuple[float, ...] = ()

    @property
    def num_earlier(self) -> int:
        """How many clean predictions of earlier steps this step reads."""
        return max(len(self.predictor), len(self.corrector)) - 2


@dataclass(frozen=True, slots=True, eq=False)
class SolverState:
    """Everything a solver remembers of one request between two steps; a step returns a new one and keeps the old.

    schedule: the trajectory's noise levels.
    first_step: where the trajectory starts; above 0 when it starts from a noised source (`strength`).
    step_index: the step that comes next; `schedule.num_steps` when the trajectory has ended.
    plan: one StepWeights for each step from first_step on; empty for Euler, which needs none.
    clean_predictions: float32 [C, T, H, W] each, the newest first, and only as many as the next step reads.
    last_sample: float32 [C, T, H, W], what UniPC's last predictor started from, if the next step corrects it.
    """

    schedule: NoiseSchedule
    first_step: int
    step_index: int
    plan: tuple[StepWeights, ...] = ()
    clean_predictions: tuple[Tensor, ...] = ()
    last_sample: Tensor | None = None


def state_tensors(state: SolverState) -> dict[str, Tensor]:
    """The state's tensors by name, as a checkpoint keeps them: clean_prediction_0 is the newest."""
    tensors = {f"clean_prediction_{age}": tensor for age, tensor in enumerate(state.clean_predictions)}
    if state.last_sample is not None:
        tensors["last_sample"] = state.last_sample
    return tensors


def state_bytes(state: SolverState) -> int:
    """Bytes of the tensors that the state holds."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(state).values())


def predict_clean(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latents that a flow prediction implies: `latents - sigma * velocity`, all [C, T, H, W].

    With latents = (1 - sigma) * clean + sigma * noise, the velocity is noise - clean (Lipman et al., arXiv 2210.02747).
    """
    return torch.add(latents, velocity, alpha=-sigma)


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Clean latents brought to a noise level: `(1 - sigma) * clean + sigma * noise`, all [C, T, H, W]."""
    return (1 - sigma) * clean + sigma * noise


def half_log_snr(sigma: float) -> float:
    """Half the log signal-to-noise ratio, lambda = log((1 - sigma) / sigma); infinite at sigma 0."""
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf


def multistep(state: SolverState, velocity: Tensor, latents: Tensor) -> tuple[Tensor, SolverState]:
    """One step of UniPC or DPM-Solver++: correct the latents if the plan says so, then predict the next ones.

    Each tensor read costs one fused multiply-add: 8 small kernels at UniPC's usual order of 2, 6 at order 1.
    """
    assert state.step_index < state.schedule.num_steps, "this trajectory has ended"
    position = state.step_index - state.first_step
    weights = state.plan[position]
    clean_predictions = (predict_clean(latents, velocity, weights.sigma), *state.clean_predictions)
    sample = latents
    if weights.corrector:
        assert state.last_sample is not None
        sample = _weighted_sum(weights.corrector, (state.last_sample, *clean_predictions))
    return _weighted_sum(weights.predictor, (sample, *clean_predictions)), after_step(state, clean_predictions, sample)


def after_step(state: SolverState, clean_predictions: tuple[Tensor, ...], sample: Tensor) -> SolverState:
    """What to remember of a step: its clean prediction, those before it, the sample that its predictor began with."""
    position = state.step_index - state.first_step
    following = state.plan[position + 1] if position + 1 < len(state.plan) else None
    return replace(
        state,
        step_index=state.step_index + 1,
        clean_predictions=clean_predictions[: following.num_earlier] if following else (),
        last_sample=sample if following and following.corrector else None,
    )


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    assert 0 < len(weights) <= len(tensors), "the state remembers less than this step reads"
    total = tensors[0] * weights[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=False):
        total.add_(tensor, alpha=weight)
    return total
