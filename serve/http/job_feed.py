"""Reads the store once for all event streams of an ingress, and reports a job whenever its version changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.exc import SQLAlchemyError

from ..store.jobs import Job, JobStore

logger = logging.getLogger(__name__)
LOOK_S = 0.1


class Watch:
    """Reads once for everybody, and not at all while nobody watches."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs = jobs
        self._seen: dict[str, int] = {}
        self._watchers: dict[str, set[asyncio.Queue[Job | None]]] = {}
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watching(self, job: Job) -> AsyncIterator[asyncio.Queue[Job | None]]:
        """Yield a queue of the job's states from here on; None: it was deleted."""
        queue: asyncio.Queue[Job | None] = asyncio.Queue()
        self._watchers.setdefault(job.id, set()).add(queue)
        self._seen[job.id] = min(job.version, self._seen.get(job.id, job.version))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())
        try:
            yield queue
        finally:
            self._watchers[job.id].discard(queue)
            if not self._watchers[job.id]:
                del self._watchers[job.id], self._seen[job.id]

    async def _look(self) -> None:
        while self._watchers:
            try:
                changed, gone = await asyncio.to_thread(self.jobs.changed, dict(self._seen))
            except SQLAlchemyError as error:
                logger.warning("the store does not answer: %s", type(error).__name__)
                changed, gone = [], set()
            for job in changed:
                if job.id in self._seen:
                    self._seen[job.id] = job.version
                self._tell(job.id, job)
            for job_id in gone:
                self._tell(job_id, None)
            await asyncio.sleep(LOOK_S)

    def _tell(self, job_id: str, job: Job | None) -> None:
        for queue in self._watchers.get(job_id, ()):
            queue.put_nowait(job)
