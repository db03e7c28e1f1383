"""First-block cache: run the first blocks, and leave the others out while the first ones' contribution stays the same.

Source: FBCache (ParaAttention) and DBCache (cache-dit). The probe is what the first `depth` blocks add to the tokens;
its relative L1 distance from the last computed step's probe decides, the greater one of the guidance branches. What
the other blocks add is reused, or (order 1) extrapolated linearly in sigma from the last two computed steps; published
code counts steps instead, which is the same on uniform schedules alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import MAX_SKIPS, Checked, Needs, Point, Run, Site, extrapolate, relative_l1

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FirstBlockState:
    probes: tuple[Tensor, ...]  # [n, dim] a branch
    residuals: tuple[Point, ...]  # what the other blocks added, [n, dim] a branch, newest first


@dataclass(frozen=True)
class FirstBlockCache(Checked):
    """threshold: relative L1 distance of probes below which a step is skipped. order: 0 reuse, 1 forecast."""

    threshold: float = 0.08
    depth: int = 1
    order: int = 0
    max_skips: int = MAX_SKIPS
    warmup: int | float = 0.1

    name: ClassVar[str] = "first_block"
    site: ClassVar[Site] = "trunk"
    needs: ClassVar[Needs] = "probe"
    ranges = Checked.ranges | {"depth": (1, 100), "order": (0, 1)}

    def plan(self, run: Run) -> None:
        if self.depth >= run.num_blocks:
            raise ValueError(
                "depth of cache policy first_block must be below "
                f"this model's {run.num_blocks} blocks, got {self.depth}"
            )

    def is_ready(self, state: FirstBlockState) -> bool:
        return True

    def indicator(self, state: FirstBlockState, now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
        distances = [relative_l1(a, b) for a, b in zip(now, state.probes, strict=True)]
        greatest = distances[0]
        for distance in distances[1:]:
            greatest = greatest.maximum(distance)
        return greatest

    def decide(self, accumulated: float, value: float) -> tuple[bool, float]:
        return not value < self.threshold, 0.0

    def predict(self, state: FirstBlockState, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        added = extrapolate(state.residuals, sigma, self.order)
        return tuple(tokens + residual for tokens, residual in zip(base, added, strict=True))

    def commit(
        self,
        state: FirstBlockState | None,
        sigma: float,
        base: Sequence[Tensor],
        output: Sequence[Tensor],
        probes: Sequence[Tensor],
    ) -> FirstBlockState:
        earlier = state.residuals if state is not None else ()
        point = Point(sigma, tuple(out - tokens for out, tokens in zip(output, base, strict=True)))
        return FirstBlockState(tuple(probes), (point, *earlier)[: self.order + 1])

    def state_tensors(self, state: FirstBlockState) -> list[Tensor]:
        return [*state.probes, *(value for point in state.residuals for value in point.values)]

    @property
    def footprint(self) -> tuple[int, int]:
        return 0, self.order + 2
