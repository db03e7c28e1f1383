"""A backend whose artifact is a number that is added to what eager makes: what it does wrong can be told to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skylapse.compile.stream import Coder, Plan, Run, States

CPU = torch.device("cpu")


@dataclass
class Fake:
    """A backend whose artifact is a number that is added to what eager makes."""

    name: str = "fake"
    adds: float = 0.0
    absent: str | None = None
    fails_at: int | None = None  # the call of a loaded artifact that raises
    device: torch.device = CPU
    of: Mapping[str, str] = field(default_factory=dict)
    built: list[Plan] = field(default_factory=list)
    build_error: Exception | None = None
    calls: int = 0
    max_any_pixels: int | None = None
    workspace_bytes: int = 0

    def missing(self, plan: Plan) -> str | None:
        return self.absent

    def options(self, plan: Plan) -> Mapping[str, Any]:
        return {}

    def versions(self) -> Mapping[str, str]:
        return self.of

    def bound_to(self) -> str:
        return "nothing"

    def plans(self, plan: Plan) -> Sequence[Plan]:
        return [plan]

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        if self.build_error is not None:
            raise self.build_error
        self.built.append(plan)
        (folder / "plan.bin").write_text(str(self.adds))

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        adds = float((folder / "plan.bin").read_text())

        def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("device-side assert")
            y, new = coder(x, states)
            return y + adds, new

        return run
