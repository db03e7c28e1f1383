"""The sweep removes files that no job points at, of ended, expired and deleted jobs, and a killed process's files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from skylapse.serve.jobs.garbage_collector import Sweeper, sweep_scratch
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.database import now
from skylapse.serve.store.jobs import Job
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.tables import jobs


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    context = open_context({"data": str(tmp_path), "retention_s": 1000})
    yield context
    context.database.close()


def ended_job(context: Context, ago_s: float) -> Job:
    """A completed job with its video, an input, a preview and a checkpoint."""
    job = context.jobs.create("a", {"prompt": "a star"})
    leases = Leases(context.database)
    (held,) = leases.claim("engine")
    for name in ("inputs/image.png", "1/video.mp4", "1/preview-8.webp", "1/checkpoint-5/state.json"):
        context.artifacts.write(f"jobs/{job.id}/{name}", b"x")
    leases.complete(held, {"video": {"key": f"jobs/{job.id}/1/video.mp4", "num_bytes": 1, "sha256": "s"}})
    with context.database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(ended_at=now() - ago_s))
    return job


def test_of_an_ended_job_its_artifacts_are_left_and_nothing_else(context: Context) -> None:
    old, fresh = ended_job(context, 60), ended_job(context, 1)
    Sweeper(context).sweep()
    assert context.artifacts.keys(f"jobs/{old.id}") == [f"jobs/{old.id}/1/video.mp4"]
    assert len(context.artifacts.keys(f"jobs/{fresh.id}")) == 4, "a zombie may still be writing"


def test_a_failed_job_keeps_what_it_starts_from_until_it_expires(context: Context) -> None:
    job = context.jobs.create("a", {"prompt": "a star", "inputs": ["image.png"]})
    for name in ("inputs/image.png", "1/preview-8.webp", "1/checkpoint-5/state.json"):
        context.artifacts.write(f"jobs/{job.id}/{name}", b"x")
    context.jobs.cancel("a", job.id)
    for ago_s, left in ((60, [f"jobs/{job.id}/inputs/image.png"]), (2000, [])):
        with context.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(ended_at=now() - ago_s))
        Sweeper(context).sweep()
        assert context.artifacts.keys(f"jobs/{job.id}") == left


def test_an_expired_job_is_still_told_of_and_has_no_files(context: Context) -> None:
    job = ended_job(context, 2000)
    sweeper = Sweeper(context)
    for _ in range(2):
        sweeper.sweep()
    assert context.artifacts.keys(f"jobs/{job.id}") == [] and context.jobs.get("a", job.id).has_expired


def test_a_killed_processs_scratch_goes_after_a_day(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * 86400), ("new", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    sweep_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    sweep_scratch(tmp_path / "nowhere")
