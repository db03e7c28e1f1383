"""`store check` finds what is not as it should be, in the tables and among the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from skylapse.serve.commands.store_check import check
from skylapse.serve.jobs.artifacts import ArtifactStore
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.processes import ENGINE, Processes


@pytest.fixture
def files(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


def test_a_sound_store_has_no_problems(database: Database, files: ArtifactStore) -> None:
    assert check(database, files).problems == []
    store, leases = JobStore(database), Leases(database)
    for _ in range(2):
        job = store.create("a", {"inputs": ["image.png"]})
        files.write(f"jobs/{job.id}/inputs/image.png", b"")
    (job,) = leases.claim("engine")
    files.write(f"jobs/{job.id}/1/video.mp4", b"")
    leases.complete(job, {"video": {"key": f"jobs/{job.id}/1/video.mp4"}})
    store.cancel("a", store.create("a", {"inputs": ["image.png"]}).id)  # its files may be gone
    report = check(database, files)
    assert (report.problems, report.integrity, report.jobs, report.files) == ([], "ok", 3, 3)
    assert report.schema_version == report.newest_version


def test_files_that_are_missing_or_nobodys_are_named(database: Database, files: ArtifactStore) -> None:
    store, leases = JobStore(database), Leases(database)
    done, running = (store.create("a", {"inputs": ["image.png"]}) for _ in range(2))
    (claimed,) = leases.claim("engine")
    leases.complete(claimed, {"video": {"key": f"jobs/{done.id}/1/video.mp4"}})
    (claimed,) = leases.claim("engine")
    leases.checkpoint(claimed, f"jobs/{running.id}/1/checkpoint-5", 5)
    stray = "video_" + "0" * 32
    files.write(f"jobs/{stray}/1/video.mp4", b"")
    report = check(database, files)
    assert report.orphaned == [stray]
    keys = {f"jobs/{done.id}/1/video.mp4", f"jobs/{running.id}/inputs/image.png", f"jobs/{running.id}/1/checkpoint-5"}
    assert set(report.missing) == keys
    assert len(report.problems) == 4 and f"the files of {stray} belong to no job" in report.problems
    Processes(database).beat("engine", ENGINE, {})  # a service that runs may be about to write the row
    assert check(database, files).orphaned == []


def test_tables_that_lack_something_are_named(database: Database, files: ArtifactStore) -> None:
    with database.write() as connection:
        connection.execute(text("drop table audit"))
        connection.execute(text("alter table jobs drop column webhook_url"))
    report = check(database, files)
    assert report.problems == ["the column jobs.webhook_url is missing", "the table audit is missing"]


def test_an_older_store_is_no_problem(database: Database, files: ArtifactStore) -> None:
    with database.write() as connection:
        connection.execute(text("drop table audit"))
        connection.execute(text("delete from schema_version where version > 1"))
    report = check(database, files)
    assert report.schema_version == 1 < report.newest_version and report.problems == []
    with database.read() as connection:  # and nothing was brought up to date
        assert connection.scalar(text("select max(version) from schema_version")) == 1


def test_a_damaged_file_is_told(tmp_path: Path, files: ArtifactStore) -> None:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    for number in range(300):
        JobStore(database).create("a", {"prompt": "x" * 2000, "number": number})
    with database.read() as connection:
        connection.execute(text("pragma wal_checkpoint(truncate)"))
    database.close()
    path = tmp_path / "jobs.db"
    data = bytearray(path.read_bytes())
    for start in range(40 * 4096, len(data), 4096):
        data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)
    damaged = Database(f"sqlite:///{path}")
    report = check(damaged, files)
    assert report.integrity != "ok" and report.problems[0].startswith("the database is damaged: ")
    damaged.close()
