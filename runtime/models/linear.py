"""A linear layer whose rows may be several of the checkpoint's projections, fused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels.linear import Activation, linear
from ...kernels.linear_quantized import linear_quantized


class Linear(nn.Module):
    """y = x W^T + b, where W stacks the checkpoint's projections named in `sources` (name -> number of rows).

    The names are relative to the parent module; the loader copies each into its rows, and LoRA or quantisation address
    the same rows, so no model file knows about either. The loader may make `weight` one of 8 bits, with a scale a row.
    """

    weight_scale: nn.Parameter | None

    def __init__(self, in_features: int, sources: Mapping[str, int]) -> None:
        super().__init__()
        self.sources = dict(sources)
        self.weight = nn.Parameter(torch.empty(sum(sources.values()), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sources.values())))
        self.register_parameter("weight_scale", None)

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        if self.weight_scale is None:
            return linear(x, self.weight, self.bias, activation)
        return linear_quantized(x, self.weight, self.weight_scale, self.bias, activation)
