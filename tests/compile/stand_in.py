"""`tensorrt` for tests: the real bindings' classes and calls and no others, playing their part by ONNX Runtime.

Every call is checked against the signatures that the bindings themselves give (api.json, made by bindings.py on this
machine) and recorded. A plan is the graph and its profile; a run reads and writes the addresses that it was given.
"""

from __future__ import annotations

import ctypes
import enum
import json
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

NUMPY = {"FLOAT": np.float32, "HALF": np.float16}
OF_ONNX = {1: "FLOAT", 10: "HALF", 16: "BF16"}
SCRATCH_BYTES = 4096
NEEDED_BYTES = 2**20  # a smaller workspace is too small


class StandIn(ModuleType):
    """Put it into sys.modules as `tensorrt`. `calls`: (class, method, arguments) in order."""

    def __init__(self, api: Path, version: str | None = None) -> None:
        super().__init__("tensorrt")
        described = json.loads(api.read_text())
        self.__version__ = version or described["version"]
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.captured: list[Callable[[], None]] | None = None  # a list while a stream captures
        self.refuse: set[str] = set()  # methods that say no: "execute_async_v3"
        self._classes: dict[str, type] = {}
        for name, about in sorted(described["classes"].items(), key=lambda item: len(item[1]["bases"])):
            if about["members"]:
                members = {member: value for value, member in enumerate(about["members"])}
                made: Any = _enumeration(name, members)
            else:
                made = self._class(name, about)
            self._classes[name] = made
            setattr(self, name, made)
        for name, member in described["constants"].items():
            setattr(self, name, self.DataType[member])
        for severity in self._severities():
            setattr(self.Logger, severity.name, severity)

    def _severities(self) -> Any:
        names = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
        severity = _enumeration("Severity", {name: value for value, name in enumerate(names)})
        self.ILogger.Severity = self.Logger.Severity = severity
        return severity

    def _class(self, name: str, about: dict[str, Any]) -> type:
        bases = tuple(self._classes[base] for base in about["bases"][:1]) or ((bytes,) if name == "IHostMemory" else ())
        body: dict[str, Any] = {"__slots__": ()} if name == "IHostMemory" else {}
        for method, doc in about["methods"].items():
            if method != "__init__" and not (bases and bases[0] is bytes and method in dir(bytes)):
                body[method] = self._method(name, method, doc)
        if name != "IHostMemory":
            body["__init__"] = self._method(name, "__init__", about["methods"].get("__init__", ""))
            allowed = {*about["properties"]}
            body["__setattr__"] = lambda this, key, value: _set(this, key, value, allowed)
        return type(name, bases, body)

    def _method(self, owner: str, method: str, doc: str) -> Callable[..., Any]:
        overloads = [parsed(line) for line in signatures(method, doc)]

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            given = [bound(names, args, kwargs) for names in overloads]
            fitting = next((arguments for arguments in given if arguments is not None), None)
            if fitting is None and overloads:
                raise TypeError(f"{owner}.{method} does not take {args} {kwargs}: {doc.splitlines()[0]}")
            self.calls.append((owner, method, args))
            if method in self.refuse:
                return False
            play = PLAYS.get((owner, method))
            if play is None and method == "__init__":
                return None
            if play is None:
                raise NotImplementedError(f"the stand-in does not play {owner}.{method}")
            return play(self, this, **(fitting or {}))

        return call

    def make(self, kind: str, /, **state: Any) -> Any:
        """An object of a class that has no constructor."""
        made: Any = object.__new__(self._classes[kind])
        made.__dict__["state"] = SimpleNamespace(**state)
        for key, value in state.items():
            made.__dict__[key] = value
        return made


def _enumeration(name: str, members: dict[str, int]) -> Any:
    return enum.IntEnum(name, members)  # type: ignore[misc]


def _set(this: Any, key: str, value: Any, allowed: set[str]) -> None:
    if key not in allowed and type(this).__module__ == __name__:
        raise AttributeError(f"{type(this).__name__} has no {key}")
    this.__dict__[key] = value


def signatures(method: str, doc: str) -> list[str]:
    lines = [line.strip() for line in doc.splitlines()]
    numbered = [line.partition(". ")[2] for line in lines if re.match(rf"\d+\. {method}\(", line)]
    return numbered or [line for line in lines[:1] if line.startswith(f"{method}(") and "*args" not in line]


def parsed(signature: str) -> list[tuple[str, str, bool]]:
    """(name, type, whether it has a default) of each parameter after self."""
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(inside + ","):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(inside[start:at].strip())
            start = at + 1
    found = []
    for part in parts[1:]:
        name, _, rest = part.partition(": ")
        type_, _, default = rest.partition(" = ")
        found.append((name, type_.split("[")[0].split(".")[-1], bool(default)))
    return found


def bound(parameters: list[tuple[str, str, bool]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments by name, or None where they do not fit."""
    if len(args) > len(parameters) or {*kwargs} - {name for name, _, _ in parameters}:
        return None
    given = dict(zip((name for name, _, _ in parameters), args, strict=False)) | kwargs
    for name, type_, has_default in parameters:
        if name not in given:
            if not has_default:
                return None
        elif not fits(given[name], type_):
            return None
    return given


def fits(value: Any, type_: str) -> bool:
    if type_ == "SupportsInt":
        return isinstance(value, int) and not isinstance(value, bool)
    if type_ in ("str", "bool", "tuple", "list"):
        return type(value).__name__ == type_
    if type_ == "Sequence":
        return isinstance(value, tuple | list)
    if type_ == "Buffer":
        return isinstance(value, bytes | bytearray | memoryview)
    return type_ == "Any" or any(base.__name__ == type_ for base in type(value).__mro__)


# ------------------------------------------------------------------------------------------------ what is played here


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _parse(trt: Any, parser: Any, model: str) -> bool:
    import onnx

    try:
        parser.network.state.model = onnx.load(model).SerializeToString()
    except Exception as error:
        parser.__dict__.update(errors=[str(error)], num_errors=1)
        return False
    graph = onnx.load_from_string(parser.network.state.model).graph
    parser.network.state.inputs = [value.name for value in graph.input]
    parser.network.__dict__["num_inputs"] = len(graph.input)
    return True


def _init_parser(trt: Any, parser: Any, network: Any, logger: Any) -> None:
    parser.__dict__.update(network=network, errors=[], num_errors=0)


def _set_shape(trt: Any, profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:
    profile.state.shapes[input] = tuple(tuple(dims.values) for dims in (min, opt, max))


def _add_profile(trt: Any, config: Any, profile: Any) -> int:
    for smallest, likeliest, largest in profile.state.shapes.values():
        if not all(a <= b <= c for a, b, c in zip(smallest, likeliest, largest, strict=True)):
            return -1
    config.state.profile = profile.state.shapes
    return 0


def _build(trt: Any, builder: Any, network: Any, config: Any) -> Any:
    def refuse(message: str) -> None:
        builder.logger.log(trt.ILogger.Severity.ERROR, message)

    if config.state.workspace < NEEDED_BYTES:
        return refuse("Could not find any implementation: out of memory, increase the workspace")
    session = _session(network.state.model)
    try:
        for which in range(3):  # shapes of states that do not go with the input's fail, as in a real build
            feeds = {
                value.name: np.zeros(config.state.profile[value.name][which], NUMPY["FLOAT"])
                for value in session.get_inputs()
            }
            session.run(None, feeds)
    except Exception as error:
        return refuse(f"axis dimensions must be equal for concatenation: {error}")
    refittable = {"flag": trt.BuilderFlag.REFIT} in getattr(config.state, "flags_set", [])
    plan = {"version": trt.__version__, "model": network.state.model, "profile": config.state.profile}
    plan |= {"refittable": refittable}
    return trt.IHostMemory(pickle.dumps(plan))


def _deserialize(trt: Any, runtime: Any, serialized_engine: Any) -> Any:
    try:
        plan = pickle.loads(bytes(serialized_engine))
    except Exception:
        return None
    if plan["version"] != trt.__version__:
        return None
    session = _session(plan["model"])
    io = {value.name: (value, True) for value in session.get_inputs()}
    io |= {value.name: (value, False) for value in session.get_outputs()}
    return trt.make(
        "ICudaEngine",
        plan=plan,
        session=session,
        io=io,
        num_io_tensors=len(io),
        device_memory_size_v2=SCRATCH_BYTES,
        refittable=plan["refittable"],
    )


def _dtype(trt: Any, engine: Any, name: str) -> Any:
    return trt.DataType["FLOAT" if "float)" in engine.state.io[name][0].type else "HALF"]


def _set_input_shape(trt: Any, context: Any, name: str, shape: Any) -> bool:
    smallest, _, largest = context.state.engine.state.plan["profile"][name]
    fits_in = len(shape) == len(smallest) and all(a <= n <= b for a, n, b in zip(smallest, shape, largest, strict=True))
    if fits_in:
        context.state.shapes[name] = tuple(shape)
        context.state.known = None
    return fits_in


def _infer(trt: Any, context: Any) -> list[str]:
    return [
        value.name
        for value in context.state.engine.state.session.get_inputs()
        if value.name not in context.state.shapes
    ]


def _shape(trt: Any, context: Any, name: str) -> Any:
    state = context.state
    if name in state.shapes:
        return state.shapes[name]
    if state.known is None:  # output shapes follow from the inputs': run it on nothing
        session = state.engine.state.session
        feeds = {value.name: np.zeros(state.shapes[value.name], np.float32) for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        state.known = {key: value.shape for key, value in zip(names, session.run(names, feeds), strict=True)}
    return state.known[name]


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


def _execute(trt: Any, context: Any, stream_handle: int) -> bool:
    state = context.state
    if state.memory is None:
        return False
    run = partial(_compute, state.engine.state.session, dict(state.addresses), dict(state.shapes))
    if trt.captured is None:
        run()
    else:  # what is captured keeps the addresses that it was captured with
        trt.captured.append(run)
    return True


def _compute(session: Any, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    feeds = {value.name: _at(addresses[value.name], shapes[value.name]).copy() for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    for name, result in zip(names, session.run(names, feeds), strict=True):
        _at(addresses[name], result.shape)[...] = result


def _parse_weights(trt: Any, parser: Any, model: str) -> bool:
    """Whether the graphs have weights of the same names and shapes."""
    import onnx

    new = onnx.load(model)
    old = onnx.load_from_string(parser.refitter.engine.state.plan["model"])
    shapes = [{w.name: tuple(w.dims) for w in one.graph.initializer} for one in (new, old)]
    parser.refitter.__dict__["model"] = new.SerializeToString()
    return shapes[0] == shapes[1]


def _refit(trt: Any, refitter: Any) -> bool:
    refitter.engine.state.plan["model"] = refitter.model
    return True


def _remember(field: str) -> Callable[..., Any]:
    def play(trt: Any, this: Any, **arguments: Any) -> Any:
        this.state.__dict__.setdefault(field, []).append(arguments)

    return play


def _store(mapping: str) -> Callable[..., bool]:
    def play(trt: Any, context: Any, name: str, memory: int) -> bool:
        getattr(context.state, mapping)[name] = memory
        return True

    return play


PLAYS: dict[tuple[str, str], Callable[..., Any]] = {
    ("Builder", "__init__"): lambda trt, builder, logger: builder.__dict__.update(logger=logger),
    ("Builder", "create_network"): lambda trt, builder, flags=0: trt.make("INetworkDefinition", model=b"", inputs=[]),
    ("Builder", "create_builder_config"): lambda trt, b: trt.make(
        "IBuilderConfig", workspace=0, profile={}, cache=None
    ),
    ("Builder", "create_optimization_profile"): lambda trt, b: trt.make("IOptimizationProfile", shapes={}),
    ("Builder", "build_serialized_network"): _build,
    ("INetworkDefinition", "get_input"): lambda trt, network, index: trt.make(
        "ITensor", name=network.state.inputs[index]
    ),
    ("OnnxParser", "__init__"): _init_parser,
    ("OnnxParser", "parse_from_file"): _parse,
    ("OnnxParser", "get_error"): lambda trt, parser, index: parser.errors[index],
    ("Dims", "__init__"): lambda trt, dims, shape=(): dims.__dict__.update(values=list(shape)),
    ("IOptimizationProfile", "set_shape"): _set_shape,
    ("IBuilderConfig", "add_optimization_profile"): _add_profile,
    ("IBuilderConfig", "set_memory_pool_limit"): lambda trt, config, pool, pool_size: config.state.__dict__.update(
        workspace=pool_size
    ),
    ("IBuilderConfig", "set_flag"): _remember("flags_set"),
    ("IBuilderConfig", "clear_flag"): _remember("flags_cleared"),
    ("IBuilderConfig", "create_timing_cache"): lambda trt, config, serialized_timing_cache: trt.make(
        "ITimingCache", data=bytes(serialized_timing_cache)
    ),
    ("IBuilderConfig", "set_timing_cache"): lambda trt, config, cache, ignore_mismatch: (
        cache.state.data
        in (
            b"",
            b"timings of this device",
        )
    ),
    ("ITimingCache", "serialize"): lambda trt, cache: trt.IHostMemory(b"timings of this device"),
    ("Refitter", "__init__"): lambda trt, refitter, engine, logger: refitter.__dict__.update(engine=engine, model=None),
    ("Refitter", "get_missing_weights"): lambda trt, refitter: [],
    ("Refitter", "refit_cuda_engine"): _refit,
    ("OnnxParserRefitter", "__init__"): lambda trt, parser, refitter, logger: parser.__dict__.update(refitter=refitter),
    ("OnnxParserRefitter", "refit_from_file"): _parse_weights,
    ("ICudaEngine", "serialize"): lambda trt, engine: trt.IHostMemory(pickle.dumps(engine.state.plan)),
    ("Logger", "__init__"): lambda trt, logger, min_severity=None: None,
    ("Runtime", "__init__"): lambda trt, runtime, logger: None,
    ("Runtime", "deserialize_cuda_engine"): _deserialize,
    ("ICudaEngine", "create_execution_context"): lambda trt, engine, strategy=None, runtime_config=None: trt.make(
        "IExecutionContext", engine=engine, shapes={}, addresses={}, known=None, memory=None
    ),
    ("ICudaEngine", "get_tensor_name"): lambda trt, engine, index: [*engine.state.io][index],
    ("ICudaEngine", "get_tensor_mode"): lambda trt, engine, name: trt.TensorIOMode[
        "INPUT" if engine.state.io[name][1] else "OUTPUT"
    ],
    ("ICudaEngine", "get_tensor_dtype"): _dtype,
    ("IExecutionContext", "set_device_memory"): lambda trt, context, memory, size: context.state.__dict__.update(
        memory=(memory, size)
    ),
    ("IExecutionContext", "set_input_shape"): _set_input_shape,
    ("IExecutionContext", "infer_shapes"): _infer,
    ("IExecutionContext", "get_tensor_shape"): _shape,
    ("IExecutionContext", "set_tensor_address"): _store("addresses"),
    ("IExecutionContext", "execute_async_v3"): _execute,
}
