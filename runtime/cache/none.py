"""No caching: every step is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .policy import Needs, Run, Site, State

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NoCache:
    name: ClassVar[str] = "none"
    site: ClassVar[Site] = "velocity"
    needs: ClassVar[Needs] = "nothing"

    def plan(self, run: Run) -> tuple[bool, ...]:
        return (True,) * run.num_steps

    def predict(self, state: State, sigma: float, base: Sequence[Tensor]) -> tuple[Tensor, ...]:
        raise AssertionError("nothing is ever skipped")

    def commit(
        self, state: State, sigma: float, base: Sequence[Tensor], output: Sequence[Tensor], probes: Sequence[Tensor]
    ) -> State:
        return ()

    def state_tensors(self, state: State) -> list[Tensor]:
        return []

    @property
    def footprint(self) -> tuple[int, int]:
        return 0, 0
