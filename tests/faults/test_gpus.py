"""`skylapse serve --engines 2` on a machine of two GPUs uses both; its start is told in /healthz.

Ray is told of two GPUs that are not there and hands them out all the same; the engines find no CUDA and take the CPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from running import Running, wait_for

TWO_GPUS = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": 2})}


def ready(service: Running) -> list[dict[str, Any]]:
    return [engine for engine in service.engines() if engine["state"] == "ready"]


def test_engines_have_a_gpu_each(tmp_path: Path) -> None:
    service = Running(tmp_path / "service", {"engines": 2, "threads": 1}, TWO_GPUS)
    try:
        service.start()
        engines: list[dict[str, Any]] = wait_for(
            lambda: found if len(found := ready(service)) == 2 else None, 60.0, "two engines that take work"
        )
        assert sorted(engine["gpus"] for engine in engines) == [[0], [1]]
        assert all(engine["ready_s"] >= engine["load_s"] > 0 for engine in engines)
        assert all(engine["warm_up_s"] < 1.0 for engine in engines), "on a CPU there is none"
        log = service.data / "driver.log"
        assert wait_for(
            lambda: "engine ready in" in log.read_text() or None, 20.0, "the line that tells how long it took"
        )
        assert "skylapse_engine_ready_seconds{" in service.client.get("/metrics").text
    finally:
        service.stop()
