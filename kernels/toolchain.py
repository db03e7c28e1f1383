"""Triton where it can be imported, the decision to launch a kernel, and the list of what is shipped.

Without Triton (macOS, a broken installation) the kernels' files still import: `jit` then leaves functions as they are,
and nothing launches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
MISSING: str | None = None  # why there is no Triton, for whoever reports it
try:
    import triton as _triton
    import triton.language as _language

    triton, tl = _triton, _language
except ImportError as error:
    MISSING = str(error)

ARCHITECTURES = (80, 89, 90, 100, 120)

_faults: dict[int, str] = {}  # CUDA device -> why kernels cannot run on it though Triton imports
_told: ContextVar[int | None] = ContextVar("told_capability", default=None)


@contextmanager
def told_capability(number: int) -> Iterator[None]:
    """Let CUDA tensors count as a device of this compute capability (90 for sm_90) with working kernels.

    For fake tensors, which need no device: what runs inside takes the paths of that architecture, on any machine.
    """
    token = _told.set(number)
    try:
        yield
    finally:
        _told.reset(token)


def is_told() -> bool:
    """Whether `told_capability` is in force."""
    return _told.get() is not None


def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device as one number (90 for sm_90), or the one that was told."""
    told = _told.get()
    if told is not None:
        return told
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def index_of(device: torch.device) -> int:
    """A CUDA device's number; without one it is the current device's."""
    return torch.cuda.current_device() if device.index is None else device.index


def set_fault(device: torch.device, reason: str | None) -> None:
    """Say why kernels cannot run on a CUDA device, or that they can."""
    if reason is None:
        _faults.pop(index_of(device), None)
    else:
        _faults[index_of(device)] = reason


def fault(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA device, as `backends` found out; None where nothing is known against it."""
    return _faults.get(index_of(device)) if _faults else None


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """triton.jit, or the function itself."""
    if function is None:
        return lambda function: jit(function, **options)
    return function if triton is None else triton.jit(function, **options)


def launches(x: Tensor) -> bool:
    """Whether a kernel serves: on CUDA, with Triton, where no gradient is asked for (kernels have no backward)."""
    if not x.is_cuda or (torch.is_grad_enabled() and x.requires_grad):
        return False  # before anything else is asked: dynamo breaks its graph where a context variable is read
    return (triton is not None and fault(x.device) is None) or is_told()


def next_power_of_2(n: int) -> int:
    """A tile's side must be one."""
    return 1 << (n - 1).bit_length()


def check_floats(**tensors: Tensor) -> None:
    """One error for a dtype, layout or device that no kernel here reads; rows may be strided, their elements not."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
        if tensor.dim() and tensor.shape[0] >= 2**31:  # rows are counted in 32 bits, their elements in 64
            raise ValueError(f"{name} must have fewer than 2^31 rows, got {tensor.shape[0]}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the others are, got {tensor.device}")


@dataclass(frozen=True)
class Shipped:
    """One configuration of a kernel as its launcher launches it, so that it can be compiled without a GPU."""

    op: str
    configuration: str
    kernel: Any
    types: Mapping[str, str]  # of arguments that are no constants: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # registers a thread may have at most; None: what the compiler takes
    multiplies: bool = False  # whether matrix instructions are demanded
    architectures: tuple[int, ...] = field(default=ARCHITECTURES)
