"""Which implementation serves an operation on a device, and why: asked for, the fastest known, or what is left.

An engine owns a `Backends`, so two in one process may differ: `active` hands it to all that is called inside, in that
thread. Nothing here imports torch when it is imported: the settings are checked with it before anything heavy is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# What may be asked for; the last of each needs nothing but torch and serves everything. The rule of each operation is
# in a file of its own: attention_backends.py, linear_backends.py.
CHOICES: dict[str, tuple[str, ...]] = {
    "attention": (
        *("triton", "triton-ws", "triton-int8", "triton-fp8"),
        *("xformers", "flash3", "varlen", "sage", "cudnn", "flash", "sdpa"),
    ),
    "linear": ("scaled_mm", "scaled_mm-fast", "triton", "torch"),  # of quantised weights
}


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason that it was taken."""

    name: str
    reason: str
    fallback: bool = False  # whether it is what was left, and neither asked for nor known to be fast
    lossy: bool = False  # whether results differ from exact ones by more than rounding


@dataclass(frozen=True)
class Rule:
    """How an operation's backends are chosen. A call is whatever the operation's choice depends on; None: the usual."""

    # capability, what was asked for, call, why a backend does not work on the device -> choice
    decide: Callable[[int, str | None, Any, Callable[[str], str | None]], Choice]
    refusal: Callable[[str, int], str | None]  # name, capability -> why it can serve no call on such a device
    trial: Callable[[str, torch.device], str | None]  # why it does not work there; None where it gave the right numbers
    lossy: frozenset[str] = frozenset()  # names


def rule(op: str) -> Rule:
    """The operation's own, from its own file."""
    from . import attention_backends, linear_backends

    return {"attention": attention_backends.RULE, "linear": linear_backends.RULE}[op]


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


class Backends:
    """What was asked for, and what was decided for each device and kind of call."""

    def __init__(self, asked: Mapping[str, str] | None = None) -> None:
        self.asked: Mapping[str, str] = MappingProxyType(dict(asked or {}))
        self._chosen: dict[tuple[str, int, Hashable], Choice] = {}
        self._logged: set[tuple[str, int, str, str]] = set()
        self._lock = Lock()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Operations called inside, in this thread, are served as decided here."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def prepare(self, device: torch.device) -> None:
        """Find out what works on the device, before its first request.

        ValueError says why it cannot run a backend that was asked for.
        """
        from . import toolchain

        if device.type == "cuda" and not toolchain.is_told():
            fault = fault_of_triton(device)
            toolchain.set_fault(device, fault)
            if fault is not None:
                log.warning("kernels on %s: torch (%s)", device, fault)
        for op, name in self.asked.items():
            reason = "it needs a CUDA device" if name != CHOICES[op][-1] else None
            if device.type == "cuda":
                refusal = rule(op).refusal(name, toolchain.capability(device))
                reason = refusal or (None if toolchain.is_told() else rule(op).trial(name, device))
            if reason is not None:
                raise ValueError(f"SKYLAPSE_KERNELS: {op}={name} cannot serve on {device}: {reason}")
        for op in CHOICES if device.type == "cuda" else ():
            self.choose(op, device)

    def choose(self, op: str, device: torch.device, call: Hashable = None) -> Choice:
        """For a CUDA device and a kind of call (None: the usual one); decided and logged once."""
        from . import toolchain

        its, asked = rule(op), self.asked.get(op)
        if toolchain.is_told():
            return its.decide(toolchain.capability(device), asked, call, lambda name: None)
        index = toolchain.index_of(device)
        chosen = self._chosen.get((op, index, call))
        if chosen is None:
            with self._lock:
                capability = toolchain.capability(device)
                chosen = its.decide(capability, asked, call, lambda name: its.trial(name, device))
                self._chosen[op, index, call] = chosen
                if (told := (op, index, chosen.name, chosen.reason)) not in self._logged:
                    self._logged.add(told)
                    level = logging.WARNING if chosen.fallback else logging.INFO
                    log.log(level, "%s on %s: %s (%s)", op, device, chosen.name, chosen.reason)
        return chosen

    def lossy(self, device: torch.device) -> tuple[str, ...]:
        """What was asked for and makes results on it differ by more than rounding, as words: ("attention=sage",)."""
        asked = self.asked.items() if device.type == "cuda" else ()  # elsewhere torch serves everything
        return tuple(f"{op}={name}" for op, name in asked if name in rule(op).lossy)


_active: ContextVar[Backends | None] = ContextVar("backends", default=None)
_DEFAULT = Backends()


def current() -> Backends:
    """Those that are active in this thread; where no engine is at work, those of which nothing was asked."""
    return _active.get() or _DEFAULT


@lru_cache(maxsize=8)
def fault_of_triton(device: torch.device) -> str | None:
    """Why a kernel cannot be compiled and run on the device; None where one was.

    Triton can be installed and yet fail at the first launch: no C compiler for its stub, a driver too old.
    """
    from . import attention_backends, toolchain

    if toolchain.triton is None:
        return f"Triton cannot be imported: {toolchain.MISSING}"
    if (number := toolchain.capability(device)) < 80:
        return f"kernels need sm_80 or newer, this is sm_{number}"
    fault = attention_backends.try_out("triton", device)
    return fault and f"Triton is broken: {fault}"


def tell_once(message: str) -> None:
    """Of another path that was taken, and why."""
    if message not in _told:
        _told.add(message)
        log.warning(message)


_told: set[str] = set()
