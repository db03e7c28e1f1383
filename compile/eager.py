"""The coder itself, as torch runs it: always there, the judge of all others, and what serves until they are ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import versions_of
from .stream import Coder, Plan, Run, States


class Eager:
    name = "eager"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def missing(self, plan: Plan) -> str | None:
        return None

    def options(self, plan: Plan) -> Mapping[str, Any]:
        return {}

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch")

    def bound_to(self) -> str:
        return "nothing"

    def plans(self, plan: Plan) -> Sequence[Plan]:
        return [replace(plan, size=None, chunk=None)]

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        """Nothing: the weights in memory are the artifact."""

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            """It empties `states`."""
            with torch.inference_mode():
                return coder(x.to(next(coder.module.parameters()).dtype), states)

        return run
