"""An engine whose GPU reports a fault gives its jobs back, tells why, and is replaced; another one ends them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from running import Running, wait_for

SCRIPT = str(Path(__file__).with_name("sick.py"))
TESTS = str(Path(__file__).parents[1])


def test_jobs_of_a_sick_gpu_go_on_on_the_engine_that_takes_its_place(tmp_path: Path) -> None:
    xids = tmp_path / "xids"
    paths = os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"SKYLAPSE_TEST_XIDS": str(xids), "PYTHONPATH": paths}
    service = Running(tmp_path / "data", environment=environment, command=(sys.executable, SCRIPT))
    try:
        service.start()
        (before,) = service.engines()
        jobs = [service.create(num_inference_steps=120, seed=seed)["id"] for seed in range(2)]
        wait_for(lambda: any(service.get(job)["progress"] >= 20 for job in jobs), 90.0, "jobs to be stepping")
        xids.write_text("31")  # an application's: nothing happens
        told = wait_for(lambda: [e for e in service.engines() if e.get("gpu_xids") == [31]], 20.0, "the Xid to be told")
        assert told[0]["state"] == "ready"
        xids.write_text("79")
        sick = wait_for(lambda: [e for e in service.engines() if e["state"] == "sick"], 20.0, "the engine to be sick")
        assert sick[0]["id"] == before["id"] and sick[0]["reason"] == "Xid 79 (GPU has fallen off the bus)"
        videos = service.ended(jobs)
        assert [video["status"] for video in videos] == ["completed", "completed"]
        assert all(video["attempts"] == 0 for video in videos), "it is not the jobs' fault"
        assert any(video["resumed_from_step"] for video in videos)
        after = wait_for(lambda: [e for e in service.engines() if e["id"] != before["id"]], 30.0, "another engine")
        assert after[0]["state"] == "ready"
        metrics = service.client.get("/metrics").text
        assert 'skylapse_sick_engines_total{model="demo"} 1.0' in metrics
    finally:
        service.stop()
