"""Which implementation serves an operation on a device, and why: asked for, the default, or what is left.

Nothing here imports torch when it is imported: the settings are checked with it before anything heavy is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# What may be asked for; the last of each needs nothing but torch and serves everything.
CHOICES = {
    "attention": ("triton", "triton-ws", "triton-int8", "triton-fp8", "xformers", "flash3", "cudnn", "flash", "sdpa"),
    "linear": ("scaled_mm", "scaled_mm-fast", "triton", "torch"),  # of quantised weights; linear_backends.py decides
}
NEEDS = {"xformers": "xformers.ops", "flash3": "flash_attn_interface"}

# By architecture, from measurements on such a device; without one it is our own kernels, and the reason says so.
MEASURED: dict[str, dict[int, str]] = {"attention": {}}


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason that it was taken."""

    name: str
    reason: str
    fallback: bool = False  # whether another was meant


_asked: dict[str, str] = {}
_chosen: dict[tuple[str, int], Choice] = {}
_told: set[str] = set()


def parse(text: str) -> dict[str, str]:
    """ "attention=sdpa,..." -> {"attention": "sdpa"}; ValueError says what is allowed."""
    asked = {}
    for part in text.split(","):
        op, _, name = (word.strip() for word in part.partition("="))
        if name not in CHOICES.get(op, ()):
            allowed = "; ".join(f"{op}={'|'.join(names)}" for op, names in CHOICES.items())
            raise ValueError(f"must be like {allowed}, got {text!r}")
        asked[op] = name
    return asked


def select(asked: Mapping[str, str]) -> None:
    """What the operator asks for, from here on in this process."""
    if dict(asked) != _asked:
        _asked.clear()
        _asked.update(asked)
        _chosen.clear()


def prepare(device: torch.device) -> None:
    """Decide everything for a CUDA device before its first request, and leave all to torch where Triton fails."""
    from . import toolchain

    toolchain.broken = fault_of_triton(device)
    if toolchain.broken is not None:
        log.warning("kernels on %s: torch (%s)", device, toolchain.broken)
    for op in CHOICES:
        choose(op, device)


def choose(op: str, device: torch.device) -> Choice:
    """For a CUDA device; decided and logged once."""
    import torch

    from . import linear_backends, toolchain

    if op == "linear":
        return linear_backends.choose(device, _asked.get(op))
    if toolchain.is_told():
        return decide(op, toolchain.capability(device), lambda: None)
    key = op, torch.cuda.current_device() if device.index is None else device.index
    if key not in _chosen:
        _chosen[key] = decide(op, toolchain.capability(device), lambda: fault_of_triton(device))
        level = logging.WARNING if _chosen[key].fallback else logging.INFO
        log.log(level, "%s on %s: %s (%s)", op, device, _chosen[key].name, _chosen[key].reason)
    return _chosen[key]


def decide(op: str, capability: int, fault: Callable[[], str | None]) -> Choice:
    """The rule; `fault` tells why Triton does not work on the device, and is asked only where it matters."""
    last = CHOICES[op][-1]
    name, reason = MEASURED[op].get(capability), "the fastest of those measured on this architecture"
    if name is None:
        name, reason = "triton", f"the default: sm_{capability} has not been measured"
    if op in _asked:
        name, reason = _asked[op], "asked for"
    missing = None
    if name in NEEDS and not _importable(NEEDS[name]):
        missing = f"{NEEDS[name].partition('.')[0]} is not installed"
    elif name == "triton-ws" and capability // 10 not in (9, 10):
        missing = f"needs sm_90 or sm_100, this is sm_{capability}"
    elif name == "triton-fp8" and capability < 89:
        missing = f"needs sm_89 or newer, this is sm_{capability}"
    elif name in ("cudnn", "flash"):
        missing = _fault_of_torch(name, capability)
    elif name.startswith("triton"):
        missing = fault()
    if missing is None:
        return Choice(name, reason)
    return Choice(last, f"{name} ({reason}) cannot serve: {missing}", fallback=True)


@lru_cache(maxsize=8)
def fault_of_triton(device: torch.device) -> str | None:
    """Why a kernel cannot be compiled and run on the device; None where one was.

    Triton can be installed and yet fail at the first launch: no C compiler for its stub, a driver too old.
    """
    import torch

    from . import toolchain

    if toolchain.triton is None:
        return f"Triton cannot be imported: {toolchain.MISSING}"
    try:
        from .attention import plain
        from .attention_kernels import launch

        if (number := toolchain.capability(device)) < 80:
            return f"kernels need sm_80 or newer, this is sm_{number}"
        # Lengths about and beyond a tile, at Wan's head size; numbers of a generator of its own.
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, 303, 2, 128, generator=generator).to(device, torch.bfloat16)
        layout = (q, k, v, (0, 3, 203, 303), (0, 3, 203, 303), None)
        pairs = zip(launch(*layout, True), plain(*layout), strict=True)
        wrong = any(bool(((one - other).abs() > 5e-2).any()) for one, other in pairs)
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"Triton is broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "Triton is broken: a kernel computed nonsense" if wrong else None


def _fault_of_torch(name: str, capability: int) -> str | None:
    """Why torch cannot use this kernel of its own on such a device; what single tensors lack is asked at each call."""
    import torch

    if capability < 80:
        return f"needs sm_80 or newer, this is sm_{capability}"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    return None if torch.backends.cuda.is_flash_attention_available() else "this torch is built without it"


def tell_once(message: str) -> None:
    """Of another path that was taken, and why."""
    if message not in _told:
        _told.add(message)
        log.warning(message)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
