"""A linear layer whose rows may be several of the checkpoint's projections, fused, and whose weight has a format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...kernels.linear import Activation
from ...kernels.weight_formats import PLAIN, WeightFormat, torch_dtype


class Linear(nn.Module):
    """y = x W^T + b, where W stacks the checkpoint's projections named in `sources` (name -> number of rows).

    The names are relative to the parent module; the loader copies each into its rows, and LoRA or quantisation address
    the same rows, so no model file knows about either. `keep_in` makes of `weight` the parameters of another format.
    """

    def __init__(self, in_features: int, sources: Mapping[str, int], kernel: tuple[int, ...] = ()) -> None:
        """kernel: [C, p, q, r] of the convolution without overlap that the checkpoint has it as, if it has."""
        super().__init__()
        self.kernel = kernel
        self.sources = dict(sources)
        self.in_features, self.out_features = in_features, sum(sources.values())
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))
        self.bias = nn.Parameter(torch.empty(self.out_features))
        self._use(PLAIN)

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        return self._functions.run(x, self.bias, activation, **{name: getattr(self, name) for name in self._names})

    def refusal(self, form: WeightFormat) -> str | None:
        """Return why the weight cannot be kept in a format, or None."""
        for num_rows in self.sources.values():
            if num_rows % form.multiple_of or self.in_features % form.multiple_of:
                return f"its sides must be multiples of {form.multiple_of}, got {[num_rows, self.in_features]}"
        return None

    def keep_in(self, form: WeightFormat, device: torch.device) -> None:
        """Replace the weight by the tensors of a format, without numbers yet: `fill` makes them, rows by rows.

        Raises ValueError where the format does not take the weight's sides.
        """
        if refusal := self.refusal(form):
            raise ValueError(refusal)
        dtype = self.weight.dtype
        for name in self._names:
            delattr(self, name)
        self._use(form)
        for name, (shape, named) in form.tensors(self.out_features, self.in_features).items():
            tensor = torch.empty(shape, device=device, dtype=torch_dtype(named, dtype))
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def fill(self, first: int, rows: Tensor) -> None:
        """Quantise rows [n, in] in fp32 into their place, from row `first` on."""
        for name, part in self._functions.quantize(rows).items():
            whole = getattr(self, name).data
            start = first * len(whole) // self.out_features
            whole[start : start + len(part)].copy_(part)

    def _use(self, form: WeightFormat) -> None:
        self.format, self._functions = form, form.load()
        self._names = tuple(form.tensors(self.out_features, self.in_features))
