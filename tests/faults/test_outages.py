"""Disk, database and machine fail for a while; what was accepted is completed, and once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from postgres import Postgres, own_postgres
from running import Running, wait_for
from test_kills import check_completed, start_jobs, wait_until_stepping

OUTAGE_S = 10.0
OURS = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
RAYS_OWN = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "RAY_JOB_CONFIG_JSON_ENV_VAR")  # of a worker


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data folder whose artifacts lie on a disk of 8 MiB."""
    data = tmp_path / "data"
    artifacts = data / "artifacts"
    artifacts.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(artifacts)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield data
    subprocess.run(["umount", "-l", str(artifacts)], check=True)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with own_postgres() as server:
        yield server


def test_a_full_disk_delays_jobs_and_fails_none(small_disk: Path) -> None:
    service = Running(small_disk)
    try:
        service.start()
        filler = small_disk / "artifacts" / "filler"
        jobs = start_jobs(service)
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        time.sleep(OUTAGE_S)
        assert not any(service.get(job)["status"] == "completed" for job in jobs), "the disk was not full"
        filler.unlink()
        check_completed(service, service.ended(jobs))
    finally:
        service.stop()


def test_a_database_that_is_away_is_a_503_and_costs_no_job(postgres: Postgres, tmp_path: Path) -> None:
    service = Running(tmp_path / "data", environment={"SKYLAPSE_DATABASE_URL": postgres.url})
    try:
        service.start()
        jobs = start_jobs(service)
        wait_until_stepping(service, jobs)
        postgres.stop()
        until_s = time.monotonic() + OUTAGE_S
        answers = []
        while time.monotonic() < until_s:
            answers.append(service.client.post("/v1/videos", json={"prompt": "a star"}, timeout=30.0))
            time.sleep(0.5)
        assert {answer.status_code for answer in answers} == {503}
        assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in answers)
        assert answers[0].json()["error"]["code"] == "store_unavailable"
        postgres.start()
        check_completed(service, service.ended(jobs))
        check_completed(service, service.ended(start_jobs(service, 1)))
    finally:
        service.stop()


def test_after_a_loss_of_power_the_next_start_completes_what_was_accepted(tmp_path: Path) -> None:
    service = Running(tmp_path / "data")
    try:
        service.start()
        jobs = start_jobs(service, 4)
        wait_until_stepping(service, jobs, 30)
        before = {job: service.get(job)["progress"] for job in jobs}
        service.kill_driver()
        with pytest.raises(httpx.HTTPError):
            service.client.get("/healthz")
        service.start()
        assert all(service.get(job)["progress"] >= before[job] for job in jobs)
        videos = service.ended(jobs)
        check_completed(service, videos)
        assert any(video["resumed_from_step"] for video in videos)
    finally:
        service.stop()


def test_a_zombie_changes_nothing_that_was_finished_without_it(tmp_path: Path) -> None:
    """One of two engines is stopped like a machine that swaps; its job is finished by the other; then it wakes."""
    service = Running(tmp_path / "data", {"engines": 2})
    try:
        service.start()
        wait_for(lambda: len(service.engines()) == 2, 60.0, "two engines")
        # soon done: Serve ends who does not answer for half a minute
        jobs = start_jobs(service, 2, steps=40, seconds="4")
        wait_until_stepping(service, jobs, 10)
        zombie = service.pids("engine")[0]
        os.kill(zombie, signal.SIGSTOP)
        videos = service.ended(jobs)
        check_completed(service, videos, num_frames=32)
        contents = [service.content(job) for job in jobs]
        os.kill(zombie, signal.SIGCONT)
        wait_for(
            lambda: all(e["running"] == 0 for e in service.engines()),
            60.0,
            "all to rest",
        )
        assert [service.content(job) for job in jobs] == contents
        assert [service.get(job) for job in jobs] == videos
    finally:
        service.stop()


def test_a_redeployment_lets_running_jobs_end(tmp_path: Path) -> None:
    """The application is run again with another setting, by a second driver, as `serve deploy` does it."""
    service = Running(tmp_path / "data")
    try:
        service.start()
        jobs = start_jobs(service, 3, seconds="4")
        wait_until_stepping(service, jobs, 10)
        script = REDEPLOY.format(arguments={"data": str(service.data), "engine_slots": 4}, address=service.gcs_address)
        told = OURS | {name: text for name, text in service.ray_variables.items() if name not in RAYS_OWN}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, cwd=tmp_path, env=told
        )
        assert done.returncode == 0, done.stderr[-3000:]
        videos = service.ended(jobs, within_s=240.0)
        check_completed(service, videos, num_frames=32)
        assert all(video["attempts"] == 0 for video in videos)
        engines: list[dict[str, Any]] = wait_for(
            lambda: [e for e in service.engines() if e["slots"] == 4],
            60.0,
            "the new one",
        )
        assert len(engines) == 1
        check_completed(service, service.ended(start_jobs(service, 1)))
    finally:
        service.stop()


REDEPLOY = """
import ray
from ray import serve
from skylapse.serve.app import build

ray.init(address="{address}", log_to_driver=False)
serve.run(build({arguments!r}), name="skylapse", route_prefix="/", blocking=False)
"""
