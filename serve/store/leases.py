"""Leases on jobs: claims are atomic, and whoever lost a lease can change nothing any more.

A claim increments the job's `epoch` and sets `lease_until` by the database's clock; every later write names the epoch
that it was claimed with, and one of an older epoch changes no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, null, or_, select, true, update
from sqlalchemy.sql.elements import ColumnElement

from ..core.metric_definitions import QUEUE_WAIT, STAGE_SECONDS
from .counters import Tally
from .database import Database, now
from .job_model import model_of
from .jobs import UNFINISHED, Job, NotFound, ended, one, tell, time_of, to_job
from .ledger import CRASHED, DEFAULT_CLASS, NOTHING, RELEASED, TAKEN_BACK, Ledger, Used
from .model_queue import ModelQueue
from .tables import COMPLETED, FAILED, IN_PROGRESS, QUEUED, jobs, tenants

CHANGED = dict(version=jobs.c.version + 1)


@dataclass(frozen=True)
class Standing:
    """A job's progress. stage: encode, denoise, decode or finish; eta_s: seconds until the last step."""

    stage: str
    step: int = 0
    num_steps: int = 0
    eta_s: float | None = None


@dataclass(frozen=True)
class Weights:
    """The weights that an engine has loaded: their digest, and their revision if they are a hub's."""

    fingerprint: str
    revision: str | None = None


class Leases:
    """Every method is one transaction. Those that take a job return whether it was still its holder's."""

    def __init__(
        self,
        database: Database,
        lease_s: float = 6.0,
        max_attempts: int = 3,
        ledger: Ledger | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Open the leases. weights: of tenants for which the operator has set none in the store."""
        self.database, self.lease_s, self.max_attempts = database, lease_s, max_attempts
        self.ledger = ledger or Ledger()
        named = [(jobs.c.tenant == tenant, weight) for tenant, weight in (weights or {}).items()]
        self._weight = func.coalesce(tenants.c.weight, *((case(*named),) if named else ()), 1.0)

    # --- who works on what ----------------------------------------------------------------------------------------

    def claim(
        self,
        owner: str,
        count: int = 1,
        is_idle: bool = True,
        queue: ModelQueue | None = None,
        weights: Weights | None = None,
    ) -> list[Job]:
        """Claim up to `count` jobs for `owner`: by priority, then between tenants by weight, then by age.

        First is the tenant that has the fewest jobs running for its weight, and of these the one that was given the
        least work for its weight: engines that take one job at a time see none running when they claim.

        queue: the jobs that the owner may take, None: all. weights: those that it has loaded. A job that other weights
        have worked on begins again, so no clip is made by two.

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
                select(jobs.c.id, jobs.c.is_suspect, jobs.c.tenant, jobs.c.work, jobs.c.started_at)
                .add_columns(self._weight.label("weight"), jobs.c.attempt_usage)
                .outerjoin(running, running.c.tenant == jobs.c.tenant)
                .outerjoin(tenants, tenants.c.name == jobs.c.tenant)
                .where(jobs.c.state == QUEUED, mine)
                .order_by(
                    jobs.c.priority.desc(),
                    func.coalesce(running.c.running, 0) / self._weight,
                    func.coalesce(tenants.c.served, 0.0),
                    jobs.c.sequence,
                )
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
            tally = Tally()
            if left := [row.id for row in found if row.id in chosen and row.attempt_usage is not None]:
                for row in connection.execute(select(jobs).where(jobs.c.id.in_(left))).all():  # an older release's
                    self.ledger.taken_back(connection, tally, to_job(row), time_of(connection))
            if weights is not None:
                is_others = and_(jobs.c.fingerprint.is_not(None), jobs.c.fingerprint != weights.fingerprint)
                begun = select(jobs).where(jobs.c.id.in_(chosen), is_others)
                for row in connection.execute(begun).all():
                    self.ledger.begun_again(connection, tally, to_job(row), time_of(connection))
            claimed: dict[str, Any] = dict(
                state=IN_PROGRESS,
                epoch=jobs.c.epoch + 1,
                owner=owner,
                lease_until=now() + self.lease_s,
                started_at=func.coalesce(jobs.c.started_at, now()),
                resumed_from_step=case((jobs.c.checkpoint.is_not(None), jobs.c.checkpoint_step)),
                **NOTHING,
            )
            if weights is not None:
                has_checkpoint = and_(jobs.c.checkpoint.is_not(None), ~is_others)
                claimed |= dict(
                    checkpoint=case((is_others, None), else_=jobs.c.checkpoint),
                    checkpoint_step=case((is_others, 0), else_=jobs.c.checkpoint_step),
                    kept_usage=case((is_others, null()), else_=jobs.c.kept_usage),
                    resumed_from_step=case((has_checkpoint, jobs.c.checkpoint_step)),
                    fingerprint=weights.fingerprint,
                    revision=weights.revision,
                )
            connection.execute(
                update(jobs).where(jobs.c.id.in_(chosen), jobs.c.state == QUEUED).values(**claimed, **CHANGED)
            )
            self._charge(connection, [row for row in found if row.id in chosen and row.started_at is None])
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(chosen)).order_by(jobs.c.sequence))
            claims = [to_job(row) for row in rows]
            for job in claims:
                if job.epoch == 1:
                    waited_s, label = (job.started_at or 0.0) - job.created_at, job.job_class or DEFAULT_CLASS
                    tally.observe(QUEUE_WAIT, model_of(job.model, job.request), label, seconds=waited_s)
            self.ledger.counters.add(connection, tally)
            return claims

    def load(self, owner_prefix: str, queue: ModelQueue | None = None) -> tuple[int, int]:
        """Return (waiting jobs, jobs of owners whose names begin with `owner_prefix`), of one queue or of all."""
        return self.loads(owner_prefix, [queue])[0]

    def loads(self, owner_prefix: str, queues: Sequence[ModelQueue | None]) -> list[tuple[int, int]]:
        """Return the loads of several queues."""
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
        """Renew the leases of these jobs; return the ids of those that are not their holder's any more."""
        lost = set()
        with self.database.write() as connection:
            for job in held:
                kept = update(jobs).where(_held(job)).values(lease_until=now() + self.lease_s)
                if not connection.execute(kept).rowcount:
                    lost.add(job.id)
        return lost

    def lost(self, held: Sequence[Job]) -> set[str]:
        """Return the ids of those of these jobs that are not their holder's any more. Reads only."""
        with self.database.read() as connection:
            kept = set(connection.scalars(select(jobs.c.id).where(or_(*(_held(job) for job in held))))) if held else ()
        return {job.id for job in held}.difference(kept)

    def release(self, job: Job) -> bool:
        """Give a job back unfinished (drain, preemption), which counts against nobody."""
        with self.database.write() as connection:
            now_is, tally = _now(connection, _held(job)), Tally()
            if now_is is None:
                return False
            at = time_of(connection)
            self.ledger.taken_back(connection, tally, now_is, at, RELEASED)
            values = dict(state=QUEUED, lease_until=None, owner=None, stage=None, queued_at=at, **NOTHING)
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**CHANGED | values))
            self.ledger.counters.add(connection, tally)
            return True

    def expire(self, owner: str | None = None) -> list[Job]:
        """Take back the jobs that nobody renews, or at once those of `owner`, which has died.

        A suspect is tried again alone; one that was alone and got nowhere has crashed, and fails after `max_attempts`
        such crashes. Returns the jobs as they are now.
        """
        with self.database.write() as connection:
            gone = jobs.c.lease_until < now() if owner is None else jobs.c.owner == owner
            late = select(jobs).where(jobs.c.state == IN_PROGRESS, gone)
            found, tally = connection.execute(late.with_for_update(skip_locked=True)).all(), Tally()
            for row in found:
                self._take_back(connection, tally, to_job(row))
            self.ledger.counters.add(connection, tally)
            ids = [row.id for row in found]
            return [to_job(row) for row in connection.execute(select(jobs).where(jobs.c.id.in_(ids)))]

    # --- how far it is --------------------------------------------------------------------------------------------

    def report(self, news: Sequence[tuple[Job, Standing]], used: Sequence[tuple[Job, Used]] = ()) -> None:
        """Write the progress of jobs, and the usage of their attempts.

        A step never falls: what a resumed job does again is not told again.
        """
        with self.database.write() as connection:
            for job, at in news:
                step = case((jobs.c.step < at.step, at.step), else_=jobs.c.step)
                values = dict(stage=at.stage, step=step, num_steps=at.num_steps, eta_s=at.eta_s)
                connection.execute(update(jobs).where(_held(job)).values(**CHANGED | values))
            for job, now_used in used:
                record = now_used.record(job.epoch)
                connection.execute(update(jobs).where(_held(job)).values(attempt_usage=record))

    def preview(self, job: Job, preview: Mapping[str, Any]) -> bool:
        """Show this preview from now on."""
        return self._write(job, dict(preview=dict(preview)))

    def checkpoint(self, job: Job, key: str, step: int, used: Used | None = None) -> bool:
        """Let the job resume from this checkpoint. An attempt that got further is no crash of its own.

        used: the attempt's usage until then, which is charged to the tenant whatever becomes of the engine.
        """
        kept = {} if used is None else dict(kept_usage=used.record(job.epoch))
        return self._write(job, dict(checkpoint=key, checkpoint_step=step, attempts=0, is_suspect=False, **kept))

    def restart(self, job: Job) -> bool:
        """Forget a checkpoint that cannot be resumed (another model's, a broken one)."""
        with self.database.write() as connection:
            now_is, tally = _now(connection, _held(job)), Tally()
            if now_is is None:
                return False
            self.ledger.begun_again(connection, tally, now_is, time_of(connection))
            values = dict(checkpoint=None, checkpoint_step=0, resumed_from_step=None, kept_usage=None)
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**CHANGED | values))
            self.ledger.counters.add(connection, tally)
            return True

    def complete(
        self,
        job: Job,
        artifacts: Mapping[str, Any],
        used: Used | None = None,
        stages_s: Mapping[str, float] | None = None,
    ) -> bool:
        """Complete a job. artifacts: variant -> key, bytes and sha256, immutable from now on.

        used: the attempt's usage, else what it told before. stages_s: seconds of encode, denoise, decode and finish.
        """
        return self._end(job, COMPLETED, dict(artifacts=dict(artifacts)), used, stages_s or {})

    def fail(self, job: Job, code: str, message: str, used: Used | None = None) -> bool:
        return self._end(job, FAILED, dict(error_code=code, error_message=message), used, {})

    def settle(self, job: Job, used: Used) -> None:
        """Write the usage of an attempt whose lease is gone, with the step that ran when its job was taken away."""
        with self.database.write() as connection:
            now_is = _now(connection, jobs.c.id == job.id)
            if now_is is not None and now_is.epoch == job.epoch and now_is.state == IN_PROGRESS:
                record = used.record(job.epoch)
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(attempt_usage=record))
                return
            tally = self.ledger.settle(connection, job, now_is, time_of(connection), used)
            self.ledger.counters.add(connection, tally)

    # --- what they use --------------------------------------------------------------------------------------------

    def _charge(self, connection: Connection, claimed: Sequence[Row[Any]]) -> None:
        """Add first claims to their tenants' accounts by start-time fair queueing (Goyal and others, 1996).

        Accounts are in seconds of an engine, divided by the weight. A tenant that was away starts where the others
        began their newest claim, or it would catch up on what it never asked for.
        """
        shares: dict[str, float] = {}
        for row in claimed:
            shares[row.tenant] = shares.get(row.tenant, 0.0) + row.work / row.weight
        for tenant, share in sorted(shares.items()):
            others = select(func.count(), func.max(tenants.c.began)).select_from(jobs)
            others = others.outerjoin(tenants, tenants.c.name == jobs.c.tenant)
            is_other = and_(jobs.c.state.in_(UNFINISHED), jobs.c.tenant != tenant)
            count, newest = connection.execute(others.where(is_other)).one()
            if not count:  # nobody to be fair to
                continue
            self.database.insert_missing(connection, tenants, name=tenant)
            began = case((tenants.c.served < (newest or 0.0), newest or 0.0), else_=tenants.c.served)
            account = update(tenants).where(tenants.c.name == tenant)
            connection.execute(account.values(began=began, served=began + share))

    def _write(self, job: Job, values: dict[str, Any]) -> bool:
        with self.database.write() as connection:
            return connection.execute(update(jobs).where(_held(job)).values(**CHANGED | values)).rowcount == 1

    def _end(
        self, job: Job, state: str, values: dict[str, Any], used: Used | None, stages_s: Mapping[str, float]
    ) -> bool:
        with self.database.write() as connection:
            now_is, tally = _now(connection, _held(job)), Tally()
            if now_is is None:
                return False
            at, outcome = time_of(connection), values.get("error_code", state)
            usage = self.ledger.ended(connection, tally, now_is, at, outcome, outcome, used)
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(**ended(state, at, usage), **values))
            tell(connection, job.id)
            for stage, seconds in stages_s.items():
                tally.observe(STAGE_SECONDS, model_of(job.model, job.request), stage, seconds=seconds)
            self.ledger.counters.add(connection, tally)
            return True

    def _take_back(self, connection: Connection, tally: Tally, job: Job) -> None:
        attempts, at = job.attempts + int(job.is_suspect), time_of(connection)
        values: dict[str, Any] = dict(state=QUEUED, lease_until=None, owner=None, is_suspect=True, attempts=attempts)
        values |= dict(queued_at=at)
        has_crashed = attempts >= self.max_attempts
        if has_crashed:
            message = f"The engine died {attempts} times while it worked on this job alone."
            usage = self.ledger.ended(connection, tally, job, at, CRASHED, CRASHED)
            values = dict(**ended(FAILED, at, usage), attempts=attempts, error_code="crashed", error_message=message)
        else:
            self.ledger.taken_back(connection, tally, job, at, TAKEN_BACK)
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(**CHANGED | NOTHING | values))
        if has_crashed:
            tell(connection, job.id)


def _count(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def _now(connection: Connection, where: ColumnElement[bool]) -> Job | None:
    """Return the job, which only this transaction may change until its end; None if there is none."""
    try:
        return one(connection, where, is_locked=True)
    except NotFound:
        return None


def _held(job: Job) -> ColumnElement[bool]:
    """Return the condition that `job` still has the newest lease, and has not ended."""
    return and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, jobs.c.state == IN_PROGRESS)
