"""Jobs and their leases: claims are atomic, and whoever lost a lease can change nothing any more.

States: queued -> in_progress -> completed | failed. A claim increments the job's `epoch` and sets `lease_until` by the
database's clock; every later write names the epoch that it was claimed with, and one of an older epoch changes no row.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, insert, literal, or_, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.sql.elements import ColumnElement

from .database import Database, now
from .tables import COMPLETED, FAILED, IN_PROGRESS, QUEUED, idempotency, jobs

UNFINISHED = (QUEUED, IN_PROGRESS)


class QuotaExceeded(RuntimeError):
    """The tenant has as many unfinished jobs as it may."""


class IdempotencyConflict(ValueError):
    """The same key was used for another request."""


class NotFound(LookupError):
    """The tenant has no such job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row of `jobs`, as it was when it was read."""

    id: str
    sequence: int
    tenant: str
    state: str
    request: dict[str, Any]
    priority: int
    work: float
    created_at: float
    started_at: float | None
    ended_at: float | None
    epoch: int
    lease_until: float | None
    owner: str | None
    attempts: int
    is_suspect: bool
    cancel_requested: bool
    stage: str | None
    step: int
    num_steps: int
    checkpoint: str | None
    checkpoint_step: int
    resumed_from_step: int | None
    artifacts: dict[str, Any] | None
    error_code: str | None
    error_message: str | None


class JobStore:
    """Every method is one transaction."""

    def __init__(self, database: Database, max_attempts: int = 3) -> None:
        self.database = database
        self.max_attempts = max_attempts

    # --- clients --------------------------------------------------------------------------------------------------

    def create(
        self,
        tenant: str,
        request: Mapping[str, Any],
        *,
        priority: int = 0,
        work: float = 1.0,
        quota: int | None = None,
        idempotency_key: tuple[str, str, str] | None = None,
    ) -> Job:
        """A queued job, or the one that the same idempotency key made before.

        quota: most unfinished jobs of the tenant; QuotaExceeded. idempotency_key: (route, key, digest of the request);
        IdempotencyConflict where the key was used with another digest. Once this returns, the job is not lost.
        """
        with self.database.write() as connection:
            self._lock(connection, f"create {tenant}")  # creates of a tenant are counted and numbered one by one
            if idempotency_key is not None and (job := self._made_before(connection, tenant, *idempotency_key)):
                return job
            mine = and_(jobs.c.tenant == tenant, jobs.c.state.in_(UNFINISHED))
            if quota is not None and connection.scalar(select(func.count()).where(mine)) >= quota:  # type: ignore[operator]
                raise QuotaExceeded(f"{quota} jobs are queued or in progress, which is all that this tenant may have")
            self._lock(connection, "sequence")
            sequence = (connection.scalar(select(func.max(jobs.c.sequence))) or 0) + 1
            job_id = f"video_{secrets.token_hex(16)}"
            values = dict(id=job_id, sequence=sequence, tenant=tenant, request=dict(request), created_at=now())
            connection.execute(insert(jobs).values(**values, priority=priority, work=work))
            if idempotency_key is not None:
                route, key, digest = idempotency_key
                row = dict(tenant=tenant, route=route, key=key, digest=digest, job_id=job_id, created_at=now())
                connection.execute(insert(idempotency).values(**row))
            return self._one(connection, jobs.c.id == job_id)

    def get(self, tenant: str, job_id: str) -> Job:
        """NotFound for another tenant's job as for none."""
        with self.database.read() as connection:
            return self._one(connection, and_(jobs.c.id == job_id, jobs.c.tenant == tenant))

    def page(
        self, tenant: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Job], bool]:
        """At most `limit` jobs in order of creation, and whether there are more. NotFound if `after` names none."""
        with self.database.read() as connection:
            where = [jobs.c.tenant == tenant]
            if after is not None:
                last = self._one(connection, and_(jobs.c.id == after, jobs.c.tenant == tenant)).sequence
                where.append(jobs.c.sequence > last if ascending else jobs.c.sequence < last)
            order = jobs.c.sequence.asc() if ascending else jobs.c.sequence.desc()
            found = connection.execute(select(jobs).where(*where).order_by(order).limit(limit + 1)).all()
        return [_job(row) for row in found[:limit]], len(found) > limit

    def request_cancel(self, tenant: str, job_id: str) -> Job:
        """A queued job fails with `cancelled` at once, one in progress when its engine sees the request."""
        with self.database.write() as connection:
            mine = and_(jobs.c.id == job_id, jobs.c.tenant == tenant)
            connection.execute(
                update(jobs).where(mine, jobs.c.state == QUEUED).values(**_ended(FAILED), error_code="cancelled")
            )
            connection.execute(update(jobs).where(mine, jobs.c.state == IN_PROGRESS).values(cancel_requested=True))
            return self._one(connection, mine)

    def delete(self, tenant: str, job_id: str) -> Job:
        """Forget a job, and with it the lease of whoever works on it; returns what it was, for its artifacts' sake."""
        with self.database.write() as connection:
            job = self._one(connection, and_(jobs.c.id == job_id, jobs.c.tenant == tenant))
            connection.execute(delete_rows(idempotency).where(idempotency.c.job_id == job_id))
            connection.execute(delete_rows(jobs).where(jobs.c.id == job_id))
            return job

    # --- workers --------------------------------------------------------------------------------------------------

    def claim(self, owner: str, count: int, lease_s: float, is_idle: bool = True) -> list[Job]:
        """Up to `count` jobs for `owner`: by priority, then between tenants by how many each has running, then by age.

        A suspect (its engine died under it) is handed out alone, and only to an engine that does nothing else.
        """
        with self.database.write() as connection:
            running = (
                select(jobs.c.tenant, func.count().label("running"))
                .where(jobs.c.state == IN_PROGRESS)
                .group_by(jobs.c.tenant)
                .subquery()
            )
            waiting = (
                select(jobs.c.id, jobs.c.is_suspect)
                .outerjoin(running, running.c.tenant == jobs.c.tenant)
                .where(jobs.c.state == QUEUED, or_(jobs.c.is_suspect.is_(False), literal(is_idle)))
                .order_by(jobs.c.priority.desc(), func.coalesce(running.c.running, 0), jobs.c.sequence)
                .limit(count)
                .with_for_update(of=jobs, skip_locked=True)
            )
            found = connection.execute(waiting).all()
            alone = [row.id for row in found if row.is_suspect][:1]
            chosen = alone or [row.id for row in found]
            if not chosen:
                return []
            connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(chosen), jobs.c.state == QUEUED)
                .values(
                    state=IN_PROGRESS,
                    epoch=jobs.c.epoch + 1,
                    owner=owner,
                    lease_until=now() + lease_s,
                    started_at=func.coalesce(jobs.c.started_at, now()),
                    resumed_from_step=case((jobs.c.checkpoint.is_not(None), jobs.c.checkpoint_step)),
                )
            )
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(chosen)).order_by(jobs.c.sequence))
            return [_job(row) for row in rows]

    def renew(self, job: Job, lease_s: float) -> bool | None:
        """Whether the job is still the worker's; None: it is, and its client wants it cancelled."""
        with self.database.write() as connection:
            kept = connection.execute(update(jobs).where(_held(job)).values(lease_until=now() + lease_s)).rowcount
            if not kept:
                return False
            return None if self._one(connection, jobs.c.id == job.id).cancel_requested else True

    def progress(self, job: Job, stage: str, step: int, num_steps: int) -> bool:
        """Whether it counted. A step never falls: what a resumed job does again is not told again."""
        values = dict(stage=stage, num_steps=num_steps, step=case((jobs.c.step < step, step), else_=jobs.c.step))
        return self._write(job, values)

    def checkpoint(self, job: Job, key: str, step: int) -> bool:
        """Whether it counted: from now on the job resumes here. An attempt that got further is no crash of its own."""
        return self._write(job, dict(checkpoint=key, checkpoint_step=step, attempts=0, is_suspect=False))

    def complete(self, job: Job, artifacts: Mapping[str, Any]) -> bool:
        """Whether it counted; artifacts: variant -> key, bytes and sha256, immutable from now on."""
        return self._write(job, dict(**_ended(COMPLETED), artifacts=dict(artifacts), stage=None))

    def fail(self, job: Job, code: str, message: str) -> bool:
        """Whether it counted."""
        return self._write(job, dict(**_ended(FAILED), error_code=code, error_message=message))

    def release(self, job: Job) -> bool:
        """Give it back unfinished (drain, preemption), which counts against nobody."""
        return self._write(job, dict(state=QUEUED, lease_until=None, owner=None))

    def expire(self) -> list[Job]:
        """Take back what nobody renews: a suspect is tried again alone; one that was alone and got nowhere has crashed.

        After `max_attempts` such crashes the job fails. Returns the jobs as they are now.
        """
        with self.database.write() as connection:
            late = and_(jobs.c.state == IN_PROGRESS, jobs.c.lease_until < now())
            found = connection.execute(select(jobs).where(late).with_for_update(skip_locked=True)).all()
            for row in found:
                attempts = row.attempts + int(row.is_suspect)
                values: dict[str, Any] = dict(
                    state=QUEUED, lease_until=None, owner=None, is_suspect=True, attempts=attempts
                )
                if row.cancel_requested:
                    values = dict(**_ended(FAILED), error_code="cancelled")
                elif attempts >= self.max_attempts:
                    message = f"the engine died {attempts} times while it worked on this job alone"
                    values = dict(**_ended(FAILED), attempts=attempts, error_code="crashed", error_message=message)
                connection.execute(update(jobs).where(jobs.c.id == row.id).values(**values))
            ids = [row.id for row in found]
            return [_job(row) for row in connection.execute(select(jobs).where(jobs.c.id.in_(ids)))]

    # --- what they use --------------------------------------------------------------------------------------------

    def _write(self, job: Job, values: dict[str, Any]) -> bool:
        with self.database.write() as connection:
            return connection.execute(update(jobs).where(_held(job)).values(**values)).rowcount == 1

    def _lock(self, connection: Connection, name: str) -> None:
        """Wait for others that hold this name; SQLite's writers are alone anyway."""
        if not self.database.is_sqlite:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))

    def _made_before(self, connection: Connection, tenant: str, route: str, key: str, digest: str) -> Job | None:
        table = idempotency
        found = connection.execute(
            select(table).where(table.c.tenant == tenant, table.c.route == route, table.c.key == key)
        ).one_or_none()
        if found is None:
            return None
        if found.digest != digest:
            raise IdempotencyConflict("this Idempotency-Key was used for another request")
        return self._one(connection, jobs.c.id == found.job_id)

    def _one(self, connection: Connection, where: ColumnElement[bool]) -> Job:
        row = connection.execute(select(jobs).where(where)).one_or_none()
        if row is None:
            raise NotFound("there is no such job")
        return _job(row)


def _held(job: Job) -> ColumnElement[bool]:
    """Whether the lease that `job` was claimed with is the newest, and the job not ended."""
    return and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, jobs.c.state == IN_PROGRESS)


def _ended(state: str) -> dict[str, Any]:
    return dict(state=state, ended_at=now(), lease_until=None, owner=None)


def _job(row: Row[Any]) -> Job:
    return Job(**{field.name: getattr(row, field.name) for field in fields(Job)})
