"""Checks a store: its tables, its database, and the files of jobs and folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, func, inspect, select, text
from sqlalchemy.exc import DatabaseError

from ..jobs.artifacts import ArtifactStore
from ..jobs.job_request import input_key
from ..store.database import Database
from ..store.migrations import STEPS
from ..store.processes import Processes
from ..store.tables import COMPLETED, FAILED, jobs, metadata, versions

BATCH = 500
WRITING_S = 300.0  # files of a job that is being made are there before its row
IN_USE_S = 10.0


@dataclass
class Report:
    """The result of a check. `problems` has a line for each fault."""

    schema_version: int = 0
    newest_version: int = len(STEPS)
    integrity: str = "ok"
    jobs: int = 0
    files: int = 0
    orphaned: list[str] = field(default_factory=list)  # job folders without a job
    missing: list[str] = field(default_factory=list)  # keys of files that a job points at
    problems: list[str] = field(default_factory=list)


def check(database: Database, artifacts: ArtifactStore) -> Report:
    """Read everything and change nothing; the service may run meanwhile."""
    report = Report()
    try:
        with database.read() as connection:
            report.schema_version = connection.scalar(select(func.max(versions.c.version))) or 0
            report.problems += _lacking(connection, report)
            report.integrity = "; ".join(_integrity(connection, database.is_sqlite)) or "ok"
            report.jobs = connection.scalar(select(func.count()).select_from(jobs)) or 0
        if report.integrity != "ok":
            report.problems.append(f"the database is damaged: {report.integrity}")
        _check_files(database, artifacts, report)
    except DatabaseError as error:
        report.integrity = str(error.orig).strip().partition("\n")[0]
        report.problems.append(f"the database is damaged: {report.integrity}")
    return report


def _lacking(connection: Connection, report: Report) -> Iterator[str]:
    """Yield the missing tables and columns of this release; an older store gets them at the service's next start."""
    if report.schema_version < report.newest_version:
        return
    inspector = inspect(connection)
    for table in metadata.tables.values():
        if not inspector.has_table(table.name):
            yield f"the table {table.name} is missing"
            continue
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for name in sorted({column.name for column in table.columns} - there):
            yield f"the column {table.name}.{name} is missing"


def _integrity(connection: Connection, is_sqlite: bool) -> Iterator[str]:
    """Yield damage to the database: SQLite reports it by itself; of Postgres every row is read."""
    if not is_sqlite:
        for name in set(inspect(connection).get_table_names()) & set(metadata.tables):
            connection.execute(text(f"select sum(length(rows::text)) from {name} rows")).all()
        return
    for row in connection.execute(text("pragma integrity_check(10)")):
        if row[0] != "ok":
            yield str(row[0])
    for row in connection.execute(text("pragma foreign_key_check")):
        yield f"a row of {row[0]} points at no row of {row[2]}"


def _check_files(database: Database, artifacts: ArtifactStore, report: Report) -> None:
    """Check files, rows first: a job made meanwhile has files and is looked up again; a deleted one removes them."""
    jobs_there, wanted = set(), []
    for row in _rows(database):
        jobs_there.add(row.id)
        if needs := _needs(row):
            wanted.append((row.id, row.version, needs))
    keys = set(artifacts.keys("jobs"))
    there = keys | {key.rpartition("/")[0] for key in keys}
    report.files = len(keys)
    is_running = bool(Processes(database).alive(IN_USE_S))
    folders = artifacts.folders("jobs", older_than_s=WRITING_S if is_running else -WRITING_S)
    report.orphaned = [name for name in folders if name not in jobs_there and _version(database, name) is None]
    for job_id, version, needs in wanted:
        lost = [key for key in needs if key not in there]
        if lost and _version(database, job_id) == version:
            report.missing += lost
    report.problems += [f"the files of {job_id} belong to no job" for job_id in report.orphaned]
    report.problems += [f"{key} is missing" for key in report.missing]


def _rows(database: Database) -> Iterator[Row[*tuple[Any, ...]]]:
    """Yield every job, a batch at a time: a service has hundreds of thousands."""
    columns = (jobs.c.id, jobs.c.sequence, jobs.c.state, jobs.c.version, jobs.c.artifacts, jobs.c.request)
    query = select(*columns, jobs.c.checkpoint, jobs.c.has_expired).order_by(jobs.c.sequence).limit(BATCH)
    last = -1
    while True:
        with database.read() as connection:
            rows = connection.execute(query.where(jobs.c.sequence > last)).all()
        yield from rows
        if len(rows) < BATCH:
            return
        last = rows[-1].sequence


def _needs(row: Row[*tuple[Any, ...]]) -> list[str]:
    """Return the keys, and folders of keys, that this job points at."""
    if row.state == COMPLETED:
        return [] if row.has_expired else [artifact["key"] for artifact in (row.artifacts or {}).values()]
    if row.state == FAILED:
        return []
    inputs = [input_key(row.id, name) for name in row.request.get("inputs", ())]
    return inputs + ([row.checkpoint] if row.checkpoint else [])


def _version(database: Database, job_id: str) -> int | None:
    """Return the job's newest version; None if it is gone."""
    with database.read() as connection:
        return connection.scalar(select(jobs.c.version).where(jobs.c.id == job_id))
