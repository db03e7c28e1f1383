"""Traces one request through the package, in process: a program that prints the files that each phase enters, as JSON.

    python tests/request_trace.py FOLDER

The request is a clip of the embedded model, 64x64x5 in 4 steps, on SQLite and without Ray. Another one goes before it:
work at first use is left out.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = f"{Path(__file__).resolve().parents[1]}/"
BODY = {"prompt": "a red circle", "num_inference_steps": 4, "num_frames": 5, "size": "64x64"}
ENGINE = "skylapse-steps"  # the thread of our own that works for requests; others beat, count and clean
FORWARD = ("kernels/", "runtime/families/wan/denoiser.py")


class Trace:
    """The calls of the package's functions: (thread, file), in the order in which they begin."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] | None = None  # None while nothing is recorded
        self._inside = threading.local()  # .frame: of the kernel or forward pass that this thread is in

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.calls is None or event not in ("call", "return"):
            return
        file = frame.f_code.co_filename
        if not file.startswith(ROOT):
            return
        path = file[len(ROOT) :]
        if path.startswith((".venv/", "tests/")) or frame.f_code.co_name == "<module>":
            return
        inside = getattr(self._inside, "frame", None)
        if event == "call" and inside is None:
            self.calls.append((threading.current_thread().name, path))
            if path.startswith(FORWARD):
                self._inside.frame = frame
        elif event == "return" and inside is frame:
            self._inside.frame = None

    def record(self, work: Callable[[], Any]) -> tuple[Any, list[str]]:
        """Return the result of `work`, and the file of each call that it makes, background threads left out."""
        calls: list[tuple[str, str]] = []
        self.calls = calls
        try:
            result = work()
        finally:
            self.calls = None
        return result, [path for thread, path in calls if thread == ENGINE or not thread.startswith("skylapse-")]


def summary(files: list[str]) -> dict[str, Any]:
    entered = list(dict.fromkeys(files))
    return {"files": entered, "changes": sum(a != b for a, b in pairwise(files))}


def trace_tick(trace: Trace, engine: Any) -> dict[str, Any]:
    """Trace one steady denoising tick: the third of a request's four steps."""
    from skylapse import VideoRequest

    request = VideoRequest(prompt="a red circle", num_inference_steps=8, num_frames=5, width=64, height=64)
    engine.submit(request)
    steps = 0
    while steps < 4:
        steps += sum(type(event).__name__ == "Progress" for event in engine.step())
    _, files = trace.record(engine.step)
    while engine.has_work():
        engine.step()
    return summary([path for path in files if not path.startswith(FORWARD)])


def main(folder: Path) -> dict[str, Any]:
    trace = Trace()
    threading.setprofile(trace)
    from fastapi.testclient import TestClient

    from skylapse import Engine
    from skylapse.serve.core.config import ServeConfig
    from skylapse.serve.engine.measurements import Measures
    from skylapse.serve.engine.worker import Worker
    from skylapse.serve.http.app import create_app
    from skylapse.serve.jobs.services import open_context
    from skylapse.serve.store.leases import Leases

    config = ServeConfig(data=str(folder))
    context = open_context(config)
    config.scratch.mkdir(parents=True, exist_ok=True)
    _, key = context.keys.create("tenant")
    engine = Engine.from_pretrained("demo")
    client = TestClient(create_app(context), headers={"authorization": f"Bearer {key}"})
    worker = Worker(
        engine,
        Leases(context.database, 60.0, config.max_attempts, context.ledger),
        context.artifacts,
        Measures(engine.meter, "demo"),
        scratch=config.scratch,
        stage_deadline_s=60,
        checkpoint_every=10,
    )

    def post() -> str:
        answer = client.post("/v1/videos", json=BODY)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def work() -> None:
        assert asyncio.run(worker.run_next("trace"))

    def get(job: str) -> None:
        answer = client.get(f"/v1/videos/{job}/content")
        assert answer.status_code == 200 and answer.content

    sys.setprofile(trace)
    get_before = post()
    work()
    get(get_before)
    job, posted = trace.record(post)
    _, worked = trace.record(work)
    _, got = trace.record(lambda: get(job))
    tick = trace_tick(trace, engine)
    sys.setprofile(None)
    worker.keeper.close()
    denoiser = max(at for at, path in enumerate(worked) if path.startswith("runtime/families/"))
    decode = max(at for at, path in enumerate(worked) if path.startswith(("runtime/vae/", "kernels/", "compile/")))
    assert denoiser < decode
    return {
        "post": summary(posted),
        "tick": tick,
        "clip": summary(worked[decode + 1 :]),
        "content": summary(got),
        "whole": summary(posted + worked + got),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
