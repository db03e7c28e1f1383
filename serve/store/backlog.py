"""The backlog, in seconds of one engine, by which engines are scaled."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select, true
from sqlalchemy.sql.elements import ColumnElement

from .database import Database
from .model_queue import ModelQueue
from .tables import IN_PROGRESS, QUEUED, jobs


@dataclass(frozen=True)
class Backlog:
    """Unfinished work. num_jobs: unfinished jobs. engine_s: estimated seconds of one engine until they are done."""

    num_jobs: int
    engine_s: float


def work_left() -> ColumnElement[float]:
    """Return the estimated seconds of one engine that unfinished jobs still need.

    A job that has begun counts with its remaining work; one that waits again, with its work from its checkpoint on.
    """
    done = case((jobs.c.state == IN_PROGRESS, jobs.c.step), else_=jobs.c.checkpoint_step)
    left = case((jobs.c.num_steps > 0, 1.0 - 1.0 * done / jobs.c.num_steps), else_=1.0)
    return func.coalesce(func.sum(jobs.c.work * left), 0.0)


def read_backlog(database: Database, queue: ModelQueue | None = None) -> Backlog:
    """Return the backlog of one queue, or of all jobs."""
    query = select(func.count(), work_left())
    query = query.where(jobs.c.state.in_((QUEUED, IN_PROGRESS)), true() if queue is None else queue.where)
    with database.read() as connection:
        num_jobs, engine_s = connection.execute(query).one()
    return Backlog(num_jobs, engine_s)
