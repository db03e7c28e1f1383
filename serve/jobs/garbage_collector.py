"""Removes files that no job points at, those of jobs that have ended, expired or are gone, and old rows."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.sql.elements import ColumnElement

from ..store.database import now
from ..store.jobs import Job, to_job
from ..store.outbox import Outbox
from ..store.processes import ENGINE
from ..store.tables import FAILED, jobs
from ..store.traces import JobTraces
from .job_request import input_key
from .services import Context

logger = logging.getLogger(__name__)
BATCH = 50
SETTLED_S = 30.0  # after a job's end: an engine that had lost its lease may have been writing still
ORPHANED_S = 3600.0  # files of a job that is not there may be those of a request whose row is about to be written
HOURLY_S = 3600.0
DAY_S = 86400.0


def sweep_scratch(folder: Path, older_than_s: float = DAY_S) -> None:
    """Remove files that killed processes of this machine left behind; nothing there is worked on for a day."""
    latest_s = time.time() - older_than_s
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another one sweeps, too
            if path.stat().st_mtime < latest_s:
                logger.info("removed what a killed process had left in the scratch folder")
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Sweeper:
    """Removes files and rows in small parts: every call does a bounded one."""

    def __init__(self, context: Context) -> None:
        self.context, self.artifacts = context, context.artifacts
        self._last_hourly_s = time.monotonic()

    def sweep(self) -> None:
        for job in self._find(jobs.c.is_swept.is_(False), jobs.c.ended_at < now() - SETTLED_S):
            kept = {artifact["key"] for artifact in (job.artifacts or {}).values()}
            if job.state == FAILED:  # an operator may have it tried again
                kept |= {input_key(job.id, name) for name in job.request.get("inputs", ())}
            self._keep(job.id, kept)
            self._mark(job, is_swept=True, preview=None, checkpoint=None)
        kept_s = self.context.config.retention_s
        for job in self._find(jobs.c.has_expired.is_(False), jobs.c.is_swept, jobs.c.ended_at < now() - kept_s):
            self.artifacts.remove(f"jobs/{job.id}")
            self._mark(job, has_expired=True)
        if time.monotonic() - self._last_hourly_s > HOURLY_S:
            self._last_hourly_s = time.monotonic()
            self._sweep_orphans()
            self._end_unserved()
            sweep_scratch(self.context.config.scratch)
            self.context.jobs.forget_idempotency(DAY_S)
            self.context.sessions.remove_expired()
            self.context.processes.forget(HOURLY_S)
            Outbox(self.context.database).remove_old(7 * DAY_S)
            JobTraces(self.context.database).forget(HOURLY_S)

    def _sweep_orphans(self) -> None:
        """Remove files of jobs that were deleted while they were being written."""
        ids = self.artifacts.folders("jobs", older_than_s=ORPHANED_S)
        for some in (ids[start : start + BATCH] for start in range(0, len(ids), BATCH)):
            with self.context.database.read() as connection:
                known = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(some))))
            for job_id in sorted(set(some) - known):
                logger.info(
                    "removed %d files of job %s, which is gone", self.artifacts.remove(f"jobs/{job_id}"), job_id
                )

    def _end_unserved(self) -> None:
        """End jobs of a model that nobody has served for an hour, the longest rollout of two configurations."""
        alive = self.context.processes.alive(kind=ENGINE)
        models = {*self.context.config.model_names, *(process.facts.get("model") for process in alive)}
        for job_id in self.context.jobs.fail_unserved([name for name in models if name is not None], HOURLY_S):
            logger.warning("job %s has failed: its model is not served any more", job_id)

    def _keep(self, job_id: str, wanted: set[str]) -> None:
        for key in self.artifacts.keys(f"jobs/{job_id}"):
            if key not in wanted:
                self.artifacts.remove_one(key)

    def _find(self, *where: ColumnElement[bool]) -> list[Job]:
        with self.context.database.read() as connection:
            return [to_job(row) for row in connection.execute(select(jobs).where(*where).limit(BATCH))]

    def _mark(self, job: Job, **values: Any) -> None:
        with self.context.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**values))
