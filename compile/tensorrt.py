"""TensorRT 10.13 and 11: strongly typed plans, built in a process of their own, run between standing buffers.

Nothing here was run on a GPU yet. The tests run it on a stand-in that has the real bindings' calls and no others and
computes what the graphs say; `skylapse compile MODEL --backend tensorrt --verify` tells what is true on a machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .backend import machine_name, versions_of
from .stream import DTYPES, FIRST, NEXT, Coder, Plan, Run
from .tensorrt_build import BuildRequest, Extent, build, profile_of

INSTALL = "pip install 'skylapse[compile,tensorrt]'"
OLDEST = (10, 13)
WORKSPACE_BYTES = 4 * 2**30  # the most a convolution's tactic may use; unbounded, builders have run GPUs out of memory
BUILD_S = 3600.0
OPTIMIZATION_LEVEL = 3
MAX_CHUNK = 4  # latent frames at once, where the plan does not say how many
# Latents of sizes where the plan says any: up to 1280 x 1280 pixels of a VAE that shrinks 8 times.
SIDES = (2, 60, 160)


class TensorRT:
    """On one GPU. Plans are of this very TensorRT, GPU and driver's generation: the key sees to that."""

    name = "tensorrt"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def missing(self, plan: Plan) -> str | None:
        """Its bindings are a package of their own, which without the libraries fails in other ways than not found."""
        if self.device.type != "cuda":
            return "TensorRT needs an NVIDIA GPU"
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
            import tensorrt
        except (ImportError, OSError) as error:
            return f"TensorRT is not there ({' '.join(str(error).split())[:200]}): {INSTALL}"
        version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
        if version < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return f"TensorRT must be {oldest} or newer, this is {tensorrt.__version__}: {INSTALL}"
        return None

    def options(self, plan: Plan) -> Mapping[str, Any]:
        return {
            "extents": [list(extent) for extent in extents(plan)],
            "workspace_bytes": WORKSPACE_BYTES,
            "optimization_level": OPTIMIZATION_LEVEL,
        }

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch", "onnx", "onnxscript", "tensorrt", "tensorrt-cu12", "tensorrt-cu13")

    def bound_to(self) -> str:
        return machine_name(self.device)

    def plans(self, plan: Plan) -> Sequence[Plan]:
        return [plan]

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        from .export import export

        export(coder, plan, folder)
        for graph in (FIRST, NEXT):
            request = BuildRequest(
                onnx=str(folder / f"{graph}.onnx"),
                plan=str(folder / f"{graph}.plan"),
                profile=profile_of(coder, graph, *extents(plan)),
                workspace_bytes=WORKSPACE_BYTES,
                timing_cache=str(folder.parent / f"tensorrt-{self._device_id()}.timings"),
                optimization_level=OPTIMIZATION_LEVEL,
            )
            build(request, BUILD_S)
        for path in folder.glob("*.onnx*"):  # the plans have the weights
            path.unlink()

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        from .tensorrt_runner import Runner

        plans = {graph: (folder / f"{graph}.plan").read_bytes() for graph in (FIRST, NEXT)}
        return Runner(coder, plans, self.device, DTYPES[plan.dtype])

    def _device_id(self) -> str:
        """Of what timings are true for."""
        text = f"{self.bound_to()} {sorted(self.versions().items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def extents(plan: Plan) -> tuple[Extent, Extent, Extent]:
    """Smallest, likeliest and largest chunk that a plan's engine takes."""
    chunks = (plan.chunk,) * 3 if plan.chunk else (1, 4, MAX_CHUNK)
    heights, widths = ((side,) * 3 for side in plan.size) if plan.size else (SIDES, SIDES)
    smallest, likeliest, largest = zip(chunks, heights, widths, strict=True)
    return smallest, likeliest, largest
