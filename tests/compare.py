"""Compare numbers: one tolerance a dtype, one distance."""

from __future__ import annotations

import torch
from torch import Tensor

# Greatest relative L2 distance from the reference, by the dtype that is computed in.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, in float64."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
