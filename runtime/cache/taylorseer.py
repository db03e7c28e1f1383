"""TaylorSeer: compute every interval-th step and extrapolate the velocity between them.

Source: TaylorSeer (arXiv 2503.06923), on the whole model's output instead of every layer's (a state of order + 1
latents instead of gigabytes), as a polynomial in sigma instead of the step's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import Checked, Needs, Point, Run, Site, extrapolate, warmup_steps

if TYPE_CHECKING:
    from torch import Tensor

Points = tuple[Point, ...]  # guided velocities [C, T, H, W] of the newest computed steps, newest first


class VelocityForecast:
    """A skipped step takes the polynomial in sigma through the last computed velocities."""

    order: int
    site: ClassVar[Site] = "velocity"
    needs: ClassVar[Needs] = "nothing"

    def predict(self, state: Points, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return extrapolate(state, sigma, self.order)

    def commit(
        self,
        state: Points | None,
        sigma: float,
        base: Sequence[Tensor],
        output: Sequence[Tensor],
        probes: Sequence[Tensor],
    ) -> Points:
        return (Point(sigma, tuple(output)), *(state or ()))[: self.order + 1]

    def state_tensors(self, state: Points) -> list[Tensor]:
        return [value for point in state for value in point.values]

    @property
    def footprint(self) -> tuple[int, int]:
        return self.order + 1, 0


@dataclass(frozen=True)
class TaylorSeer(VelocityForecast, Checked):
    """interval: every so many steps one is computed. order: of the polynomial. warmup: steps always computed."""

    interval: int = 3
    order: int = 1
    warmup: int | float = 3

    name: ClassVar[str] = "taylorseer"

    def plan(self, run: Run) -> tuple[bool, ...]:
        warmup = max(1, warmup_steps(self.warmup, run.num_steps))
        since, mask = 0, []
        for step in range(run.num_steps):
            since += 1
            compute = step < warmup or step in run.restarts or since >= self.interval or step == run.last
            since = 0 if compute else since
            mask.append(compute)
        return tuple(mask)
