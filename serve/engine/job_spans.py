"""The spans of one attempt at a job: its wait, and the stages that it goes through, one after the other."""

from __future__ import annotations

import time

from ..store.jobs import Job
from ..telemetry.tracing import QUEUE, Span, SpanEvent, Tracer, Value

LOST = "engine lost"


class JobSpans:
    """Writes the spans of an attempt; does nothing for a job that has no trace.

    Times are the database's: the claim's, and what has passed since by this machine's clock. Each span is written as
    its stage ends, so that what an engine has done is seen even if it is killed in the stage after.
    """

    def __init__(self, tracer: Tracer | None, job: Job, lease_s: float) -> None:
        self._tracer, self._job = tracer, job
        self._claimed_s, self._since_s = (job.lease_until or 0.0) - lease_s, time.monotonic()
        self._stage: str | None = None
        self._stage_s = self._claimed_s
        self._notes: dict[str, Value] = {}
        waited_since_s = job.created_at if job.queued_at is None else job.queued_at
        self._write(QUEUE, waited_since_s, self._claimed_s, events=self._lost(waited_since_s))

    def reach(self, stage: str, ago_s: float = 0.0) -> None:
        """Begin this stage, `ago_s` seconds ago, and end the one before; the first one begins with the claim."""
        if stage == self._stage:
            return
        at_s = self._claimed_s if self._stage is None else max(self._stage_s, self._now_s - ago_s)
        self._end(at_s)
        self._stage, self._stage_s, self._notes = stage, at_s, {}

    def note(self, **notes: Value) -> None:
        """Add attributes to the span of the present stage."""
        self._notes |= notes

    def end(self, outcome: str, is_error: bool = False) -> None:
        """End the attempt; `outcome` is noted if it ended within a stage."""
        if self._stage is not None:
            self.note(outcome=outcome)
            self._end(self._now_s, outcome if is_error else "")
        self._stage = None

    @property
    def _now_s(self) -> float:
        return self._claimed_s + time.monotonic() - self._since_s

    def _end(self, at_s: float, error: str = "") -> None:
        if self._stage is not None:
            self._write(self._stage, self._stage_s, at_s, self._notes, error=error)

    def _lost(self, at_s: float) -> tuple[SpanEvent, ...]:
        """Return an event for the engine before, if it died, with its last stage; one that gave back leaves none."""
        job = self._job
        if job.epoch <= 1 or job.stage is None:
            return ()
        where: dict[str, Value] = {"stage": job.stage, "step": job.step, "epoch": job.epoch - 1}
        return (SpanEvent(LOST, at_s, where),)

    def _write(
        self,
        name: str,
        start_s: float,
        end_s: float,
        notes: dict[str, Value] | None = None,
        *,
        events: tuple[SpanEvent, ...] = (),
        error: str = "",
    ) -> None:
        job = self._job
        if self._tracer is None or job.trace is None:
            return
        attributes: dict[str, Value] = {"model": job.request["model"], "epoch": job.epoch, **(notes or {})}
        if job.resumed_from_step is not None:
            attributes["resumed_from_step"] = job.resumed_from_step
        span = Span(
            name=name,
            trace=job.trace,
            job_id=job.id,
            start_s=start_s,
            end_s=end_s,
            key=str(job.epoch),
            attributes=attributes,
            events=events,
            error=error,
        )
        self._tracer.write(span)
