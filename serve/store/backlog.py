"""How much work waits, in seconds of one engine: what engines are scaled by."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select, true

from .database import Database
from .model_queue import ModelQueue
from .tables import IN_PROGRESS, QUEUED, jobs


@dataclass(frozen=True)
class Backlog:
    """num_jobs: unfinished ones. engine_s: estimated seconds of one engine until they are done."""

    num_jobs: int
    engine_s: float


def read_backlog(database: Database, queue: ModelQueue | None = None) -> Backlog:
    """Of one queue, or of all jobs.

    Of a job that has begun, what is left counts; of one that waits again, what is left from its checkpoint.
    """
    done = case((jobs.c.state == IN_PROGRESS, jobs.c.step), else_=jobs.c.checkpoint_step)
    left = case((jobs.c.num_steps > 0, 1.0 - 1.0 * done / jobs.c.num_steps), else_=1.0)
    query = select(func.count(), func.coalesce(func.sum(jobs.c.work * left), 0.0))
    query = query.where(jobs.c.state.in_((QUEUED, IN_PROGRESS)), true() if queue is None else queue.where)
    with database.read() as connection:
        num_jobs, engine_s = connection.execute(query).one()
    return Backlog(num_jobs, engine_s)
