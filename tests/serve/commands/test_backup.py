"""A store's backup holds what there was at one moment, and gives it back whole or not at all; SQLite and Postgres."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from skylapse.serve.accounts.keys import KeyStore
from skylapse.serve.accounts.tenants import TenantStore
from skylapse.serve.commands.backup import back_up, restore, verify
from skylapse.serve.commands.store_check import check
from skylapse.serve.jobs.artifacts import ArtifactStore
from skylapse.serve.store.audit import Actor, Audit
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import JobStore
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.processes import ENGINE, Processes
from skylapse.serve.store.tables import api_keys, audit, jobs, metadata, tenants


@pytest.fixture
def files(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(str(tmp_path / "artifacts"))
    store.prepare()
    return store


@pytest.fixture
def fill(database: Database, files: ArtifactStore) -> Callable[[], dict[str, str]]:
    """Fills the store with one job of each kind; returns their ids."""

    def fill() -> dict[str, str]:
        store, leases = JobStore(database), Leases(database)
        ids = {}
        for kind in ("done", "running", "queued"):
            job = store.create("acme", {"prompt": kind, "inputs": ["image.png"]})
            files.write(f"jobs/{job.id}/inputs/image.png", kind.encode())
            ids[kind] = job.id
        (done,) = leases.claim("engine")
        files.write(f"jobs/{done.id}/1/video.mp4", b"frames")
        assert leases.complete(done, {"video": {"key": f"jobs/{done.id}/1/video.mp4"}})
        (running,) = leases.claim("engine")
        files.write(f"jobs/{running.id}/1/checkpoint-5/index.json", b"{}")
        assert leases.checkpoint(running, f"jobs/{running.id}/1/checkpoint-5", 5)
        TenantStore(database).change("acme", {"quota": 7}, Actor("key_1", "req_1"))
        Processes(database).beat("engine-1", ENGINE, {})
        return ids

    return fill


def rows(database: Database) -> dict[str, list[Any]]:
    """Return all rows that a backup holds, without the live processes."""
    with database.read() as connection:
        tables = [table for table in metadata.sorted_tables if table.name != "processes"]
        return {table.name: sorted(map(repr, connection.execute(select(table)))) for table in tables}


def test_a_store_comes_back_as_it_was(
    database: Database, files: ArtifactStore, fill: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    ids = fill()
    _, text = KeyStore(database).create("acme")
    before = rows(database)
    manifest, num_files = back_up(database, files, tmp_path / "backup")
    assert (manifest.jobs, manifest.unfinished, num_files) == (3, 2, 3)
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600
    JobStore(database).delete("acme", ids["queued"])
    KeyStore(database).create("stranger")
    files.remove("jobs")
    restored = restore(database, files, tmp_path / "backup")
    assert restored == {"jobs": 3, "files": 3, "checkpoints_missing": 0}
    after = rows(database)
    assert {name: found for name, found in after.items() if name != "jobs"} == {
        name: found for name, found in before.items() if name != "jobs"
    }
    running = JobStore(database).get("acme", ids["running"])  # no engine of then works on it any more
    assert (running.state, running.owner, running.epoch, running.checkpoint_step) == ("queued", None, 2, 5)
    assert JobStore(database).get("acme", ids["done"]).state == "completed"
    assert KeyStore(database).find(text) and Processes(database).alive(1e9) == []
    assert b"".join(files.read(f"jobs/{ids['queued']}/inputs/image.png")) == b"queued"
    assert {job.id for job in Leases(database).claim("another", 5)} == {ids["running"], ids["queued"]}
    TenantStore(database).change("acme", {"quota": 8}, Actor("key_1"))  # numbers go on behind those of the backup
    assert [row.after for row in Audit(database).page(9)[0]] == [{"quota": 8}, {"quota": 7}]


def test_without_files_a_job_begins_again(
    database: Database, files: ArtifactStore, fill: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    ids = fill()
    assert back_up(database, None, tmp_path / "backup")[1] == 0
    files.remove("jobs")
    assert restore(database, files, tmp_path / "backup")["checkpoints_missing"] == 1
    running = JobStore(database).get("acme", ids["running"])
    assert (running.checkpoint, running.checkpoint_step) == (None, 0)
    missing = check(database, files).missing
    assert {f"jobs/{ids[kind]}/inputs/image.png" for kind in ("running", "queued")} < set(missing)


def test_a_backup_is_taken_while_the_service_writes(database: Database, files: ArtifactStore, tmp_path: Path) -> None:
    """Each transaction is in it whole or not at all."""
    stop = threading.Event()
    made: list[str] = []

    def write() -> None:
        store = TenantStore(database)
        while not stop.is_set():
            number = len(made)
            store.change(f"tenant-{number}", {"quota": number + 1}, Actor("key_1"))
            made.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(made) < 5:
            assert writer.is_alive()
        back_up(database, files, tmp_path / "backup")
        count = len(made)
    finally:
        stop.set()
        writer.join()
    restore(database, files, tmp_path / "backup")
    with database.read() as connection:
        names = set(connection.scalars(select(tenants.c.name)))
        assert names == set(connection.scalars(select(audit.c.target)))
    assert 5 <= len(names) <= count + 1
    assert check(database, files).problems == []


def test_an_existing_file_is_not_overwritten(database: Database, tmp_path: Path) -> None:
    (tmp_path / "backup").write_text("precious")
    with pytest.raises(FileExistsError):
        back_up(database, None, tmp_path / "backup")
    assert (tmp_path / "backup").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".backup")] == []
    back_up(database, None, tmp_path / "backup", replace=True)
    assert verify(tmp_path / "backup", "sqlite" if database.is_sqlite else "postgresql").jobs == 0


# ---------------------------------------------------------------------------------------------------------- bad backups


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Database, Path]]:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    KeyStore(database).create("acme")
    back_up(database, None, tmp_path / "backup")
    yield database, tmp_path / "backup"
    database.close()


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """A tar whose members a function has changed, or left out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            if (changed := change(member.name, file.read())) is not None:
                info = tarfile.TarInfo(changed[0])
                info.size = len(changed[1])
                new.addfile(info, io.BytesIO(changed[1]))
    return target


def manifest_with(**fields: Any) -> Callable[[str, bytes], tuple[str, bytes]]:
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, json.dumps({**json.loads(data), **fields}).encode() if name == "manifest.json" else data

    return change


BROKEN: dict[str, tuple[Callable[[str, bytes], tuple[str, bytes] | None], str]] = {
    "another database": (
        lambda n, d: (n, d if n != "database" else d[:-1] + b"!"),
        "is not the one that was backed up",
    ),
    "no database": (lambda n, d: None if n == "database" else (n, d), "is no backup of a store"),
    "no manifest": (lambda n, d: None if n == "manifest.json" else (n, d), "is no backup of a store"),
    "a later format": (manifest_with(format=2), "has the backup format 2, and this release reads 1"),
    "Postgres": (manifest_with(kind="postgresql"), "is of a postgresql store, and this one is sqlite"),
    "strange facts": (manifest_with(colour="red"), "is no backup of a store"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backup_changes_nothing(name: str, small: tuple[Database, Path], tmp_path: Path) -> None:
    database, source = small
    change, message = BROKEN[name]
    broken = rewritten(source, tmp_path / "broken", change)
    with database.write() as connection:
        connection.execute(update(api_keys).values(name="newer"))
    before = rows(database)
    with pytest.raises(ValueError, match=message):
        restore(database, ArtifactStore(str(tmp_path / "artifacts")), broken)
    assert rows(database) == before and not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("member", ["artifacts/../../escaped", "/etc/passwd", "notes.txt", "artifacts/jobs"])
def test_a_backup_writes_nowhere_else(member: str, small: tuple[Database, Path], tmp_path: Path) -> None:
    database, source = small
    broken = tmp_path / "broken"
    rewritten(source, broken, lambda name, data: (name, data))
    with tarfile.open(broken, "a") as tar:
        tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    with pytest.raises(ValueError, match="which is no part of a backup"):
        restore(database, ArtifactStore(str(tmp_path / "artifacts")), broken)


@pytest.mark.parametrize("size", [0, 100, 600, 5000])
def test_a_backup_that_was_cut_short_is_refused(size: int, small: tuple[Database, Path], tmp_path: Path) -> None:
    database, source = small
    cut = tmp_path / "cut"
    cut.write_bytes(source.read_bytes()[:size])
    with pytest.raises(ValueError, match="is no backup of a store"):
        restore(database, ArtifactStore(str(tmp_path / "artifacts")), cut)


def test_a_backup_of_an_older_release_is_brought_up_to_date(small: tuple[Database, Path], tmp_path: Path) -> None:
    database, _ = small
    with database.write() as connection:
        tenants.drop(connection)
        connection.exec_driver_sql("delete from schema_version where version > 1")
    back_up(database, None, tmp_path / "old")
    database.migrate()
    restore(database, ArtifactStore(str(tmp_path / "artifacts")), tmp_path / "old")
    assert TenantStore(database).get("acme").quota is None
    with database.read() as connection:
        assert connection.scalar(select(jobs.c.id).limit(1)) is None
