"""TeaCache: skip while the timestep embedding, rescaled by a fitted polynomial, has moved too little.

Source: TeaCache (arXiv 2411.19108). The indicator of step i is p(relative L1 distance of the timestep embeddings of
steps i and i - 1); it accumulates until it reaches the threshold, and that step is computed. On Wan the published rule
sees no latents and no text, so the mask is the same for every prompt and computed at admission. The polynomial comes
from a calibration, else from skylapse.json ("teacache"), else from the authors for the two models that they published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .policy import Checked, Run, warmup_steps
from .residual import ResidualReuse

# (layers, width) of Wan2.1's text-to-video models -> the authors' polynomial for the timestep embedding
# (github.com/ali-vilab/TeaCache, TeaCache4Wan2.1, without `use_ret_steps`).
PUBLISHED = {
    (30, 1536): (2.39676752e3, -1.31110545e3, 2.01331979e2, -8.29855975, 1.37887774e-1),
    (40, 5120): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
}


@dataclass(frozen=True)
class TeaCache(ResidualReuse, Checked):
    """threshold: accumulated, rescaled distance at which a step is computed. warmup: steps always computed."""

    threshold: float = 0.1
    warmup: int | float = 1

    name: ClassVar[str] = "teacache"

    def plan(self, run: Run) -> tuple[bool, ...]:
        coefficients = (run.calibration.coefficients if run.calibration else ()) or run.coefficients
        if not coefficients:
            raise ValueError(f"cache policy teacache needs {run.missing}")
        warmup = warmup_steps(self.warmup, run.num_steps)
        mask, error = [], 0.0
        for step, distance in enumerate(run.embedding_distances):
            error += max(0.0, _polynomial(coefficients, distance)) if step else 0.0
            compute = step < warmup or step == run.last or step in run.restarts or not error < self.threshold
            error = 0.0 if compute else error
            mask.append(compute)
        return tuple(mask)


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Highest power first, as numpy's polyfit gives them."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
