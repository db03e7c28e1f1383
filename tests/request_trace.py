"""Traces one request through the package, in process: a program that prints the files that each phase enters, as JSON.

    python tests/request_trace.py FOLDER

The request is a clip of the embedded model, 64x64x5 in 4 steps, on SQLite and without Ray. Another one goes before it, so
that whatever is imported, compiled or measured at first use is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
BODY = {"prompt": "a red circle", "num_inference_steps": 4, "num_frames": 5, "size": "64x64"}
BACKGROUND = ("skylapse-",)  # threads that work for no request: heartbeats, health, counters
FORWARD = ("kernels/", "runtime/families/wan/denoiser.py")


class Trace:
    """The calls of functions of the package, in the order in which they begin."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] | None = None  # (thread, file); None while nothing is traced

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if self.calls is None or event != "call" or not file.startswith(ROOT) or frame.f_code.co_name == "<module>":
            return
        path = file[len(ROOT) + 1 :]
        if not path.startswith((".venv/", "tests/")) and "<" not in path:
            self.calls.append((threading.current_thread().name, path))

    def record(self, work: Callable[[], Any]) -> tuple[Any, list[tuple[str, str]]]:
        """Return what `work` returns, and the calls that it made."""
        self.calls = calls = []
        try:
            return work(), calls
        finally:
            self.calls = None


def main(folder: Path) -> dict[str, Any]:
    trace = Trace()
    threading.setprofile(trace)
    from fastapi.testclient import TestClient

    from skylapse import Engine, VideoRequest
    from skylapse.serve.core.config import ServeConfig

    return {}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
