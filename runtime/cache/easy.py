"""EasyCache: skip while the latents have moved too little to change the velocity; the adaptive default.

Source: EasyCache (arXiv 2507.02860). At a computed step i the transformation rate is
k = mean|v_i - v_j| / mean|x_i - x_j| over the last two computed steps; each later step adds
k mean|x_t - x_{t-1}| / mean|v_i| to an error that starts at 0, and the step whose error reaches the threshold is
computed. A skipped step has v = x + (v_i - x_i).

Where we differ: the rule sees the guided velocity, which is what moves x, instead of the conditional branch's, so a
request holds one difference instead of one a branch (the prediction is linear, hence the same); and there is a bound
on skips in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import MAX_SKIPS, Checked, Needs, Run, Site

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EasyState:
    latents: Tensor  # [C, T, H, W] of the last computed step
    velocity: Tensor  # [C, T, H, W]
    rate: Tensor | None  # scalar, k / mean|v|; None after a single computed step


@dataclass(frozen=True)
class EasyCache(Checked):
    """threshold: the error that a run of skipped steps may reach. warmup: steps (or share of them) always computed."""

    threshold: float = 0.05
    max_skips: int = MAX_SKIPS
    warmup: int | float = 0.2

    name: ClassVar[str] = "easy"
    site: ClassVar[Site] = "velocity"
    needs: ClassVar[Needs] = "latents"

    def plan(self, run: Run) -> None:
        return None

    def is_ready(self, state: EasyState) -> bool:
        return state.rate is not None

    def indicator(self, state: EasyState, now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        assert state.rate is not None
        return state.rate * (now[0] - before[0]).abs().mean()

    def decide(self, accumulated: float, value: float) -> tuple[bool, float]:
        total = accumulated + value
        return (True, 0.0) if not total < self.threshold else (False, total)

    def predict(self, state: EasyState, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (base[0] + (state.velocity - state.latents),)

    def commit(
        self,
        state: EasyState | None,
        sigma: float,
        base: Sequence[Tensor],
        output: Sequence[Tensor],
        probes: Sequence[Tensor],
    ) -> EasyState:
        latents, velocity, rate = base[0], output[0], None
        if state is not None:
            change = (velocity - state.velocity).abs().mean() / (latents - state.latents).abs().mean()
            rate = change / velocity.abs().mean()
        return EasyState(latents, velocity, rate)

    def state_tensors(self, state: EasyState) -> list[Tensor]:
        return [state.latents, state.velocity]

    @property
    def footprint(self) -> tuple[int, int]:
        return 3, 0  # and the latents of the step before
