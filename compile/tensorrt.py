"""TensorRT 10.13 and 11: strongly typed plans, built in a process of their own, run between standing buffers.

Nothing here was run on a GPU yet. The tests run it on a stand-in that has the real bindings' calls and no others and
computes what the graphs say; `skylapse compile MODEL --backend tensorrt --verify` tells what is true on a machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .backend import Unavailable, machine_name, versions_of
from .stream import DTYPES, FIRST, NEXT, Coder, Plan, Run
from .tensorrt_build import BuildRequest, Extent, build, profile_of

INSTALL = "pip install 'skylapse[compile,tensorrt]'"
OLDEST = (10, 13)
WORKSPACE_BYTES = 4 * 2**30  # the most a convolution's tactic may use; unbounded, builders have run GPUs out of memory
BUILD_S = 3600.0
OPTIMIZATION_LEVEL = 3
MAX_CHUNK = 4  # latent frames at once, of frames that a plan for any size takes; of larger ones it is one
# A side of the frames that a plan for any size takes. A context's memory is that of its profile's largest shape,
# whatever is decoded: 512 x 512 pixels, four latent frames at once, are about as much as 720 x 1280 one at a time.
MAX_ANY_PIXELS = 512
SMALLEST_SIDE = 2  # latents
# fp32 products may round their factors to 10 bits, as torch's own convolutions do on CUDA. Without that they miss the
# tensor cores: 81 frames of 720p are 604 TFLOP, of which an H100 does 67 a second, and 494 of the rounded ones (by its
# datasheet). Graphs of bf16 and fp16 have no such product. Whether it is near enough the judge says.
TF32 = True


class TensorRT:
    """On one GPU. Plans are of this very TensorRT, GPU and driver's generation: the key sees to that."""

    name = "tensorrt"
    max_any_pixels: int | None = MAX_ANY_PIXELS
    workspace_bytes = WORKSPACE_BYTES

    def __init__(self, device: torch.device, memory_bytes: int | None = None) -> None:
        """memory_bytes: what the operator lets this process take of the device; None is all that is free."""
        self.device, self.memory_bytes = device, memory_bytes

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
            "largest": [MAX_ANY_PIXELS, MAX_CHUNK],
            "workspace_bytes": WORKSPACE_BYTES,
            "optimization_level": OPTIMIZATION_LEVEL,
            "tf32": TF32,
        }

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch", "onnx", "onnxscript", "tensorrt", "tensorrt-cu12", "tensorrt-cu13")

    def bound_to(self) -> str:
        return machine_name(self.device)

    def plans(self, plan: Plan) -> Sequence[Plan]:
        """A plan of one size is static: one latent frame at a time, so that it takes the least memory."""
        return [replace(plan, chunk=1) if plan.size else plan]

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        from .export import export

        export(coder, plan, folder)
        for graph in (FIRST, NEXT):
            request = BuildRequest(
                onnx=str(folder / f"{graph}.onnx"),
                plan=str(folder / f"{graph}.plan"),
                profile=profile_of(coder, graph, *extents(coder, plan)),
                workspace_bytes=WORKSPACE_BYTES,
                timing_cache=str(folder.parent / f"tensorrt-{self._device_id()}.timings"),
                optimization_level=OPTIMIZATION_LEVEL,
                tf32=TF32,
            )
            build(request, BUILD_S)
        for path in folder.glob("*.onnx*"):  # the plans have the weights
            path.unlink()

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        from .tensorrt_runner import Runner

        plans = {graph: (folder / f"{graph}.plan").read_bytes() for graph in (FIRST, NEXT)}
        try:
            return Runner(coder, plans, self.device, DTYPES[plan.dtype], size=plan.size, memory_bytes=self.memory_bytes)
        except torch.OutOfMemoryError as error:  # the machine's fault, not the plans': they are kept
            raise Unavailable(str(error)) from error

    def _device_id(self) -> str:
        """Of what timings are true for."""
        text = f"{self.bound_to()} {sorted(self.versions().items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def extents(coder: Coder, plan: Plan) -> tuple[Extent, Extent, Extent]:
    """Smallest, likeliest and largest chunk that a plan's engine takes."""
    chunks = (plan.chunk,) * 3 if plan.chunk else (1, MAX_CHUNK, MAX_CHUNK)
    largest_side = max(SMALLEST_SIDE, MAX_ANY_PIXELS // (coder.in_scale * coder.out_scale))
    sides = (SMALLEST_SIDE, max(SMALLEST_SIDE, largest_side // 2), largest_side)
    heights, widths = ((side,) * 3 for side in plan.size) if plan.size else (sides, sides)
    smallest, likeliest, largest = zip(chunks, heights, widths, strict=True)
    return smallest, likeliest, largest
