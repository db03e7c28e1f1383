"""Spans of whole jobs: written with the end of their job, and handed to one of the processes that export them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select

from .database import Database, now
from .tables import COMPLETED, job_traces, jobs


def keep_job_span(connection: Connection, job_id: str, outcome: str | None = None) -> None:
    """Keep the span in the transaction that ends (or deletes) a job, so that a traced job that has ended has one span.

    outcome: completed or the error's code, unless another is named.
    """
    row = connection.execute(select(jobs, now().label("at")).where(jobs.c.id == job_id)).one()
    if row.trace is None:
        return
    facts: dict[str, Any] = {
        "start_s": row.created_at,
        "end_s": row.at if row.ended_at is None else row.ended_at,
        "model": row.request["model"],
        "kind": row.request["kind"],
        "outcome": outcome or (COMPLETED if row.error_code is None else row.error_code),
        "epoch": row.epoch,
        "attempts": row.attempts,
        "resumed_from_step": row.resumed_from_step,
    }
    connection.execute(insert(job_traces).values(job_id=job_id, trace=row.trace, created_at=now(), facts=facts))


class JobTraces:
    """Every method is one transaction; any number of dispatchers may share them."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def take(self, count: int = 64) -> list[tuple[str, str, dict[str, Any]]]:
        """Return (job's id, its trace, facts of its span) of up to `count` jobs, none of which another caller gets."""
        oldest = select(job_traces).order_by(job_traces.c.created_at).limit(count)
        with self.database.read() as connection:  # mostly there is none, and SQLite's writers need not wait for that
            if connection.execute(oldest.limit(1)).first() is None:
                return []
        with self.database.write() as connection:
            rows = connection.execute(oldest.with_for_update(skip_locked=True)).all()
            connection.execute(delete(job_traces).where(job_traces.c.job_id.in_([row.job_id for row in rows])))
        return [(row.job_id, row.trace, row.facts) for row in rows]

    def forget(self, older_than_s: float) -> int:
        """Remove those that nobody exports; return their number."""
        with self.database.write() as connection:
            return connection.execute(delete(job_traces).where(job_traces.c.created_at < now() - older_than_s)).rowcount
