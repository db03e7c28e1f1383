"""What the kernels find on this machine: the GPU, versions, and what serves each operation, with the reason."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import backends, toolchain
from .attention_backends import USUAL
from .backends import CHOICES, Backends, Choice

# The operations of one kernel each: Triton's where it works, torch's elsewhere.
OPERATIONS = (
    *("patch_embed", "unpatchify", "adaln", "gated_residual", "rms_norm", "qk_norm_rope", "solver_step"),
    *("quantize_rows", "attention_sparse"),
)
# Calls that may be served by others than the operation's usual ones.
CALLS = {
    "attention_biased": USUAL._replace(biased=True),  # to texts
    "attention_ragged": USUAL._replace(kind="ragged"),  # of many short clips
}
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Report:
    """Of one device."""

    gpu: str | None
    capability: str | None  # "sm_90"
    driver: str | None
    versions: dict[str, str | None]  # None: not installed
    operations: dict[str, Choice]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        gpu = f"{self.gpu} ({self.capability})" if self.gpu else "none that torch can use"
        facts = {"GPU": gpu, "driver": self.driver or "none", **self.versions}
        listed = [f"{name:16s}{value or 'not installed'}" for name, value in facts.items()]
        return [*listed, "", *(f"{op:18s}{choice.name:12s}{choice.reason}" for op, choice in self.operations.items())]


def examine(asked: Backends) -> Report:
    """This process's first GPU, with what was asked for."""
    versions = {
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "Triton": getattr(toolchain.triton, "__version__", None),
        "xformers": _version("xformers"),
        "flash-attn 3": _version("flash_attn_3"),
        "SageAttention": _version("sageattention"),
    }
    if not torch.cuda.is_available():
        choice = Choice("torch", "no CUDA device" if torch.version.cuda else "this torch is built without CUDA")
        return Report(None, None, driver(), versions, dict.fromkeys((*CHOICES, *CALLS, *OPERATIONS), choice))
    device = torch.device("cuda", torch.cuda.current_device())
    chosen = {op: asked.choose(op, device) for op in CHOICES}
    chosen |= {words: asked.choose("attention", device, call) for words, call in CALLS.items()}
    fault = backends.fault_of_triton(device)
    rest = Choice("triton", "its only kernel") if fault is None else Choice("torch", fault, fallback=True)
    major, minor = torch.cuda.get_device_capability(device)
    operations = chosen | dict.fromkeys(OPERATIONS, rest)
    return Report(torch.cuda.get_device_name(device), f"sm_{major}{minor}", driver(), versions, operations)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """NVIDIA's, as its module tells it on Linux; None elsewhere or without one."""
    if platform.system() != "Linux" or not DRIVER.exists():
        return None
    words = DRIVER.read_text().partition("Kernel Module")[2].split()
    return next((word for word in words if word[0].isdigit()), None)
