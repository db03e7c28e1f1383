"""How a linear layer's weight can be kept, and how it is multiplied then: a format is one entry of FORMATS.

The layer, the loader, `--quantize` and the predicted sizes ask the entry; none of them knows a format by its name.
Nothing here imports torch when it is imported: settings and the command line list the names before it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .linear import Activation

Spec = tuple[tuple[int, ...], str | None]  # a tensor's shape, and torch's name of its dtype; None: the model's own


@dataclass(frozen=True)
class Functions:
    """What a format does."""

    quantize: Callable[[Tensor], Mapping[str, Tensor]]  # fp32 rows [n, in] -> the same rows of each tensor
    run: Callable[..., Tensor]  # (x [..., in], bias or None, activation, **tensors) -> [..., out] in x's dtype


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights [out, in].

    The first dimension of every tensor stands for the rows: one each, or several each, such as 128. So projections that
    one layer fuses are filled apart from each other, and a weight a part at a time.
    """

    name: str
    tensors: Callable[[int, int], Mapping[str, Spec]]  # (out, in) -> the layer's parameters that stand for its weight
    load: Callable[[], Functions]  # imports them; called once a layer
    multiple_of: int = 1  # of both sides
    needs: int = 0  # compute capability on CUDA: 89 for sm_89

    def num_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """What a weight [out, in] takes in a model of this dtype."""
        specs = self.tensors(num_outputs, num_inputs).values()
        return sum(math.prod(shape) * torch_dtype(name, dtype).itemsize for shape, name in specs)


def torch_dtype(name: str | None, own: torch.dtype) -> torch.dtype:
    """The dtype that a `Spec` names, in a model whose own is `own`."""
    import torch

    found: torch.dtype = own if name is None else getattr(torch, name)
    return found


# --- the model's own dtype --------------------------------------------------------------------------------------------


def _plain_tensors(num_outputs: int, num_inputs: int) -> dict[str, Spec]:
    return {"weight": ((num_outputs, num_inputs), None)}


def _plain() -> Functions:
    from .linear import linear

    def run(x: Tensor, bias: Tensor | None, activation: Activation, *, weight: Tensor) -> Tensor:
        return linear(x, weight, bias, activation)

    return Functions(quantize=lambda rows: {"weight": rows}, run=run)


# --- 8 bits, a scale for each row -------------------------------------------------------------------------------------


def _tensors_of_8_bits(dtype: str, num_outputs: int, num_inputs: int) -> dict[str, Spec]:
    return {"weight": ((num_outputs, num_inputs), dtype), "weight_scale": ((num_outputs,), "float32")}


def _of_8_bits(dtype: str) -> Functions:
    import torch

    from .linear_quantized import linear_quantized, quantize_rows

    def quantize(rows: Tensor) -> dict[str, Tensor]:
        values, scales = quantize_rows(rows, getattr(torch, dtype))
        return {"weight": values, "weight_scale": scales}

    def run(x: Tensor, bias: Tensor | None, activation: Activation, *, weight: Tensor, weight_scale: Tensor) -> Tensor:
        return linear_quantized(x, weight, weight_scale, bias, activation)

    return Functions(quantize, run)


def _in_8_bits(name: str, dtype: str, needs: int) -> WeightFormat:
    return WeightFormat(name, partial(_tensors_of_8_bits, dtype), partial(_of_8_bits, dtype), 16, needs)


PLAIN = WeightFormat("plain", _plain_tensors, _plain)
FORMATS = {
    one.name: one
    for one in (
        PLAIN,
        _in_8_bits("fp8", "float8_e4m3fn", needs=89),  # the first whose matrix instructions read it
        _in_8_bits("int8", "int8", needs=80),
    )
}


def words() -> tuple[str, ...]:
    """What `--quantize` takes: "none", which is the plain format, and the others by their names."""
    return "none", *(name for name in FORMATS if name != PLAIN.name)
