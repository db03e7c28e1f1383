"""Gives freed memory back to the system.

glibc keeps the memory of large bodies: an ingress that had answered 254 bad requests was 180 MiB larger than before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import lru_cache

EVERY_S = 1.0  # a walk through the heap takes a millisecond or more, and requests come by the hundred
_trimmed_s = float("-inf")


def trim() -> None:
    """Give memory back, at most once in EVERY_S seconds; nothing happens if the C library has no such call."""
    global _trimmed_s
    if (now_s := time.monotonic()) - _trimmed_s >= EVERY_S:
        _trimmed_s = now_s
        _call()(0)


@lru_cache(maxsize=1)
def _call() -> Callable[[int], int]:
    try:
        call: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return lambda _: 0
    return call
