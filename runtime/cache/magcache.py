"""MagCache: skip while the residual's magnitude, by a calibrated table, has changed too little.

Source: MagCache (arXiv 2506.09045). The table holds g_i, the mean over tokens of |r_i| / |r_{i-1}| of the trunk's
residual. A run of n skipped steps has error sum|1 - prod g| over its steps; a step is skipped while that stays below
the threshold and n is at most max_skips. The table is one calibration run's, so the mask is known at admission.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .policy import MAX_SKIPS, Checked, Run, warmup_steps
from .residual import ResidualReuse


@dataclass(frozen=True)
class MagCache(ResidualReuse, Checked):
    """threshold: error that a run of skipped steps may reach. warmup: steps (or share) always computed."""

    threshold: float = 0.12
    max_skips: int = MAX_SKIPS
    warmup: int | float = 0.2

    name: ClassVar[str] = "magcache"

    def plan(self, run: Run) -> tuple[bool, ...]:
        if run.calibration is None or not run.calibration.magnitudes:
            raise ValueError(f"cache policy magcache needs {run.missing}")
        warmup = warmup_steps(self.warmup, run.num_steps)
        mask = []
        product, error, skips = 1.0, 0.0, 0
        for step, magnitude in enumerate(run.calibration.magnitudes):
            product, skips = product * magnitude, skips + 1
            error += abs(1 - product)
            small = error < self.threshold and skips <= self.max_skips
            compute = step < warmup or step in run.restarts or not small
            if compute:
                product, error, skips = 1.0, 0.0, 0
            mask.append(compute)
        return tuple(mask)
