"""Inductor: the coder compiled ahead of time into a library, for which a C++ compiler is needed once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import machine_name, versions_of
from .stream import DTYPES, FIRST, NEXT, Coder, Plan, Run, States, owned


class Inductor:
    name = "inductor"
    max_any_pixels: int | None = None
    workspace_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def missing(self, plan: Plan) -> str | None:
        if self.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "inductor needs a C++ compiler: install g++"
        return None

    def options(self, plan: Plan) -> Mapping[str, Any]:
        return {}

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch", "triton")

    def bound_to(self) -> str:
        return machine_name(self.device)

    def plans(self, plan: Plan) -> Sequence[Plan]:
        return [plan]

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        from .export import exported, quiet

        for graph in (FIRST, NEXT):
            with torch.no_grad(), quiet():
                program = exported(coder, plan, graph, self.device)
                aoti_compile_and_package(program, package_path=str(folder / f"{graph}.pt2"))

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        from torch._inductor import aoti_load_package

        from .export import quiet

        with quiet():
            graphs: dict[str, Any] = {g: aoti_load_package(str(folder / f"{g}.pt2")) for g in (FIRST, NEXT)}
        dtype = DTYPES[plan.dtype]

        def run(x: Tensor, states: States | None) -> tuple[Tensor, States]:
            graph = graphs[FIRST if states is None else NEXT]
            given = [tensor.to(self.device, dtype).contiguous() for tensor in (x, *(states or ()))]
            with torch.inference_mode():
                y, *new = graph(*given)
            return y, [owned(state) for state in new]  # it returns views of what it has joined

        return run
