"""A streaming coder as ONNX: `first` and `next`, states in and out, checked before anything is built of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import native
from .attention import Bounded
from .frames import Frames
from .lowering import Planar
from .stream import DTYPES, FIRST, NEXT, Coder, Graph, Plan, copied

OPSET = 20  # TensorRT 10.13 and ONNX Runtime 1.2x read it, and Resize has not changed since
OPSET_BF16 = 22  # the first in which a convolution may be of bfloat16
EXTERNAL_ABOVE_BYTES = 2 * 10**9  # a protobuf holds less than 2 GiB

# What an exported coder may consist of: every one of them is implemented by ONNX Runtime and TensorRT. `nearest-exact`
# would come as GatherND (3 of them a Wan decoder), a Python loop over frames as a thousand nodes: neither gets in here
# unnoticed.
OPERATORS = {
    *(
        "Add",
        "Cast",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "DepthToSpace",
        "Div",
        "Equal",
        "Expand",
        "Flatten",
    ),
    *("Gather", "Gemm", "Identity", "IsNaN", "MatMul", "Mul", "Neg", "Not", "Pad", "Pow", "Range", "Reciprocal"),
    *("ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt"),
    *("Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"),
}

LOWERINGS: dict[str, type[Frames] | None] = {"none": None, "planar": Planar, "native": native.Native}


def export(coder: Coder, plan: Plan, folder: Path, external_above_bytes: int = EXTERNAL_ABOVE_BYTES) -> None:
    """Write first.onnx and next.onnx into `folder` and check them; ValueError says what is wrong with a graph."""
    for graph in (FIRST, NEXT):
        path = folder / f"{graph}.onnx"
        program = _program(coder, plan, graph)
        if plan.lowering == "native":
            native.fuse(program.model)
        num_bytes = sum(p.numel() * DTYPES[plan.dtype].itemsize for p in coder.module.parameters())
        program.save(path, external_data=num_bytes > external_above_bytes)
        check(path, coder, plan, graph)


def opset(plan: Plan) -> int:
    """Of a plan's graphs."""
    return OPSET_BF16 if plan.dtype == "bf16" else OPSET


def example(coder: Coder, plan: Plan, graph: str) -> tuple[Tensor, ...]:
    """Arguments of a graph: zeros of the plan's shapes, of small ones where it says any."""
    height, width = plan.size or (6, 10)
    dtype = DTYPES[plan.dtype]
    shapes = [coder.input_shape(plan.chunk or 3, height, width, graph)]
    shapes += coder.states.at(height, width) if graph == NEXT else []
    return tuple(torch.zeros(plan.laid_out(shape), dtype=dtype) for shape in shapes)


def dynamic_shapes(coder: Coder, plan: Plan, graph: str) -> tuple[Any, ...] | None:
    """Which sides of which argument are free, in the exporter's form: (x, states)."""
    free = torch.export.Dim.DYNAMIC
    time, *space = (1, 2, 3) if plan.channels_last else (2, 3, 4)
    sides = {} if plan.size else dict.fromkeys(space, free)
    frames = {time: free} if plan.chunk is None and graph == NEXT else {}
    if not sides and not frames:
        return None
    x = frames | sides
    return (x, tuple(sides for _ in coder.states.shapes)) if graph == NEXT else (x,)  # an empty tuple is refused


def exported(
    coder: Coder, plan: Plan, graph: str, device: torch.device, bounded: bool = False
) -> torch.export.ExportedProgram:
    """A graph as torch.export has it, with the plan's dtype and free sides; bounded: see attention.py."""
    dtype = DTYPES[plan.dtype]
    module: nn.Module = Graph(coder, graph)
    weight = next(module.parameters())
    if (weight.dtype, weight.device.type) != (dtype, device.type):
        module = copied(module, device, dtype)
    arguments = tuple(tensor.to(device) for tensor in example(coder, plan, graph))
    with torch.no_grad(), quiet():
        return torch.export.export(
            _Lowered(module, plan, bounded).eval(), arguments, dynamic_shapes=dynamic_shapes(coder, plan, graph)
        )


def _program(coder: Coder, plan: Plan, graph: str) -> torch.onnx.ONNXProgram:
    count = len(coder.states.shapes)
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            exported(coder, plan, graph, torch.device("cpu"), bounded=True),
            (),
            dynamo=True,
            opset_version=opset(plan),
            verbose=False,
            input_names=["x", *(f"state_{i}" for i in range(count if graph == NEXT else 0))],
            output_names=["y", *(f"new_state_{i}" for i in range(count))],
        )
    assert program is not None
    return program


class _Lowered(nn.Module):
    def __init__(self, inner: nn.Module, plan: Plan, bounded: bool) -> None:
        super().__init__()
        self.inner, self.plan, self.bounded = inner, plan, bounded  # fx keeps the name `graph` for itself

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        lowering = LOWERINGS[self.plan.lowering]
        with lowering() if lowering else nullcontext() as frames, Bounded() if self.bounded else nullcontext():
            if frames is None or not self.plan.channels_last:
                result: tuple[Tensor, ...] = self.inner(x, *states)
                return result
            clips = self.inner(*(frames.view(x.squeeze(0)) for x in (x, *states)))
            return tuple(frames.frames_of(clip).unsqueeze(0) for clip in clips)


def check(path: Path, coder: Coder, plan: Plan, graph: str) -> None:
    """Checker, strict shape inference, operators, and inputs and outputs against the states' specification."""
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    inferred = path.with_suffix(".inferred")
    try:
        onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True, data_prop=True)
        model = onnx.load(str(inferred), load_external_data=False)
    finally:
        inferred.unlink(missing_ok=True)
    own = {(native.DOMAIN, name) for name in native.OPERATORS} if plan.lowering == "native" else set()
    allowed = own | {("", name) for name in OPERATORS}
    if foreign := sorted({(node.domain, node.op_type) for node in model.graph.node} - allowed):
        names = ", ".join(name for _, name in foreign)
        raise ValueError(f"{path.name} has operators that not every backend knows: {names}")
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if versions.get("") != opset(plan) or set(versions) - {"", *(domain for domain, _ in own)}:
        raise ValueError(f"{path.name} must be of opset {opset(plan)} alone, got {versions}")
    arguments = example(coder, plan, graph)
    given = {value.name: value for value in model.graph.input}
    expected = [("x", arguments[0].shape), *((f"state_{i}", s.shape) for i, s in enumerate(arguments[1:]))]
    made = {value.name: value for value in model.graph.output}
    height, width = plan.size or (6, 10)
    y = coder.output_shape(coder.input_shape(plan.chunk or 3, height, width, graph), graph)
    results = [("y", plan.laid_out(y))]
    results += [(f"new_state_{i}", plan.laid_out(shape)) for i, shape in enumerate(coder.states.at(height, width))]
    for values, wanted in ((given, expected), (made, results)):
        if list(values) != [name for name, _ in wanted]:
            raise ValueError(f"{path.name} must have {[name for name, _ in wanted]}, got {list(values)}")
        for name, shape in wanted:
            _check_value(path, values[name], shape, plan)


def _check_value(path: Path, value: Any, shape: Any, plan: Plan) -> None:
    import onnx

    kind = {"fp32": "FLOAT", "bf16": "BFLOAT16", "fp16": "FLOAT16"}[plan.dtype]
    tensor = value.type.tensor_type
    if tensor.elem_type != onnx.TensorProto.DataType.Value(kind):
        raise ValueError(f"{path.name}: {value.name} must be {kind}")
    sides = [side.dim_value if side.HasField("dim_value") else None for side in tensor.shape.dim]
    fits = len(sides) == len(shape) and all(a in (None, b) for a, b in zip(sides, shape, strict=True))
    space = sides[2:4] if plan.channels_last else sides[3:]
    if not fits or (plan.size and None in space) or (plan.size is None and None not in space):
        raise ValueError(f"{path.name}: {value.name} must be {list(shape)}, where the plan says so, got {sides}")


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's notices of what it tries are no concern of who runs it; its errors are exceptions."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
