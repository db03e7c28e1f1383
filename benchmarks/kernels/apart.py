"""Runs the work in a process of its own: a kernel that hangs or loses the device costs its operation alone."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from ..record import Check, Row, Spread, Strict, from_json

STALL_S = 180.0  # without a line, which compiling the largest block does not take


@dataclass(frozen=True, kw_only=True)
class Begin(Strict):
    """Which operation is next; `ended`: none, and why."""

    begin: str
    ended: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits(Strict):
    limits: dict[str, Spread]


Line = Begin | Limits | Check | Row
LINE: Any = Line  # as pydantic is told of it


def run_apart(
    command: Sequence[str], ops: Sequence[str], limit_s: float, stall_s: float = STALL_S
) -> Iterator[Line | str]:
    """The lines that `command --op A --op B ... --limit S` prints; who dies is started again behind the operation.

    Raises TimeoutError when the time is up.
    """
    left, deadline = list(ops), time.monotonic() + limit_s
    while left:
        at = left[0]
        asked = [word for op in left for word in ("--op", op)]
        with _lines([*command, *asked, "--limit", f"{max(1.0, deadline - time.monotonic()):.0f}"]) as (process, lines):
            while (text := _next(lines, stall_s, process)) is not None:
                begun = _begun(text)
                if begun is not None and begun.ended:
                    raise TimeoutError(begun.begin)
                at = begun.begin if begun is not None else at
                yield text
        if process.returncode == 0:
            return
        how = "hung" if process.returncode == KILLED else f"ended with status {process.returncode}"
        yield Check(op=at, case="all that was left of it", status="failed", reason=f"its process {how}")
        left = left[left.index(at) + 1 :]
        if left and time.monotonic() > deadline:
            raise TimeoutError(f"out of time ({limit_s:g} s) before {left[0]}")


KILLED = -9


@contextmanager
def _lines(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], SimpleQueue[str | None]]]:
    """A process and what it prints; it does not outlive the block."""
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read(stdout: Iterable[str]) -> None:
        for line in stdout:
            lines.put(line)
        lines.put(None)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield process, lines
            process.wait()
        finally:
            process.kill()
            reader.join()


def _next(lines: SimpleQueue[str | None], stall_s: float, process: subprocess.Popen[str]) -> str | None:
    """The next line; None at the end, which one that says nothing for too long is brought to."""
    try:
        return lines.get(timeout=stall_s)
    except Empty:
        process.kill()
        return None


def _begun(text: str) -> Begin | None:
    try:
        return from_json(Begin, text)
    except ValueError:
        return None
