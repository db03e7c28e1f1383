"""An engine that an operator drains begins nothing more, and the others do all the work; a real service."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from running import Running, wait_for

LONG = dict(size="64x64", seconds="4", num_inference_steps=60)
SMALL = dict(size="64x64", num_frames=5, num_inference_steps=3)


@pytest.fixture
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("drained"), {"engines": 2, "engine_slots": 2, "threads": 1})
    try:
        running.start()
        wait_for(lambda: len(running.engines()) == 2, 120.0, "both engines")
        yield running
    finally:
        running.stop()


def operator_of(service: Running) -> httpx.Client:
    """Return a client of the operator, by a key that `skylapse keys` makes beside the service."""
    command = (sys.executable, "-m", "skylapse", "keys", "create", "--scope", "operator", "--json")
    made = subprocess.run((*command, "--data", str(service.data)), check=True, capture_output=True, text=True)
    headers = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
    return httpx.Client(base_url=service.url, headers=headers, timeout=20.0, trust_env=False)


def test_a_drained_engine_gives_back_its_jobs_and_takes_no_more(two_engines: Running) -> None:
    service = two_engines
    with operator_of(service) as operator:

        def engine(wanted: str | None = None, **facts: Any) -> dict[str, Any] | None:
            found = operator.get("/v1/admin/engines").json()["data"]
            fits = [e for e in found if wanted in (None, e["id"]) and all(e[n] == v for n, v in facts.items())]
            return fits[0] if fits else None

        long = [service.create(seed=seed, **LONG)["id"] for seed in range(4)]
        busy = wait_for(lambda: engine(running=2), 60.0, "an engine to work")
        assert operator.post(f"/v1/admin/engines/{busy['id']}/drain").json()["state"] == "draining"
        wait_for(lambda: engine(busy["id"], running=0), 60.0, "the engine to be idle")
        small = [service.create(seed=seed, **SMALL)["id"] for seed in range(6)]
        videos = service.ended([*long, *small], within_s=240.0)
        assert {video["status"] for video in videos} == {"completed"}
        drained = engine(busy["id"])
        assert drained is not None and (drained["state"], drained["running"]) == ("draining", 0)
        assert drained["facts"]["draining"] is True
