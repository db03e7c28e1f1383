"""The ledger of the usage of jobs: rows are added in the transaction that ends an attempt, and none is ever altered.

An attempt that ends its job is the tenant's as a whole. One that was taken back (its engine died, drained or lost its
lease) is the tenant's up to its newest checkpoint; the rest was in vain, is lost, and nobody pays for it. What an
engine tells of an attempt that had ended before (the step that ran when its job was cancelled) becomes another row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from ...runtime.core.usage import Usage
from ..core.metric_definitions import ENGINE_SECONDS, JOB_SECONDS, JOBS_ENDED, LOST_SECONDS, REJECTIONS, STEPS
from ..core.prices import Cost, Prices
from .counters import Counters, Tally
from .job_model import model_of
from .tables import COMPLETED, IN_PROGRESS, jobs, ledger

if TYPE_CHECKING:
    from .jobs import Job

DEFAULT_CLASS = "default"
DELETED, TAKEN_BACK, RELEASED, CRASHED, RESTARTED, LATE = (
    "deleted",
    "taken_back",
    "released",
    "crashed",
    "restarted",
    "late",
)
IN_VAIN = (TAKEN_BACK, RELEASED, CRASHED)  # attempts of which only what is checkpointed is the tenant's
REFUSALS = ("too_large", "invalid_request")  # codes of jobs that an engine would not make
NOTHING: dict[str, Any] = dict(attempt_usage=None, kept_usage=None)  # of a job that nobody works on


@dataclass(frozen=True)
class Used:
    """The usage of an attempt so far, and its kind of device."""

    usage: Usage
    device: str | None

    def record(self, epoch: int) -> dict[str, Any]:
        """Return the record that the job's row keeps."""
        return {"epoch": epoch, "device": self.device, **asdict(self.usage)}


def _used(record: Mapping[str, Any] | None) -> Used:
    if record is None:
        return Used(Usage(), None)
    return Used(Usage(**{name: record[name] for name in asdict(Usage())}), record["device"])


class Ledger:
    """The ledger. Its methods are part of a caller's transaction, which adds the tally as its last statement."""

    def __init__(self, prices: Prices | None = None, counters: Counters | None = None) -> None:
        self.prices, self.counters = prices or Prices(), counters or Counters()

    def ended(
        self,
        connection: Connection,
        tally: Tally,
        job: Job,
        at: float,
        outcome: str,
        reason: str,
        used: Used | None = None,
    ) -> dict[str, Any]:
        """Charge a job that ends now; job: as it was before. used: what its engine tells last, else what it has told.

        Returns the whole usage of the job, as its row keeps it.
        """
        if not _is_attempt(job):  # a process of an earlier release has taken it back, which writes no rows
            self.taken_back(connection, tally, job, at)
            job = replace(job, attempt_usage=None, kept_usage=None)
        used, kept = used or _used(job.attempt_usage), _used(job.kept_usage)
        mine, lost = used.usage, Usage()
        if reason == CRASHED:
            mine, lost = kept.usage, used.usage - kept.usage
        before, nanos = self._charged(connection, job)
        cost = self._write(connection, tally, job, at, reason, replace(used, usage=mine), lost, ends=outcome)
        nanos = nanos if cost is None else (nanos or 0) + cost.nanos
        total = before + mine
        model, label = model_of(job.model, job.request), job.job_class or DEFAULT_CLASS
        tally.add(JOBS_ENDED, model, outcome, label)
        tally.observe(JOB_SECONDS, model, outcome, label, seconds=at - job.created_at)
        self._count(tally, job, total)
        if outcome in REFUSALS:
            tally.add(REJECTIONS, outcome, "engine")
        frames = job.request.get("num_frames", 0) if outcome == COMPLETED else 0
        currency = None if nanos is None else self.prices.currency
        return {**asdict(total), "device": used.device, "frames": frames, "cost_nanos": nanos, "currency": currency}

    def taken_back(self, connection: Connection, tally: Tally, job: Job, at: float, reason: str = TAKEN_BACK) -> None:
        """Charge an attempt that was taken back, up to its newest checkpoint; the caller sets `NOTHING` in its row."""
        if job.attempt_usage is None:
            return
        used, kept = _used(job.attempt_usage), _used(job.kept_usage)
        self._write(connection, tally, job, at, reason, replace(used, usage=kept.usage), used.usage - kept.usage)

    def begun_again(self, connection: Connection, tally: Tally, job: Job, at: float) -> None:
        """Void earlier charges of a job that goes on from no checkpoint: the work before this attempt was in vain."""
        before, nanos = self._charged(connection, job)
        if before != Usage():
            row = self._row(job, at, RESTARTED, Used(Usage() - before, None), before) | dict(epoch=0)
            cost = {} if nanos is None else dict(cost_nanos=-nanos, currency=self.prices.currency)
            connection.execute(insert(ledger).values(**row | cost))
            self._count_lost(tally, job, before)

    def settle(self, connection: Connection, job: Job, now_is: Job | None, at: float, used: Used) -> Tally:
        """Charge the rest of an attempt's usage, which its engine tells after the attempt has ended.

        job: as it was claimed; now_is: as it is, None if it is gone.
        """
        tally = Tally()
        rows = select(ledger).where(ledger.c.job_id == job.id, ledger.c.epoch == job.epoch)
        written = connection.execute(rows).all()
        if written:
            was_in_vain = any(row.reason in IN_VAIN for row in written)
        else:  # a process of an earlier release has ended it, which writes no rows
            was_in_vain = now_is is not None and not now_is.has_ended
        charged = sum((_usage_of(row) for row in written), Usage())
        lost_seconds, lost_steps = sum(row.lost_seconds for row in written), sum(row.lost_steps for row in written)
        late = used.usage - charged
        seconds, steps = late.engine_seconds - lost_seconds, late.num_steps - lost_steps
        if seconds <= 0 and steps <= 0:
            return tally
        if was_in_vain:
            lost = Usage(max(0.0, seconds), 0, max(0, steps))
            self._write(connection, tally, job, at, LATE, Used(Usage(), used.device), lost)
            return tally
        cost = self._write(connection, tally, job, at, LATE, replace(used, usage=late), Usage())
        self._count(tally, job, late)
        if now_is is not None and now_is.usage is not None:
            told = _used(now_is.usage).usage + late
            nanos = now_is.usage["cost_nanos"] if cost is None else (now_is.usage["cost_nanos"] or 0) + cost.nanos
            usage = {**now_is.usage, **asdict(told), "device": used.device, "cost_nanos": nanos}
            usage["currency"] = now_is.usage["currency"] if cost is None else cost.currency
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(usage=usage))
        return tally

    # --- what they use --------------------------------------------------------------------------------------------

    def _write(
        self,
        connection: Connection,
        tally: Tally,
        job: Job,
        at: float,
        reason: str,
        used: Used,
        lost: Usage,
        ends: str | None = None,
    ) -> Cost | None:
        """Add an attempt's row; ends: the outcome of the job, if it ends with the attempt. Returns the charged cost."""
        cost = self.prices.cost(model_of(job.model, job.request), used.device, used.usage.engine_seconds)
        row = self._row(job, at, reason, used, lost)
        if ends is not None:
            row |= dict(jobs=1, completed=int(ends == COMPLETED))
        if ends == COMPLETED:
            row |= dict(frames=job.request.get("num_frames", 0), video_seconds=float(job.request.get("seconds", 0)))
        if cost is not None:
            row |= dict(cost_nanos=cost.nanos, currency=cost.currency)
        connection.execute(insert(ledger).values(**row))
        self._count_lost(tally, job, lost)
        return cost

    def _row(self, job: Job, at: float, reason: str, used: Used, lost: Usage) -> dict[str, Any]:
        epoch = job.epoch if job.attempt_usage is None else job.attempt_usage["epoch"]
        return dict(
            at=at,
            day=datetime.fromtimestamp(at, UTC).date().isoformat(),
            job_id=job.id,
            epoch=epoch,
            tenant=job.tenant,
            model=model_of(job.model, job.request),
            job_class=job.job_class or DEFAULT_CLASS,
            reason=reason,
            jobs=0,
            completed=0,
            device=used.device,
            **asdict(used.usage),
            lost_seconds=lost.engine_seconds,
            lost_steps=lost.num_steps,
            frames=0,
            video_seconds=0.0,
        )

    def _charged(self, connection: Connection, job: Job) -> tuple[Usage, int | None]:
        """Return the usage that the job has been charged with so far, and its cost in billionths."""
        names = asdict(Usage())
        sums: list[ColumnElement[Any]] = [func.coalesce(func.sum(ledger.c[name]), 0) for name in names]
        sums.append(func.sum(ledger.c.cost_nanos))
        *numbers, nanos = connection.execute(select(*sums).where(ledger.c.job_id == job.id)).one()
        seconds, *counts = numbers
        return Usage(float(seconds), *(int(count) for count in counts)), None if nanos is None else int(nanos)

    def _count(self, tally: Tally, job: Job, used: Usage) -> None:
        model = model_of(job.model, job.request)
        tally.add(ENGINE_SECONDS, model, job.job_class or DEFAULT_CLASS, by=max(0.0, used.engine_seconds))
        tally.add(STEPS, model, "computed", by=max(0, used.steps_computed))
        tally.add(STEPS, model, "skipped", by=max(0, used.steps_skipped))

    def _count_lost(self, tally: Tally, job: Job, lost: Usage) -> None:
        model = model_of(job.model, job.request)
        tally.add(LOST_SECONDS, model, by=max(0.0, lost.engine_seconds))
        tally.add(STEPS, model, "lost", by=max(0, lost.num_steps))


def _is_attempt(job: Job) -> bool:
    """Return whether the row's record of an attempt is of the one that holds the lease."""
    record = job.attempt_usage
    return record is None or (job.state == IN_PROGRESS and record["epoch"] == job.epoch)


def _usage_of(row: Any) -> Usage:
    return Usage(*(getattr(row, name) for name in asdict(Usage())))
