"""ONNX Runtime: the exported graphs, run in torch's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backend import Unavailable, versions_of
from .stream import DTYPES, FIRST, NEXT, Coder, Plan, Run, States

INSTALL = "pip install 'skylapse[compile]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMPY = {"fp32": "float32", "fp16": "float16"}  # what a binding can name; it knows no bfloat16


class OnnxRuntime:
    name = "onnxruntime"

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = threads or torch.get_num_threads()

    def missing(self, plan: Plan) -> str | None:
        try:
            import onnx  # noqa: F401
            import onnxruntime
            import onnxscript  # noqa: F401

            available = onnxruntime.get_available_providers()
        except (ImportError, OSError) as error:  # a wheel whose libraries do not load raises either
            return f"onnxruntime is not there ({error}): {INSTALL}"
        provider = PROVIDERS.get(self.device.type)
        if provider not in available:
            return f"this onnxruntime has no {provider}: pip install onnxruntime-gpu"
        if self.device.type == "cpu" and plan.dtype != "fp32":
            return f"onnxruntime's CPU provider has no convolution of {plan.dtype}: --dtype fp32"
        if plan.dtype not in NUMPY:
            return f"onnxruntime's Python binding has no {plan.dtype}: --dtype fp16"
        return None

    def options(self, plan: Plan) -> Mapping[str, Any]:
        return {}  # what the session makes of the graph, it makes anew at every load

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")

    def bound_to(self) -> str:
        return "nothing"

    def plan(self, plan: Plan) -> Plan:
        return replace(plan, planar=self.device.type == "cpu")

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        from .export import export  # the exporter takes a second to load, and who runs an artifact needs none

        export(coder, plan, folder)

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        if reason := self.missing(plan):
            raise Unavailable(reason)
        sessions = {graph: self._session(folder / f"{graph}.onnx") for graph in (FIRST, NEXT)}
        return _Sessions(coder, plan, sessions, self.device)

    def _session(self, path: Path) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL  # the graph has one branch
        options.log_severity_level = 3
        # Threads that spin between two operations take the core from the denoiser, which shares it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = PROVIDERS[self.device.type]
        settings = [{"device_id": str(self.device.index or 0)}] if self.device.type == "cuda" else [{}]
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider], provider_options=settings)
        if session.get_providers()[0] != provider:  # it falls back by itself, and says so nowhere
            raise Unavailable(f"onnxruntime runs {path.name} on {session.get_providers()[0]}, not on {provider}")
        return session


class _Sessions:
    """The function of a loaded pair of graphs. A chunk that the plan does not allow is refused by the session."""

    def __init__(self, coder: Coder, plan: Plan, sessions: Mapping[str, Any], device: torch.device) -> None:
        self.coder, self.sessions, self.device = coder, sessions, device
        self.dtype, self.element = DTYPES[plan.dtype], NUMPY[plan.dtype]

    def __call__(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        graph = FIRST if states is None else NEXT
        session = self.sessions[graph]
        given = [self._own(tensor) for tensor in (x, *(states or ()))]
        shapes = [self.coder.output_shape(x.shape, graph), *self.coder.states.at(*self.coder.latent_size(x.shape))]
        made = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
        binding = session.io_binding()
        place, index = self.device.type, self.device.index or 0
        for value, tensor in zip(session.get_inputs(), given, strict=True):
            binding.bind_input(value.name, place, index, self.element, list(tensor.shape), tensor.data_ptr())
        for value, tensor in zip(session.get_outputs(), made, strict=True):
            binding.bind_output(value.name, place, index, self.element, list(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session has a stream of its own
        session.run_with_iobinding(binding)
        return made[0], made[1:]

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).contiguous()
