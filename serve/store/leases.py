"""Leases on jobs: claims are atomic, and whoever lost a lease can change nothing any more.

A claim increments the job's `epoch` and sets `lease_until` by the database's clock; every later write names the epoch
that it was claimed with, and one of an older epoch changes no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, case, func, or_, select, true, update
from sqlalchemy.sql.elements import ColumnElement

from .database import Database, now
from .jobs import Job, ended, one, tell, to_job
from .model_queue import ModelQueue
from .tables import COMPLETED, FAILED, IN_PROGRESS, QUEUED, jobs

CHANGED = dict(version=jobs.c.version + 1)


@dataclass(frozen=True)
class Standing:
    """How far a job is. stage: encode, denoise, decode or finish; eta_s: until the last step."""

    stage: str
    step: int = 0
    num_steps: int = 0
    eta_s: float | None = None


@dataclass(frozen=True)
class Weights:
    """What an engine has loaded: a digest of it, and its revision where it is a hub's."""

    fingerprint: str
    revision: str | None = None


class Leases:
    """Every method is one transaction. Those that take a job return whether it was still its holder's."""

    def __init__(self, database: Database, lease_s: float = 6.0, max_attempts: int = 3) -> None:
        self.database, self.lease_s, self.max_attempts = database, lease_s, max_attempts

    # --- who works on what ----------------------------------------------------------------------------------------

    def claim(
        self,
        owner: str,
        count: int = 1,
        is_idle: bool = True,
        queue: ModelQueue | None = None,
        weights: Weights | None = None,
    ) -> list[Job]:
        """Up to `count` jobs for `owner`: by priority, then between tenants by how many each has running, then by age.

        queue: which jobs are the owner's to take, None: all. weights: what it has loaded. A job that other weights have
        worked on begins again, so no clip is made by two.

        A suspect (its engine died under it) is handed out alone, and only to an engine that does nothing else; others
        get nothing while it is first in line, or a busy engine would never come to it.
        """
        mine = true() if queue is None else queue.where
        with self.database.write() as connection:
            running = (
                select(jobs.c.tenant, func.count().label("running"))
                .where(jobs.c.state == IN_PROGRESS, mine)
                .group_by(jobs.c.tenant)
                .subquery()
            )
            waiting = (
                select(jobs.c.id, jobs.c.is_suspect)
                .outerjoin(running, running.c.tenant == jobs.c.tenant)
                .where(jobs.c.state == QUEUED, mine)
                .order_by(jobs.c.priority.desc(), func.coalesce(running.c.running, 0), jobs.c.sequence)
                .limit(count)
                .with_for_update(of=jobs, skip_locked=True)
            )
            found = connection.execute(waiting).all()
            if found and found[0].is_suspect:
                chosen = [found[0].id] if is_idle else []
            else:
                chosen = [row.id for row in itertools.takewhile(lambda row: not row.is_suspect, found)]
            if not chosen:
                return []
            claimed: dict[str, Any] = dict(
                state=IN_PROGRESS,
                epoch=jobs.c.epoch + 1,
                owner=owner,
                lease_until=now() + self.lease_s,
                started_at=func.coalesce(jobs.c.started_at, now()),
                resumed_from_step=case((jobs.c.checkpoint.is_not(None), jobs.c.checkpoint_step)),
            )
            if weights is not None:
                is_others = and_(jobs.c.fingerprint.is_not(None), jobs.c.fingerprint != weights.fingerprint)
                has_checkpoint = and_(jobs.c.checkpoint.is_not(None), ~is_others)
                claimed |= dict(
                    checkpoint=case((is_others, None), else_=jobs.c.checkpoint),
                    checkpoint_step=case((is_others, 0), else_=jobs.c.checkpoint_step),
                    resumed_from_step=case((has_checkpoint, jobs.c.checkpoint_step)),
                    fingerprint=weights.fingerprint,
                    revision=weights.revision,
                )
            connection.execute(
                update(jobs).where(jobs.c.id.in_(chosen), jobs.c.state == QUEUED).values(**claimed, **CHANGED)
            )
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(chosen)).order_by(jobs.c.sequence))
            return [to_job(row) for row in rows]

    def load(self, owner_prefix: str, queue: ModelQueue | None = None) -> tuple[int, int]:
        """(jobs that wait, jobs that owners whose names begin so work on), of one queue or of all."""
        return self.loads(owner_prefix, [queue])[0]

    def loads(self, owner_prefix: str, queues: Sequence[ModelQueue | None]) -> list[tuple[int, int]]:
        """The same of several queues."""
        is_mine = and_(jobs.c.state == IN_PROGRESS, jobs.c.owner.startswith(owner_prefix, autoescape=True))
        waits = jobs.c.state == QUEUED
        query = select(jobs.c.model, jobs.c.variant, _count(waits), _count(is_mine))
        query = query.where(or_(waits, is_mine)).group_by(jobs.c.model, jobs.c.variant)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        loads = []
        for queue in queues:
            found = [row for row in rows if queue is None or queue.takes(row[0], row[1])]
            loads.append((sum(row[2] for row in found), sum(row[3] for row in found)))
        return loads

    def renew(self, held: Sequence[Job]) -> set[str]:
        """Keep the leases of these jobs; returns the ids of those that are not their holder's any more."""
        lost = set()
        with self.database.write() as connection:
            for job in held:
                kept = update(jobs).where(_held(job)).values(lease_until=now() + self.lease_s)
                if not connection.execute(kept).rowcount:
                    lost.add(job.id)
        return lost

    def lost(self, held: Sequence[Job]) -> set[str]:
        """Of these jobs, the ids of those that are not their holder's any more. Reads only."""
        with self.database.read() as connection:
            kept = set(connection.scalars(select(jobs.c.id).where(or_(*(_held(job) for job in held))))) if held else ()
        return {job.id for job in held}.difference(kept)

    def release(self, job: Job) -> bool:
        """Give it back unfinished (drain, preemption), which counts against nobody."""
        return self._write(job, dict(state=QUEUED, lease_until=None, owner=None, stage=None))

    def expire(self, owner: str | None = None) -> list[Job]:
        """Take back what nobody renews, or at once what `owner` held, whose death was seen.

        A suspect is tried again alone; one that was alone and got nowhere has crashed, and fails after `max_attempts`
        such crashes. Returns the jobs as they are now.
        """
        with self.database.write() as connection:
            gone = jobs.c.lease_until < now() if owner is None else jobs.c.owner == owner
            late = select(jobs).where(jobs.c.state == IN_PROGRESS, gone)
            found = connection.execute(late.with_for_update(skip_locked=True)).all()
            for row in found:
                self._take_back(connection, to_job(row))
            ids = [row.id for row in found]
            return [to_job(row) for row in connection.execute(select(jobs).where(jobs.c.id.in_(ids)))]

    # --- how far it is --------------------------------------------------------------------------------------------

    def report(self, news: Sequence[tuple[Job, Standing]]) -> None:
        """Tell how far jobs are. A step never falls: what a resumed job does again is not told again."""
        with self.database.write() as connection:
            for job, at in news:
                step = case((jobs.c.step < at.step, at.step), else_=jobs.c.step)
                values = dict(stage=at.stage, step=step, num_steps=at.num_steps, eta_s=at.eta_s)
                connection.execute(update(jobs).where(_held(job)).values(**CHANGED | values))

    def preview(self, job: Job, preview: Mapping[str, Any]) -> bool:
        """Show this one from now on."""
        return self._write(job, dict(preview=dict(preview)))

    def checkpoint(self, job: Job, key: str, step: int) -> bool:
        """From now on the job resumes here. An attempt that got further is no crash of its own."""
        return self._write(job, dict(checkpoint=key, checkpoint_step=step, attempts=0, is_suspect=False))

    def restart(self, job: Job) -> bool:
        """Forget a checkpoint that nobody can resume from (another model's, a broken one)."""
        return self._write(job, dict(checkpoint=None, checkpoint_step=0, resumed_from_step=None))

    def complete(self, job: Job, artifacts: Mapping[str, Any]) -> bool:
        """artifacts: variant -> key, bytes and sha256, immutable from now on."""
        return self._end(job, dict(**ended(COMPLETED), artifacts=dict(artifacts)))

    def fail(self, job: Job, code: str, message: str) -> bool:
        return self._end(job, dict(**ended(FAILED), error_code=code, error_message=message))

    # --- what they use --------------------------------------------------------------------------------------------

    def _write(self, job: Job, values: dict[str, Any]) -> bool:
        with self.database.write() as connection:
            return connection.execute(update(jobs).where(_held(job)).values(**CHANGED | values)).rowcount == 1

    def _end(self, job: Job, values: dict[str, Any]) -> bool:
        with self.database.write() as connection:
            if connection.execute(update(jobs).where(_held(job)).values(**values)).rowcount != 1:
                return False
            tell(connection, job.id)
            return True

    def _take_back(self, connection: Connection, job: Job) -> None:
        attempts = job.attempts + int(job.is_suspect)
        values: dict[str, Any] = dict(state=QUEUED, lease_until=None, owner=None, is_suspect=True, attempts=attempts)
        if attempts >= self.max_attempts:
            message = f"The engine died {attempts} times while it worked on this job alone."
            values = dict(**ended(FAILED), attempts=attempts, error_code="crashed", error_message=message)
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(**CHANGED | values))
        if one(connection, jobs.c.id == job.id).has_ended:
            tell(connection, job.id)


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _held(job: Job) -> ColumnElement[bool]:
    """Whether the lease that `job` was claimed with is the newest, and the job not ended."""
    return and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, jobs.c.state == IN_PROGRESS)
