"""An ONNX graph becomes a TensorRT plan, in a process of its own: a builder that hangs, leaks or crashes is just ended.

Networks are strongly typed: precision is what the graph's tensors say (TensorRT 11 knows no other way). Written against
TensorRT 10.13 and 11; what was removed between the two is not used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .stream import NEXT, Coder

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]
Extent = tuple[int, int, int]  # latent frames of a chunk, height and width of the latents
LIST_MESSAGES = 20  # of the builder's last ones, in an error
MODULE = "skylapse.compile.tensorrt_build"


class BuildFailed(Exception):
    """The builder's own words, or that it was out of time."""


@dataclass(frozen=True)
class BuildRequest:
    """One graph. `profile`: of every input its smallest, likeliest and largest shape; one and the same where static."""

    onnx: str  # a path; weights outside the file lie beside it
    plan: str  # where the plan goes; it appears whole or not at all
    profile: Mapping[str, tuple[Shape, Shape, Shape]]
    workspace_bytes: int  # the most a tactic may use while it runs: unbounded, builders have run machines out of memory
    timing_cache: str | None = None  # read where it exists, written afterwards: the next build of this device is faster
    optimization_level: int = 3
    refittable: bool = False  # weights can be exchanged; costs speed, so it is asked for
    refit: str | None = None  # a refittable plan of the same structure: its weights are exchanged, which takes seconds
    tf32: bool = False  # whether fp32 products may round their factors to 10 bits


def profile_of(
    coder: Coder, graph: str, smallest: Extent, likeliest: Extent, largest: Extent
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes of every input of a graph; the states' follow from the latents' by their specification."""
    extents = (smallest, likeliest, largest)
    columns: list[tuple[Shape, ...]] = [tuple(coder.input_shape(*extent, graph) for extent in extents)]
    if graph == NEXT:
        columns += zip(*(coder.states.at(height, width) for _, height, width in extents), strict=True)
    names = ["x", *(f"state_{index}" for index in range(len(columns) - 1))]
    return {name: (shapes[0], shapes[1], shapes[2]) for name, shapes in zip(names, columns, strict=True)}


def build(request: BuildRequest, timeout_s: float) -> None:
    """Build in a subprocess. BuildFailed names the reason; nothing is left of what failed."""
    command = [sys.executable, "-m", MODULE]
    text = json.dumps(asdict(request))
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"TensorRT's build took longer than {timeout_s:g} s and was ended") from None
    finally:
        _unfinished(request).unlink(missing_ok=True)
    if done.returncode:
        words = done.stderr.strip() or f"it ended with {_ending(done.returncode)} and said nothing"
        raise BuildFailed(f"TensorRT's build failed: {words[-2000:]}")


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _unfinished(request: BuildRequest) -> Path:
    return Path(f"{request.plan}.unfinished")


# ------------------------------------------------------------------------------------------------- in the subprocess


def run(request: BuildRequest) -> None:
    """The build itself. BuildFailed with what the builder logged."""
    import tensorrt as trt

    messages: list[str] = []

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 insists on its own name

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(msg)

    logger = Listener()
    if request.refit is not None:
        plan = _refitted(Path(request.refit).read_bytes(), request.onnx, logger, messages)
        return _write(Path(request.plan), _unfinished(request), memoryview(plan))
    builder = trt.Builder(logger)
    # Needed by 10.x; 11 has no other networks and ignores it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        messages += [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise _failed("the graph cannot be parsed", messages)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    config.builder_optimization_level = request.optimization_level
    if not request.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    _add_profile(builder, network, config, request, messages)
    cache = _open_timing_cache(config, request)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise _failed("no plan came of it", messages)
    _write(Path(request.plan), _unfinished(request), memoryview(built))
    if cache is not None and request.timing_cache is not None:
        target = Path(request.timing_cache)
        _write(target, target.with_suffix(f".{os.getpid()}"), memoryview(cache.serialize()))


def _refitted(plan: bytes, onnx: str, logger: trt.ILogger, messages: list[str]) -> trt.IHostMemory:
    """The plan with the graph's weights in place of its own."""
    import tensorrt as trt

    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None or not engine.refittable:
        raise _failed("the plan cannot be refitted", messages)
    refitter = trt.Refitter(engine, logger)
    if not trt.OnnxParserRefitter(refitter, logger).refit_from_file(onnx):
        raise _failed("the graph's weights do not fit the plan's", messages)
    if missing := refitter.get_missing_weights():
        raise _failed(f"weights are missing: {', '.join(missing[:LIST_MESSAGES])}", messages)
    if not refitter.refit_cuda_engine():
        raise _failed("the weights could not be exchanged", messages)
    return engine.serialize()


def _add_profile(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    request: BuildRequest,
    messages: list[str],
) -> None:
    """Without one a network of dynamic shapes cannot be built; one of static shapes takes it too."""
    import tensorrt as trt

    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != set(request.profile):
        raise BuildFailed(f"the graph's inputs are {sorted(names)}, the profile's {sorted(request.profile)}")
    profile = builder.create_optimization_profile()
    for name, (smallest, likeliest, largest) in request.profile.items():
        profile.set_shape(name, trt.Dims(smallest), trt.Dims(likeliest), trt.Dims(largest))
    if config.add_optimization_profile(profile) < 0:
        raise _failed("the profile was refused", messages)


def _open_timing_cache(config: trt.IBuilderConfig, request: BuildRequest) -> trt.ITimingCache | None:
    if request.timing_cache is None:
        return None
    path = Path(request.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # another device's: begin anew
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _failed(what: str, messages: list[str]) -> BuildFailed:
    return BuildFailed("; ".join([what, *messages[-LIST_MESSAGES:]]))


def _write(target: Path, unfinished: Path, data: memoryview) -> None:
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _request(text: str) -> BuildRequest:
    fields = json.loads(text)
    fields["profile"] = {name: tuple(map(tuple, shapes)) for name, shapes in fields["profile"].items()}
    return BuildRequest(**fields)


if __name__ == "__main__":
    try:
        run(_request(sys.stdin.read()))
    except (BuildFailed, ImportError, OSError) as error:
        sys.exit(f"{error}")
