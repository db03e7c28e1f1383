"""Keeps the leases of an engine's jobs and reports their progress, in a thread of its own.

A step, a compile or a decode may outlast a lease, so the thread that works does not renew. This thread stops renewing
for a job whose work has stood still for longer than any stage may take: then another engine gets it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from ...runtime.core.usage import Account, Usage
from ..store.jobs import Job
from ..store.leases import Leases, Standing
from ..store.ledger import Used
from .job_spans import JobSpans

logger = logging.getLogger(__name__)
LOOK_S = 0.05  # between two looks for jobs that were cancelled or taken away: they stop within this and a step

LOST, STALLED, DRAINED = "lost", "stalled", "drained"


class Held:
    """A job that is being worked on. `stop` is called once, from the thread, when `reason` is there.

    account: what this attempt has used.
    """

    def __init__(self, job: Job, account: Account, stop: Callable[[], None], spans: JobSpans) -> None:
        self.job, self.account, self._stop, self.spans = job, account, stop, spans
        self.told_usage = Usage()
        self.reason: str | None = None
        self.moved_s = time.monotonic()
        self.standing = Standing("encode", job.step, job.num_steps)
        self.is_told = True

    def report(self, standing: Standing) -> None:
        """Note progress of the job; of several reports between two looks, the newest counts."""
        self.moved_s = time.monotonic()
        self.standing, self.is_told = standing, False

    def end(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._stop()


class Keeper:
    """Renews every third of a lease and looks in between."""

    def __init__(self, leases: Leases, stage_deadline_s: float, device: str) -> None:
        self.leases, self.stage_deadline_s, self.device = leases, stage_deadline_s, device
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skylapse-leases", daemon=True)
        self._thread.start()

    @contextmanager
    def holding(self, job: Job, account: Account, stop: Callable[[], None], spans: JobSpans) -> Iterator[Held]:
        held = Held(job, account, stop, spans)
        with self._lock:
            self._held[job.id] = held
        try:
            yield held
        finally:
            with self._lock:
                del self._held[job.id]

    @property
    def held(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        renewed_s = 0.0
        while not self._closing.wait(LOOK_S):
            held = [h for h in self.held if h.reason is None]
            if not held:
                continue
            try:
                if time.monotonic() - renewed_s >= self.leases.lease_s / 3:
                    self._renew(held)
                    renewed_s = time.monotonic()
                self._look(held)
                self._report(held)
            except SQLAlchemyError as error:  # the work goes on, and what it comes to is written when the store is back
                logger.warning("the store does not answer: %s", type(error).__name__)

    def _renew(self, held: list[Held]) -> None:
        now_s = time.monotonic()
        for h in held:
            if now_s - h.moved_s > self.stage_deadline_s:
                logger.error("job %s has not moved for %.0f s", h.job.id, self.stage_deadline_s)
                h.end(STALLED)
        lost = self.leases.renew([h.job for h in held if h.reason is None])
        for h in held:
            if h.job.id in lost:
                h.end(LOST)

    def _report(self, held: list[Held]) -> None:
        """Write the progress of all held jobs, so that a killed engine loses no more than its work since then."""
        held = [h for h in held if h.reason is None]
        untold = [(h, h.standing) for h in held if not h.is_told]
        used = [(h, usage) for h in held if (usage := h.account.usage) is not h.told_usage]
        if untold or used:
            self.leases.report(
                [(h.job, standing) for h, standing in untold],
                [(h.job, Used(usage, self.device)) for h, usage in used],
            )
        for h, standing in untold:
            h.is_told = h.standing is standing
        for h, usage in used:
            h.told_usage = usage

    def _look(self, held: list[Held]) -> None:
        lost = self.leases.lost([h.job for h in held if h.reason is None])
        for h in held:
            if h.job.id in lost:
                h.end(LOST)
