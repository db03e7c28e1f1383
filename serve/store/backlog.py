"""How much work waits, in seconds of one engine: what engines are scaled by."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.sql.elements import ColumnElement

from .database import Database
from .tables import IN_PROGRESS, QUEUED, jobs


@dataclass(frozen=True)
class Backlog:
    """num_jobs: unfinished ones. engine_s: estimated seconds of one engine until they are done."""

    num_jobs: int
    engine_s: float


def work_left() -> ColumnElement[float]:
    """Estimated seconds of one engine, of unfinished jobs.

    Of a job that has begun, what is left counts; of one that waits again, what is left from its checkpoint.
    """
    done = case((jobs.c.state == IN_PROGRESS, jobs.c.step), else_=jobs.c.checkpoint_step)
    left = case((jobs.c.num_steps > 0, 1.0 - 1.0 * done / jobs.c.num_steps), else_=1.0)
    return func.coalesce(func.sum(jobs.c.work * left), 0.0)


def read_backlog(database: Database) -> Backlog:
    query = select(func.count(), work_left())
    with database.read() as connection:
        num_jobs, engine_s = connection.execute(query.where(jobs.c.state.in_((QUEUED, IN_PROGRESS)))).one()
    return Backlog(num_jobs, engine_s)
