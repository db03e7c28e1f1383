"""ONNX Runtime: the exported graphs, run in torch's memory by the first provider that works."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import library
from .backend import Unavailable, versions_of
from .providers import PREFERRED, options_of, probe
from .stream import DTYPES, FIRST, NEXT, Coder, Plan, Run, States
from .tensorrt import MAX_ANY_PIXELS, WORKSPACE_BYTES

logger = logging.getLogger(__name__)
INSTALL = "pip install 'skylapse[compile]'"
NUMPY = {"fp32": "float32", "fp16": "float16"}  # what a binding can name; it knows no bfloat16


class OnnxRuntime:
    name = "onnxruntime"
    workspace_bytes = WORKSPACE_BYTES

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = threads or torch.get_num_threads()
        # Of its TensorRT providers' profiles, which are the same as TensorRT's own.
        self.max_any_pixels = MAX_ANY_PIXELS if device.type == "cuda" else None
        self.provider: str | None = None  # what runs the artifact that was loaded last

    def missing(self, plan: Plan) -> str | None:
        try:
            import onnx  # noqa: F401
            import onnxruntime
            import onnxscript  # noqa: F401

            available = onnxruntime.get_available_providers()
        except (ImportError, OSError) as error:  # a wheel whose libraries do not load raises either
            return f"onnxruntime is not there ({error}): {INSTALL}"
        preferred = PREFERRED[self.device.type]
        if not {*preferred} & {*available}:
            return f"this onnxruntime has no {' or '.join(preferred)}: pip install onnxruntime-gpu"
        if self.device.type == "cpu" and plan.dtype != "fp32":
            return f"onnxruntime's CPU provider has no convolution of {plan.dtype}: --dtype fp32"
        if plan.dtype not in NUMPY:
            return f"onnxruntime's Python binding has no {plan.dtype}: --dtype fp16"
        return None

    def plans(self, plan: Plan) -> Sequence[Plan]:
        if self.device.type != "cpu":
            return [plan]
        native, planar = replace(plan, lowering="native"), replace(plan, lowering="planar")
        if library.level() is None:  # a processor that none of the libraries is for
            return [planar]
        return [native, planar] if library.can_build() else [planar, native]

    def options(self, plan: Plan) -> Mapping[str, Any]:
        """What the session makes of the graph, it makes anew at every load."""
        return {"operators": library.digest()} if plan.lowering == "native" else {}

    def versions(self) -> Mapping[str, str]:
        return versions_of("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")

    def bound_to(self) -> str:
        return "nothing"

    def build(self, coder: Coder, plan: Plan, folder: Path) -> None:
        from .export import export  # the exporter takes a second to load, and who runs an artifact needs none

        if plan.lowering == "native":
            library.build(folder)
        export(coder, plan, folder)

    def load(self, coder: Coder, plan: Plan, folder: Path) -> Run:
        if reason := self.missing(plan):
            raise Unavailable(reason)
        return _Sessions(coder, plan, self._sessions(coder, plan, folder), self.device)

    def _sessions(self, coder: Coder, plan: Plan, folder: Path) -> dict[str, Any]:
        """Both graphs', of one provider; Unavailable says what is wrong with each that there is."""
        import onnxruntime

        there, reasons = onnxruntime.get_available_providers(), []
        for provider in (name for name in PREFERRED[self.device.type] if name in there):
            reason = probe(provider, self.device.index or 0) if self.device.type == "cuda" else None
            if reason is None:
                try:
                    found = {graph: self._session(provider, coder, plan, graph, folder) for graph in (FIRST, NEXT)}
                except Unavailable as error:
                    reason = str(error)
                except Exception as error:
                    if self.device.type == "cpu":
                        raise  # there is one provider: the graph is damaged, and is built again
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                else:
                    self.provider = provider
                    logger.info("onnxruntime runs %ss on %s", coder.kind, provider)
                    return found
            logger.warning("onnxruntime's %s is not used: %s", provider, reason)
            reasons.append(f"{provider}: {reason}")
        raise Unavailable("; ".join(reasons))

    def _session(self, provider: str, coder: Coder, plan: Plan, graph: str, folder: Path) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL  # the graph has one branch
        options.log_severity_level = 3
        # Threads that spin between two operations take the core from the denoiser, which shares it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if plan.lowering == "native":
            options.register_custom_ops_library(str(folder / library.name_of(library.level() or "none")))
        told = options_of(provider, coder, plan, graph, folder, self.device)
        path = str(folder / f"{graph}.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=[provider], provider_options=[told])
        if (running := session.get_providers()[0]) != provider:  # it falls back by itself, and says so nowhere
            raise Unavailable(f"{graph}.onnx runs on {running} instead")
        return session


class _Sessions:
    """The function of a loaded pair of graphs. A chunk that the plan does not allow is refused by the session."""

    def __init__(self, coder: Coder, plan: Plan, sessions: Mapping[str, Any], device: torch.device) -> None:
        self.coder, self.plan, self.sessions, self.device = coder, plan, sessions, device
        self.dtype, self.element = DTYPES[plan.dtype], NUMPY[plan.dtype]

    def __call__(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        graph = FIRST if states is None else NEXT
        session = self.sessions[graph]
        given = [self._own(tensor) for tensor in (x, *(states or ()))]
        shapes = [self.coder.output_shape(x.shape, graph), *self.coder.states.at(*self.coder.latent_size(x.shape))]
        made = [torch.empty(self.plan.laid_out(s), dtype=self.dtype, device=self.device) for s in shapes]
        binding = session.io_binding()
        place, index = self.device.type, self.device.index or 0
        for value, tensor in zip(session.get_inputs(), given, strict=True):
            binding.bind_input(value.name, place, index, self.element, list(tensor.shape), tensor.data_ptr())
        for value, tensor in zip(session.get_outputs(), made, strict=True):
            binding.bind_output(value.name, place, index, self.element, list(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the session has a stream of its own
        session.run_with_iobinding(binding)
        if self.plan.channels_last:
            made = [tensor.permute(0, 4, 1, 2, 3) for tensor in made]
        return made[0], made[1:]

    def _own(self, tensor: Tensor) -> Tensor:
        """A clip in the memory order of the graphs."""
        tensor = tensor.to(self.device, self.dtype)
        return (tensor.permute(0, 2, 3, 4, 1) if self.plan.channels_last else tensor).contiguous()
