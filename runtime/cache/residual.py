"""Masked reuse of the trunk's residual: what TeaCache and MagCache share once their mask is known.

Both decide by quantities that no prompt changes on Wan (the timestep embedding; a calibrated table), so their masks
are computed at admission, and the number of model evaluations is known from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .policy import Needs, Site, State

if TYPE_CHECKING:
    from torch import Tensor

Residuals = tuple["Tensor", ...]  # [n, dim] a branch: what all blocks added at the last computed step


class ResidualReuse:
    """A skipped step adds what the blocks added at the last computed one."""

    site: ClassVar[Site] = "trunk"
    needs: ClassVar[Needs] = "nothing"

    def predict(self, state: Residuals, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tokens + residual for tokens, residual in zip(base, state, strict=True))

    def commit(
        self, state: State, sigma: float, base: Sequence[Tensor], output: Sequence[Tensor], probes: Sequence[Tensor]
    ) -> Residuals:
        return tuple(out - tokens for out, tokens in zip(output, base, strict=True))

    def state_tensors(self, state: Residuals) -> list[Tensor]:
        return list(state)

    @property
    def footprint(self) -> tuple[int, int]:
        return 0, 1
