"""ONNX Runtime's providers on an NVIDIA GPU: which there are, whether they load, and what each is told.

A provider that is compiled in may lack its libraries, and libraries of another version may take the process with them
when they load. So each is tried in a process of its own first, on a graph of one node. Nothing here was run on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from .backend import machine_name, versions_of
from .stream import Coder, Plan
from .tensorrt import TF32, WORKSPACE_BYTES, extents
from .tensorrt_build import profile_of

logger = logging.getLogger(__name__)
RTX, TENSORRT, CUDA = "NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider", "CUDAExecutionProvider"
PREFERRED = {"cuda": (RTX, TENSORRT, CUDA), "cpu": ("CPUExecutionProvider",)}  # the first that works is used
PREFIX = {RTX: "nv", TENSORRT: "trt"}  # of their options' names
PROBE_S = 120.0  # CUDA's and TensorRT's libraries are gigabytes, perhaps on a cold disk
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-trt-rtx", "tensorrt", "tensorrt-cu12", "tensorrt-cu13")

# y = max(x, 0) of two numbers, opset 20, as onnx.helper makes it: the probe needs no package but onnxruntime.
GRAPH = (
    "08093a370a0c0a0178120179220452656c75120570726f62655a0f0a0178120a0a08080112040a02080262"
    "0f0a0179120a0a08080112040a02080242040a001014"
)
PROBE = """
import sys
import numpy, onnxruntime
provider, device, graph = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(
    bytes.fromhex(graph), options, providers=[provider], provider_options=[{"device_id": device}]
)
if session.get_providers()[0] != provider:
    sys.exit(f"the session runs on {session.get_providers()[0]}")
if session.run(None, {"x": numpy.array([-1, 2], "float32")})[0].tolist() != [0, 2]:
    sys.exit("max(x, 0) is wrong")
"""


@cache
def probe(provider: str, index: int) -> str | None:
    """None where the provider loads and computes on device `index`, else why it does not; seconds, once a process."""
    command = [sys.executable, "-c", PROBE, provider, str(index), GRAPH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it does not answer within {PROBE_S:g} s"
    if done.returncode < 0:
        return f"it ends its process by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    return None


def options_of(
    provider: str, coder: Coder, plan: Plan, graph: str, folder: Path, device: torch.device
) -> dict[str, str]:
    """Of a session of one graph of the artifact in `folder`."""
    if device.type == "cpu":
        return {}
    told = {"device_id": str(device.index or 0)}
    if provider == CUDA:
        return told | {"use_tf32": str(int(TF32))}
    prefix = PREFIX[provider]
    told[f"{prefix}_max_workspace_size"] = str(WORKSPACE_BYTES)
    shapes = profile_of(coder, graph, *extents(coder, plan))
    for index, name in enumerate(("min", "opt", "max")):
        listed = (f"{value}:{'x'.join(map(str, extent[index]))}" for value, extent in shapes.items())
        told[f"{prefix}_profile_{name}_shapes"] = ",".join(listed)
    engines = _engines(provider, told, graph, folder, device)
    if provider == RTX:
        return told | ({"nv_runtime_cache_path": str(engines)} if engines else {})
    told["trt_fp16_enable"] = str(plan.dtype == "fp16")
    if engines:
        told |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(engines)}
        told |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": str(engines)}
    return told


def _engines(provider: str, told: Mapping[str, str], graph: str, folder: Path, device: torch.device) -> Path | None:
    """Where the provider keeps what it compiles: a folder a graph, artifact, device and version.

    It names its files after the graph's structure alone: two models in one folder get each other's engines (onnxruntime
    issue 6455). None where the artifact lies in a folder that is only read: then every start compiles.
    """
    known = [provider, told, machine_name(device), versions_of(*PACKAGES)]
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / "engines" / f"{graph}-{name}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("%s compiles anew at each start: %s cannot be written to (%s)", provider, folder, error.strerror)
        return None
    return path
