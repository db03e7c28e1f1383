"""kill -9 of engines under load: the bill is what engines have worked, no job pays twice, and no counter falls."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Running, wait_for
from sqlalchemy import func, select

from skylapse.serve.store.database import Database
from skylapse.serve.store.tables import ledger

SCRIPT = str(Path(__file__).with_name("clocked.py"))
STEPS = 120
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"size": "64x64", "num_frames": 9},
    {"cache": "high"},
    {"guidance_scale": 1.0},
)


def worked_s(data: Path) -> float:
    """Return the seconds worked by the engines' own clock, the killed ones' too."""
    files = [path.read_bytes() for path in (data / "worked").iterdir()]
    return sum(sum(seconds for (seconds,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])) for data in files)


def counters(service: Running) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(service.client.get("/metrics").text)
    kept = (family for family in families if family.type in ("counter", "histogram"))
    return {(s.name, str(sorted(s.labels.items()))): s.value for family in kept for s in family.samples}


def test_jobs_are_charged_with_what_engines_worked_whoever_is_killed(tmp_path: Path) -> None:
    service = Running(tmp_path / "data", {"max_attempts": 5}, command=(sys.executable, SCRIPT))
    try:
        service.start()
        made = [
            service.create(num_inference_steps=STEPS, seed=seed, **SHAPES[seed % len(SHAPES)])["id"]
            for seed in range(8)
        ]
        seen = counters(service)
        for percent in (20, 55):
            wait_for(lambda p=percent: max(service.get(job)["progress"] for job in made) >= p, 120.0, "jobs to step")  # type: ignore[misc]
            service.kill("engine")
            now = counters(service)
            assert all(now[name] >= value for name, value in seen.items())
            seen = now
        wait_for(lambda: service.get(made[0])["resumed_from_step"], 120.0, "the first job to go on")
        assert service.client.post(f"/v1/videos/{made[0]}/cancel").status_code == 200
        assert service.client.delete(f"/v1/videos/{made[1]}").status_code == 200
        videos = service.ended(made[2:], within_s=300)
        assert all(video["status"] == "completed" for video in videos), videos
        database = Database(f"sqlite:///{tmp_path}/data/jobs.db")
        names = ("engine_seconds", "lost_seconds", "lost_steps", "jobs")
        with database.read() as connection:
            row = connection.execute(select(*(func.sum(ledger.c[name]) for name in names))).one()
        database.close()
        charged_s, lost_s, lost_steps, jobs = map(float, row)
        time_s = worked_s(tmp_path / "data")
        facts = dict(worked_s=time_s, charged_s=charged_s, lost_s=lost_s, lost_steps=lost_steps)
        print(json.dumps({name: round(value, 3) for name, value in facts.items()}))
        assert charged_s + lost_s == pytest.approx(time_s, rel=0.02)
        assert lost_s > 0 and lost_steps > 0 and jobs == len(made)
        for video in videos:
            usage = video["usage"]
            assert usage["steps_computed"] + usage["steps_skipped"] == STEPS, "no step is charged twice"
        assert sum(video["usage"]["engine_seconds"] for video in videos) <= charged_s
        bill = service.client.get("/v1/usage").json()["data"]
        assert sum(bucket["engine_seconds"] for bucket in bill) == pytest.approx(charged_s, abs=1e-4)
        now = counters(service)
        assert all(now[name] >= value for name, value in seen.items())
        told = sum(value for (name, _), value in now.items() if name == "skylapse_engine_seconds_total")
        assert told == pytest.approx(charged_s, rel=1e-6)
    finally:
        service.stop()
