"""Jobs as their clients see them: made, read, listed, cancelled, deleted.

States: queued -> in_progress -> completed | failed. An engine that works on a job holds a lease (leases.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Integer, Row, and_, cast, func, insert, or_, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.sql.elements import ColumnElement

from ..core.metric_definitions import JOBS_CREATED
from .audit import Actor, record
from .counters import Tally
from .database import Database, now
from .job_model import model_of
from .ledger import DEFAULT_CLASS, DELETED, NOTHING, Ledger
from .outbox import enqueue
from .tables import COMPLETED, FAILED, IN_PROGRESS, QUEUED, idempotency, jobs, rates
from .traces import keep_job_span

UNFINISHED = (QUEUED, IN_PROGRESS)


class QuotaExceeded(RuntimeError):
    """The tenant has as many unfinished jobs as it may."""


class RateExceeded(RuntimeError):
    """The tenant has made as many jobs in this minute as it may."""


class StoreFull(RuntimeError):
    """All tenants together have as many unfinished jobs as the service takes."""


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
    stage: str | None
    step: int
    num_steps: int
    checkpoint: str | None
    checkpoint_step: int
    resumed_from_step: int | None
    eta_s: float | None
    version: int
    preview: dict[str, Any] | None
    artifacts: dict[str, Any] | None
    has_expired: bool
    error_code: str | None
    error_message: str | None
    webhook_url: str | None
    model: str | None = None
    variant: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    queued_at: float | None
    trace: str | None
    job_class: str | None = None
    attempt_usage: dict[str, Any] | None = None
    kept_usage: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in UNFINISHED


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The most unfinished jobs of a tenant and of all tenants, and the most jobs that a tenant may make in a minute."""

    quota: int | None = None
    per_minute: int | None = None
    max_queued: int | None = None


class JobStore:
    """Every method is one transaction."""

    def __init__(self, database: Database, ledger: Ledger | None = None) -> None:
        self.database, self.ledger = database, ledger or Ledger()

    def create(
        self,
        tenant: str,
        request: Mapping[str, Any],
        *,
        job_id: str | None = None,
        priority: int = 0,
        work: float = 1.0,
        bounds: Bounds = Bounds(),
        idempotency_key: tuple[str, str, str] | None = None,
        webhook_url: str | None = None,
        model: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        trace: str | None = None,
        job_class: str = DEFAULT_CLASS,
        by: Actor | None = None,
    ) -> Job:
        """Return a queued job, or the one that the same idempotency key made before.

        work: estimated seconds of one engine. model, variant, revision: whose engines work on it. idempotency_key:
        (route, key, digest of the request). job_class: the operator's class of the tenant. by: the operator who retries
        a job. Raises QuotaExceeded, RateExceeded or StoreFull, and IdempotencyConflict if the key was used with another
        digest. Once this returns, the job is not lost.
        """
        with self.database.write() as connection:
            self.database.lock(
                connection, f"create {tenant}"
            )  # creates of a tenant are counted and numbered one by one
            if idempotency_key is not None and (job := self._made_before(connection, tenant, *idempotency_key)):
                return job
            self._check(connection, tenant, bounds)
            self.database.lock(connection, "sequence")
            sequence = (connection.scalar(select(func.max(jobs.c.sequence))) or 0) + 1
            job_id = job_id or new_job_id()
            values = dict(id=job_id, sequence=sequence, tenant=tenant, request=dict(request), created_at=now())
            values |= dict(priority=priority, work=work, webhook_url=webhook_url, trace=trace, job_class=job_class)
            values |= dict(model=model, variant=variant, revision=revision)
            connection.execute(insert(jobs).values(**values))
            if idempotency_key is not None:
                route, key, digest = idempotency_key
                row = dict(tenant=tenant, route=route, key=key, digest=digest, job_id=job_id, created_at=now())
                connection.execute(insert(idempotency).values(**row))
            record(connection, by, "job.retry", job_id, None, {"retried_from": request.get("retried_from")})
            job, tally = one(connection, jobs.c.id == job_id), Tally()
            tally.add(
                JOBS_CREATED, model_of(job.model, job.request), str(job.request.get("kind", "generate")), job_class
            )
            self.ledger.counters.add(connection, tally)
            return job

    def get(self, tenant: str, job_id: str) -> Job:
        """Return a job. Raises NotFound for another tenant's job as for none."""
        with self.database.read() as connection:
            return one(connection, and_(jobs.c.id == job_id, jobs.c.tenant == tenant))

    def page(
        self, tenant: str, limit: int, after: str | None = None, ascending: bool = False
    ) -> tuple[list[Job], bool]:
        """Return at most `limit` jobs by creation, and whether more follow. Raises NotFound if `after` names none."""
        with self.database.read() as connection:
            where = [jobs.c.tenant == tenant]
            if after is not None:
                last = one(connection, and_(jobs.c.id == after, jobs.c.tenant == tenant)).sequence
                where.append(jobs.c.sequence > last if ascending else jobs.c.sequence < last)
            order = jobs.c.sequence.asc() if ascending else jobs.c.sequence.desc()
            found = connection.execute(select(jobs).where(*where).order_by(order).limit(limit + 1)).all()
        return [to_job(row) for row in found[:limit]], len(found) > limit

    def changed(self, seen: Mapping[str, int]) -> tuple[list[Job], set[str]]:
        """Return the jobs with a newer `version` than was seen, and the ids of those that are gone."""
        with self.database.read() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.version).where(jobs.c.id.in_(seen))).all()
            newer = [row.id for row in rows if row.version > seen[row.id]]
            found = connection.execute(select(jobs).where(jobs.c.id.in_(newer))).all() if newer else []
        return [to_job(row) for row in found], set(seen) - {row.id for row in rows}

    def position(self, job: Job) -> int:
        """Return roughly how many queued jobs of its model are before this one: by priority and age, of all tenants."""
        before = or_(
            jobs.c.priority > job.priority, and_(jobs.c.priority == job.priority, jobs.c.sequence < job.sequence)
        )
        with self.database.read() as connection:
            same = jobs.c.model.is_(None) if job.model is None else jobs.c.model == job.model
            return connection.scalar(select(func.count()).where(jobs.c.state == QUEUED, same, before)) or 0

    def cancel(self, tenant: str, job_id: str, by: Actor | None = None) -> Job:
        """End a job with `cancelled`, unless it has ended; its engine has lost the lease, and stops."""
        with self.database.write() as connection:
            mine = and_(jobs.c.id == job_id, jobs.c.tenant == tenant)
            job, tally = one(connection, mine, is_locked=True), Tally()
            if job.has_ended:
                return job
            at = time_of(connection)
            usage = self.ledger.ended(connection, tally, job, at, "cancelled", "cancelled")
            connection.execute(update(jobs).where(mine).values(**ended(FAILED, at, usage), **CANCELLED))
            tell(connection, job_id)
            record(connection, by, "job.cancel", job_id, {"state": job.state}, {"state": FAILED})
            self.ledger.counters.add(connection, tally)
            return one(connection, mine)

    def fail_unserved(self, models: Collection[str], older_than_s: float) -> list[str]:
        """End jobs that have waited `older_than_s` for a model that is none of these; return their ids."""
        with self.database.write() as connection:
            unserved = and_(
                jobs.c.state == QUEUED,
                jobs.c.model.is_not(None),
                jobs.c.model.not_in(models),
                jobs.c.created_at < now() - older_than_s,
            )
            rows = connection.execute(select(jobs).where(unserved).with_for_update(skip_locked=True)).all()
            tally, at, code = Tally(), time_of(connection), UNSERVED["error_code"]
            for job in map(to_job, rows):
                usage = self.ledger.ended(connection, tally, job, at, code, code)
                this = update(jobs).where(jobs.c.id == job.id)
                connection.execute(this.values(**ended(FAILED, at, usage), **UNSERVED))
                tell(connection, job.id)
            self.ledger.counters.add(connection, tally)
            return [row.id for row in rows]

    def delete(self, tenant: str, job_id: str) -> Job:
        """Forget a job, and with it its engine's lease; return the job as it was, so that its artifacts can be removed.

        Its usage stays in the ledger.
        """
        with self.database.write() as connection:
            mine = and_(jobs.c.id == job_id, jobs.c.tenant == tenant)
            job, tally = one(connection, mine, is_locked=True), Tally()
            if not job.has_ended:
                self.ledger.ended(connection, tally, job, time_of(connection), "cancelled", DELETED)
                keep_job_span(connection, job_id, DELETED)
            connection.execute(delete_rows(idempotency).where(idempotency.c.job_id == job_id))
            connection.execute(delete_rows(jobs).where(jobs.c.id == job_id))
            self.ledger.counters.add(connection, tally)
            return job

    def forget_idempotency(self, older_than_s: float) -> int:
        """Forget keys older than this, which may be used for another request again; return their number."""
        with self.database.write() as connection:
            old = idempotency.c.created_at < now() - older_than_s
            return connection.execute(delete_rows(idempotency).where(old)).rowcount

    # --- what they use --------------------------------------------------------------------------------------------

    def _check(self, connection: Connection, tenant: str, bounds: Bounds) -> None:
        waiting = select(func.count()).where(jobs.c.state.in_(UNFINISHED))
        if (
            bounds.quota is not None
            and (connection.scalar(waiting.where(jobs.c.tenant == tenant)) or 0) >= bounds.quota
        ):
            raise QuotaExceeded(
                f"{bounds.quota} jobs are queued or in progress, which is all that this tenant may have"
            )
        if bounds.max_queued is not None and (connection.scalar(waiting) or 0) >= bounds.max_queued:
            raise StoreFull("the service has as many jobs as it takes")
        if bounds.per_minute is None:
            return
        minute = connection.scalar(select(cast(now() / 60, Integer))) or 0
        here = and_(rates.c.tenant == tenant, rates.c.minute == minute)
        made = connection.scalar(select(rates.c.creates).where(here))
        if made is None:
            connection.execute(delete_rows(rates).where(rates.c.tenant == tenant))
            connection.execute(insert(rates).values(tenant=tenant, minute=minute, creates=1))
        elif made >= bounds.per_minute:
            raise RateExceeded(f"{bounds.per_minute} jobs were made in this minute, which is all that this tenant may")
        else:
            connection.execute(update(rates).where(here).values(creates=made + 1))

    def _made_before(self, connection: Connection, tenant: str, route: str, key: str, digest: str) -> Job | None:
        table = idempotency
        found = connection.execute(
            select(table).where(table.c.tenant == tenant, table.c.route == route, table.c.key == key)
        ).one_or_none()
        if found is None:
            return None
        if found.digest != digest:
            raise IdempotencyConflict("this Idempotency-Key was used for another request")
        return one(connection, jobs.c.id == found.job_id)


UNSERVED = dict(error_code="model_not_found", error_message="The model of this job is not served any more.")
CANCELLED = dict(error_code="cancelled", error_message="The job was cancelled.")


def new_job_id() -> str:
    return f"video_{secrets.token_hex(16)}"


def time_of(connection: Connection) -> float:
    """Return the seconds since 1970 by the database's clock."""
    return float(connection.execute(select(now())).scalar_one())


def one(connection: Connection, where: ColumnElement[bool], is_locked: bool = False) -> Job:
    """Return one job. Raises NotFound for none; is_locked: only this transaction may change it until its end."""
    query = select(jobs).where(where)
    row = connection.execute(query.with_for_update() if is_locked else query).one_or_none()
    if row is None:
        raise NotFound("there is no such job")
    return to_job(row)


def to_job(row: Row[Any]) -> Job:
    return Job(**{field.name: getattr(row, field.name) for field in fields(Job)})


def ended(state: str, at: float, usage: dict[str, Any]) -> dict[str, Any]:
    """Return the values that every end of a job sets. usage: the ledger's record of the job."""
    values = dict(state=state, ended_at=at, lease_until=None, owner=None, stage=None, version=jobs.c.version + 1)
    return values | NOTHING | dict(usage=usage)


def tell(connection: Connection, job_id: str) -> None:
    """Put a job's event into the outbox and its span among those to export, in the transaction that ends it."""
    wanted = select(jobs.c.state, jobs.c.webhook_url, jobs.c.trace).where(jobs.c.id == job_id)
    row = connection.execute(wanted).one()
    if row.webhook_url is not None:
        event = "video.completed" if row.state == COMPLETED else "video.failed"
        enqueue(connection, job_id, row.webhook_url, event, row.trace)
    if row.trace is not None:
        keep_job_span(connection, job_id)
