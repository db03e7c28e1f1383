"""The tests' own service behaves as a service: jobs are done, several ingresses share a store, it stops at once."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from skylapse.runtime.engine.engine import Engine


def test_a_job_of_one_ingress_is_done_and_read_at_another(demo_engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from .service import SMALL, serving

    before = set(threading.enumerate())
    began_s = time.monotonic()
    with serving(tmp_path, demo_engine, ingresses=2, quota=1) as service:
        assert time.monotonic() - began_s < 5
        key = service.key()
        with service.client(key) as client, service.client(key, ingress=1) as other:
            assert client.get("/readyz").status_code == 200
            with service.paused():
                made = client.post("/v1/videos", json=SMALL)
                assert made.status_code == 200, made.text
                assert other.post("/v1/videos", json=SMALL).status_code == 429
                assert other.get(f"/v1/videos/{made.json()['id']}").json()["status"] == "queued"
            video = service.wait(key, made.json()["id"], ingress=1)
            assert (video["status"], video["error"]) == ("completed", None)
            assert other.get(f"/v1/videos/{video['id']}/content").content[4:8] == b"ftyp"
            began_s = time.monotonic()
    assert time.monotonic() - began_s < 5
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"skylapse-steps"}  # the shared engine's


def test_a_service_stops_while_a_stream_is_open_and_a_job_runs(demo_engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from .service import SMALL, serving

    with ExitStack() as left_open:
        with serving(tmp_path, demo_engine) as service:
            client = left_open.enter_context(service.client())
            made = client.post("/v1/videos", json=SMALL | {"num_inference_steps": 500}).json()
            stream = left_open.enter_context(client.stream("GET", f"/v1/videos/{made['id']}/events"))
            assert any("video.progress" in line for line in stream.iter_lines())
            began_s = time.monotonic()
        while demo_engine.has_work():  # until the step that ran has ended
            assert time.monotonic() - began_s < 5
            time.sleep(0.01)
