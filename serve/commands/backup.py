"""A store's backup: one file with the database as it was at one moment, and the files of unfinished jobs if asked.

It is a tar: `manifest.json`, `database`, `artifacts/KEY`. The database is SQLite's own format, or pg_dump's; each is
taken while the service runs, and put back in one transaction.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from ... import __version__
from ..jobs.artifacts import KEY, ArtifactStore
from ..jobs.job_request import input_key
from ..store.database import Database
from ..store.tables import IN_PROGRESS, QUEUED, api_keys, jobs, processes, versions
from . import postgres_dump

FORMAT = 1
COPY_BYTES = 1 << 20
UNFINISHED = jobs.c.state.in_((QUEUED, IN_PROGRESS))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of a backup. database_bytes, sha256: of `database`; artifacts: whether files were asked for."""

    format: int
    kind: str
    release: str
    schema_version: int
    created_at: int
    jobs: int
    unfinished: int
    artifacts: bool
    database_bytes: int
    sha256: str


def back_up(
    database: Database, artifacts: ArtifactStore | None, target: Path, replace: bool = False
) -> tuple[Manifest, int]:
    """Write a backup to a new file; return its manifest, and its number of job files. artifacts: their store, or None.

    Raises FileExistsError, unless `replace`. The file appears once it is whole, and for its owner alone.
    """
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=target.absolute().parent) as folder:  # mode 700
        dump, part = Path(folder, "database"), Path(folder, "backup")
        with _snapshot(database, dump) as connection:
            found = connection.execute(select(jobs.c.id, jobs.c.checkpoint, jobs.c.request).where(UNFINISHED)).all()
            manifest = Manifest(
                format=FORMAT,
                kind=_kind(database),
                release=__version__,
                schema_version=connection.scalar(select(func.max(versions.c.version))) or 0,
                created_at=int(time.time()),
                jobs=connection.scalar(select(func.count()).select_from(jobs)) or 0,
                unfinished=len(found),
                artifacts=artifacts is not None,
                database_bytes=dump.stat().st_size,
                sha256=_sha256(dump),
            )
        with part.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                _add(tar, "manifest.json", io.BytesIO(json.dumps(asdict(manifest)).encode()))
                with dump.open("rb") as source:
                    _add(tar, "database", source)
                num_files = 0
                if artifacts is not None:
                    num_files = sum(_add_files(tar, artifacts, row) for row in found)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o600)
        os.replace(part, target) if replace else os.link(part, target)  # which is over no file that has come meanwhile
    return manifest, num_files


def verify(source: Path, kind: str) -> Manifest:
    """Read a backup to its end. Raises ValueError for a broken one, another kind of store, or a later format."""
    try:
        with tarfile.open(source, "r:") as tar:
            members = list(tar)
            names = [member.name for member in members]
            if names[:2] != ["manifest.json", "database"] or not all(member.isfile() for member in members):
                raise ValueError(f"{source} is no backup of a store")
            if strangers := [name for name in names[2:] if _key_of(name) is None]:
                raise ValueError(f"{source} holds {strangers[0][:80]!r}, which is no part of a backup")
            manifest = _manifest(tar, source)
            file = tar.extractfile("database")
            assert file is not None
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:  # type: ignore[arg-type]
                raise ValueError(f"{source} is broken: its database is not the one that was backed up")
    except tarfile.TarError as error:
        raise ValueError(f"{source} is no backup of a store, or a broken one: {error}") from None
    if manifest.kind != kind:
        raise ValueError(f"{source} is of a {manifest.kind} store, and this one is {kind}")
    return manifest


def restore(database: Database, artifacts: ArtifactStore, source: Path) -> dict[str, int]:
    """Replace the store by a backup; return the numbers of jobs, of files, and of checkpoints that are missing.

    Raises ValueError as `verify` does. Until the database's own transaction at the end, nothing of the old store has
    changed.
    """
    manifest = verify(source, _kind(database))
    num_files = 0
    with tempfile.TemporaryDirectory(prefix="skylapse-restore-") as folder, tarfile.open(source, "r:") as tar:
        dump = Path(folder, "database")
        for member in tar:
            file, key = tar.extractfile(member), _key_of(member.name)
            assert file is not None
            if member.name == "database":
                with dump.open("wb") as saved:
                    saved.writelines(_pieces(file))
            elif key is not None:
                artifacts.write(key, _pieces(file), replace=True)
                num_files += 1
        if database.is_sqlite:
            _load_sqlite(database, dump)
        else:
            postgres_dump.load(database.url, dump)
    database.migrate()
    lost = _settle(database, artifacts)
    return {"jobs": manifest.jobs, "files": num_files, "checkpoints_missing": lost}


def is_empty(database: Database) -> bool:
    """Return whether the store is empty: it has no job and no key."""
    with database.read() as connection:
        return not any(connection.scalar(select(table.c.id).limit(1)) for table in (jobs, api_keys))


# ---------------------------------------------------------------------------------------------------------- databases


@contextmanager
def _snapshot(database: Database, target: Path) -> Iterator[Connection]:
    """Write the database as it is now, and yield a connection that sees the same."""
    if not database.is_sqlite:
        with postgres_dump.snapshot(database, target) as connection:
            yield connection
        return
    path = database.engine.url.database
    source = f"{Path(str(path)).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(source, uri=True)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)  # in one go: pages at a time begin again with each write of the service
        new.execute("pragma journal_mode = delete")  # one file, without a log beside it
    copy = Database(f"sqlite:///{target}")
    try:
        with copy.read() as connection:
            yield connection
    finally:
        copy.close()


def _load_sqlite(database: Database, dump: Path) -> None:
    """Load the dump in one transaction: other users of the file see the old store, then the new one."""
    path = database.engine.url.database
    database.close()
    with closing(sqlite3.connect(dump)) as new, closing(sqlite3.connect(str(path), timeout=30)) as old:
        new.backup(old)


def _settle(database: Database, artifacts: ArtifactStore) -> int:
    """Give back the jobs that were in progress, and forget checkpoints whose files were not in the backup."""
    with database.write() as connection:
        connection.execute(delete(processes))
        given_back: dict[str, Any] = dict(state=QUEUED, owner=None, lease_until=None, stage=None)
        given_back |= dict(epoch=jobs.c.epoch + 1, version=jobs.c.version + 1)
        connection.execute(update(jobs).where(jobs.c.state == IN_PROGRESS).values(**given_back))
        rows = connection.execute(
            select(jobs.c.id, jobs.c.checkpoint).where(UNFINISHED, jobs.c.checkpoint.is_not(None))
        )
        lost = [row.id for row in rows if not artifacts.keys(row.checkpoint)]
        for job_id in lost:
            values = dict(checkpoint=None, checkpoint_step=0, resumed_from_step=None)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
    return len(lost)


# -------------------------------------------------------------------------------------------------------------- files


def _add_files(tar: tarfile.TarFile, artifacts: ArtifactStore, row: Any) -> int:
    """Add the files that an unfinished job needs to go on: those that it shows the model, and its newest checkpoint."""
    keys = [input_key(row.id, name) for name in row.request.get("inputs", ())]
    keys += artifacts.keys(row.checkpoint) if row.checkpoint else []
    added = 0
    for key in keys:
        with tempfile.TemporaryFile() as file, suppress(FileNotFoundError):  # the job has gone on since, or ended
            for piece in artifacts.read(key):
                file.write(piece)
            file.seek(0)
            _add(tar, f"artifacts/{key}", file)
            added += 1
    return added


def _add(tar: tarfile.TarFile, name: str, file: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = file.seek(0, os.SEEK_END), int(time.time()), 0o600
    file.seek(0)
    tar.addfile(info, file)


def _manifest(tar: tarfile.TarFile, source: Path) -> Manifest:
    file = tar.extractfile("manifest.json")
    assert file is not None
    try:
        fields = json.load(file)
        if fields["format"] == FORMAT:
            return Manifest(**fields)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{source} is no backup of a store") from None
    raise ValueError(f"{source} has the backup format {fields['format']!r}, and this release reads {FORMAT}")


def _key_of(name: str) -> str | None:
    """Return the artifact's key of a member; None for another member."""
    key = name.removeprefix("artifacts/")
    return key if key != name and KEY.fullmatch(key) else None


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(COPY_BYTES):
        yield piece


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(database: Database) -> str:
    return "sqlite" if database.is_sqlite else "postgresql"
