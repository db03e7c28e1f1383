"""Budget: a mask with a given number of computed steps, so what a request costs is known when it is admitted.

The first `warmup` steps are computed, the others evenly from there to the last, and of fewer than 9 all of them evenly;
skipped steps extrapolate the velocity linearly in sigma. Where the checkpoint has been calibrated for the request's
solver, steps, shift and guidance, the warm-up is the one whose clips came nearest to the uncached ones; it matters by
up to 12 dB on the demo model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from .policy import Checked, Run
from .taylorseer import VelocityForecast

WARMUP = 3
FEW = 9  # below it a warm-up leaves nothing for the last steps, which matter most: see `even_mask`


@dataclass(frozen=True)
class Budget(VelocityForecast, Checked):
    """share: of the steps that are computed, rounded up. order: of the polynomial that stands in for the others.

    warmup: steps that are computed before the first is skipped; 0: as calibrated, or 3.
    """

    share: float = 0.5
    order: int = 1
    warmup: int = 0

    name: ClassVar[str] = "budget"

    def plan(self, run: Run) -> tuple[bool, ...]:
        num_computed = budgeted_steps(self.share, run.num_steps)
        mask = None
        if not self.warmup and run.calibration and run.calibration.guidance_scale == run.guidance_scale:
            mask = run.calibration.mask(num_computed, self.order)
        if mask is None and not self.warmup and run.num_steps < FEW:
            mask = even_mask(run.num_steps, num_computed)
        elif mask is None:
            mask = warm_mask(run.num_steps, num_computed, self.warmup or WARMUP)
        return tuple(compute or step in run.restarts for step, compute in enumerate(mask))


def budgeted_steps(share: float, num_steps: int) -> int:
    """How many of the steps are computed."""
    return max(1, ceil(share * num_steps - 1e-9))


def warm_mask(num_steps: int, num_computed: int, warmup: int) -> tuple[bool, ...]:
    """The first `warmup` steps, and the rest of `num_computed` spread evenly up to the last step."""
    warmup = min(warmup, num_computed)
    left, rest = num_computed - warmup, num_steps - warmup
    chosen = {warmup - 1 + round((k + 1) * rest / left) for k in range(left)}
    return tuple(step < warmup or step in chosen for step in range(num_steps))


def even_mask(num_steps: int, num_computed: int) -> tuple[bool, ...]:
    """`num_computed` steps evenly from the first to the last, rounded towards the last.

    Half of 6 steps of the demo model: 100101 ends 0.8 times the latents' norm from the uncached ones, 101001 1.8,
    and 111000, a warm-up of 3, 3.6.
    """
    gaps = max(1, num_computed - 1)
    chosen = {-(-k * (num_steps - 1) // gaps) for k in range(num_computed)}
    return tuple(step in chosen for step in range(num_steps))
