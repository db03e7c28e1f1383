"""Leases on jobs: claims are atomic, and whoever lost a lease can change nothing any more.

A claim increments the job's `epoch` and sets `lease_until` by the database's clock; every later write names the epoch
that it was claimed with, and one of an older epoch changes no row.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, or_, select, update
from sqlalchemy.sql.elements import ColumnElement

from .database import Database, now
from .jobs import UNFINISHED, Job, ended, one, tell, to_job
from .tables import COMPLETED, FAILED, IN_PROGRESS, QUEUED, jobs, tenants

CHANGED = dict(version=jobs.c.version + 1)


@dataclass(frozen=True)
class Standing:
    """How far a job is. stage: encode, denoise, decode or finish; eta_s: until the last step."""

    stage: str
    step: int = 0
    num_steps: int = 0
    eta_s: float | None = None


class Leases:
    """Every method is one transaction. Those that take a job return whether it was still its holder's."""

    def __init__(
        self,
        database: Database,
        lease_s: float = 6.0,
        max_attempts: int = 3,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """weights: of tenants for which the operator has set none in the store."""
        self.database, self.lease_s, self.max_attempts = database, lease_s, max_attempts
        named = [(jobs.c.tenant == tenant, weight) for tenant, weight in (weights or {}).items()]
        self._weight = func.coalesce(tenants.c.weight, *((case(*named),) if named else ()), 1.0)

    # --- who works on what ----------------------------------------------------------------------------------------

    def claim(self, owner: str, count: int = 1, is_idle: bool = True) -> list[Job]:
        """Up to `count` jobs for `owner`: by priority, then between tenants by weight, then by age.

        First is the tenant that has the fewest jobs running for its weight, and of these the one that was given the
        least work for its weight: engines that take one job at a time see none running when they claim.

        A suspect (its engine died under it) is handed out alone, and only to an engine that does nothing else; others
        get nothing while it is first in line, or a busy engine would never come to it.
        """
        with self.database.write() as connection:
            running = (
                select(jobs.c.tenant, func.count().label("running"))
                .where(jobs.c.state == IN_PROGRESS)
                .group_by(jobs.c.tenant)
                .subquery()
            )
            waiting = (
                select(jobs.c.id, jobs.c.is_suspect, jobs.c.tenant, jobs.c.work, jobs.c.started_at)
                .add_columns(self._weight.label("weight"))
                .outerjoin(running, running.c.tenant == jobs.c.tenant)
                .outerjoin(tenants, tenants.c.name == jobs.c.tenant)
                .where(jobs.c.state == QUEUED)
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
            claimed = dict(
                state=IN_PROGRESS,
                epoch=jobs.c.epoch + 1,
                owner=owner,
                lease_until=now() + self.lease_s,
                started_at=func.coalesce(jobs.c.started_at, now()),
                resumed_from_step=case((jobs.c.checkpoint.is_not(None), jobs.c.checkpoint_step)),
            )
            connection.execute(
                update(jobs).where(jobs.c.id.in_(chosen), jobs.c.state == QUEUED).values(**claimed, **CHANGED)
            )
            self._charge(connection, [row for row in found if row.id in chosen and row.started_at is None])
            rows = connection.execute(select(jobs).where(jobs.c.id.in_(chosen)).order_by(jobs.c.sequence))
            return [to_job(row) for row in rows]

    def load(self, owner_prefix: str) -> tuple[int, int]:
        """(jobs that wait, jobs that owners whose names begin so work on)."""
        with self.database.read() as connection:
            waiting = select(func.count()).where(jobs.c.state == QUEUED)
            mine = select(func.count()).where(
                jobs.c.state == IN_PROGRESS, jobs.c.owner.startswith(owner_prefix, autoescape=True)
            )
            return connection.scalar(waiting) or 0, connection.scalar(mine) or 0

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

    def _charge(self, connection: Connection, claimed: Sequence[Row[Any]]) -> None:
        """Add first claims to their tenants' accounts, as start-time fair queueing has it (Goyal and others, 1996).

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


def _held(job: Job) -> ColumnElement[bool]:
    """Whether the lease that `job` was claimed with is the newest, and the job not ended."""
    return and_(jobs.c.id == job.id, jobs.c.epoch == job.epoch, jobs.c.state == IN_PROGRESS)
