"""Jobs of all tenants, as operators see them: found, listed, put before others."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.sql.elements import ColumnElement

from ..store.audit import Actor, record
from ..store.database import Database
from ..store.job_model import model_column
from ..store.jobs import UNFINISHED, Job, one, to_job
from ..store.tables import jobs

MAX_PRIORITY = 100


class HasEnded(ValueError):
    """The job has ended, and the change makes sense for an unfinished job alone."""


class AllJobs:
    """Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def get(self, job_id: str) -> Job:
        """Return a job. Raises NotFound."""
        with self.database.read() as connection:
            return one(connection, jobs.c.id == job_id)

    def page(
        self,
        limit: int,
        after: str | None = None,
        *,
        tenant: str | None = None,
        state: str | None = None,
        model: str | None = None,
    ) -> tuple[list[Job], bool]:
        """Return at most `limit` jobs, newest first, and whether more follow. Raises NotFound if `after` names none."""
        wanted: list[ColumnElement[bool]] = []
        if tenant is not None:
            wanted.append(jobs.c.tenant == tenant)
        if state is not None:
            wanted.append(jobs.c.state == state)
        if model is not None:
            wanted.append(model_column() == model)
        with self.database.read() as connection:
            if after is not None:
                wanted.append(jobs.c.sequence < one(connection, jobs.c.id == after).sequence)
            query = select(jobs).where(*wanted).order_by(jobs.c.sequence.desc()).limit(limit + 1)
            found = connection.execute(query).all()
        return [to_job(row) for row in found[:limit]], len(found) > limit

    def prioritise(self, job_id: str, priority: int, by: Actor | None = None) -> Job:
        """Put an unfinished job before or behind others, whatever its key's highest priority is.

        Raises NotFound, HasEnded; ValueError for an invalid priority.
        """
        if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise ValueError(f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}")
        with self.database.write() as connection:
            before = one(connection, jobs.c.id == job_id)
            unfinished = update(jobs).where(jobs.c.id == job_id, jobs.c.state.in_(UNFINISHED))
            if not connection.execute(unfinished.values(priority=priority)).rowcount:
                raise HasEnded(f"the job has ended: it is {before.state}")
            record(connection, by, "job.update", job_id, {"priority": before.priority}, {"priority": priority})
            return one(connection, jobs.c.id == job_id)
