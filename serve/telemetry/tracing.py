"""Traces of jobs: what a job's row keeps of its trace, and the spans that its parts write.

Ids of spans come from the job's id, so whoever works on a job writes into the same trace and needs nobody's memory: a
job that is killed with its engine and goes on elsewhere has one trace. A span is written once it is over.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...runtime.core.config import TraceSettings, load_tracing
from ..core.metric_definitions import SPANS_DROPPED
from ..store.counters import Counters, Tally
from ..store.database import Database

if TYPE_CHECKING:
    from .otlp import Pipeline

logger = logging.getLogger(__name__)
TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")  # W3C Trace Context
EXPORTER = "opentelemetry-exporter-otlp-proto-http"
JOB, QUEUE, WEBHOOK = "job", "queue", "webhook"  # beside the stages that an engine goes through
NO_ERROR = ("completed", "cancelled", "deleted")  # outcomes that somebody wanted
Value = str | int | float | bool


@dataclass(frozen=True)
class Parent:
    """The origin of a job's trace. trace_id: 128 bits; span_id: the client's span, 64 bits, 0 for none."""

    trace_id: int
    span_id: int = 0
    is_sampled: bool = True

    def __str__(self) -> str:
        """Return W3C's `traceparent`, which the job's row keeps; its span, though, may be all zeros."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"


@dataclass(frozen=True)
class SpanEvent:
    name: str
    at_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A span that is over. Times are seconds since 1970 by the database's clock; `trace` is what the row keeps.

    key: tells spans of one job and name apart (an epoch, an attempt). error: a code; "" where nothing failed.
    """

    name: str
    trace: str
    job_id: str
    start_s: float
    end_s: float
    key: str = ""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[SpanEvent, ...] = ()
    error: str = ""

    @property
    def span_id(self) -> int:
        """The span's id, the same in every process that writes it."""
        return _span_id(self.job_id, self.name, self.key)

    @property
    def parent_id(self) -> int:
        """The id of the parent: the job's span; for the job's own span the client's, or 0."""
        return parse(self.trace).span_id if self.name == JOB else _span_id(self.job_id, JOB)


class Tracer:
    """The tracer of a process. A thread exports its spans, or they are dropped and counted: nothing waits for them."""

    def __init__(self, settings: TraceSettings) -> None:
        self.settings = settings
        self._pipeline: Pipeline | None = None
        self._told = 0  # of the spans that were dropped
        self._lock = Lock()

    def begin(self, job_id: str, traceparent: str | None) -> str | None:
        """Return the trace for the row of a new job; None if its client or OTEL_TRACES_SAMPLER wants no trace of it.

        traceparent: the client's header. An invalid one is ignored, as W3C demands.
        """
        parent = given(traceparent) or Parent(int(job_id.rpartition("_")[2], 16))
        return str(Parent(parent.trace_id, parent.span_id)) if self._open().samples(parent) else None

    def write(self, span: Span) -> None:
        self._open().write(span)

    @property
    def num_dropped(self) -> int:
        """The number of spans that reached no collector."""
        return 0 if self._pipeline is None else self._pipeline.num_dropped

    @property
    def facts(self) -> dict[str, int]:
        """The tracer's facts in a heartbeat."""
        return {"spans_dropped": self.num_dropped}

    def tell(self, database: Database, counters: Counters) -> None:
        """Count in the store the spans dropped since the last call; SQLAlchemyError leaves them to the next call."""
        dropped, tally = self.num_dropped, Tally()
        tally.add(SPANS_DROPPED, by=dropped - self._told)
        if tally:
            with database.write() as connection:
                counters.add(connection, tally)
            self._told = dropped

    def close(self) -> None:
        """Export the spans that wait, for a few seconds at most."""
        if self._pipeline is not None:
            self._pipeline.close()

    def _open(self) -> Pipeline:
        """Make the exporter and its thread with the first span: a command that only lists keys needs none."""
        with self._lock:
            if self._pipeline is None:
                from .otlp import Pipeline

                self._pipeline = Pipeline(self.settings)
                url = urlsplit(self.settings.endpoint)
                logger.info("traces of jobs go to %s://%s", url.scheme, url.hostname)
            return self._pipeline


def job_span(job_id: str, trace: str, facts: Mapping[str, Any]) -> Span:
    """Return the span of a whole job, from the facts of the transaction that ended it (`store/traces.py`)."""
    attributes = {
        name: value for name, value in facts.items() if value is not None and name not in ("start_s", "end_s")
    }
    outcome = str(facts["outcome"])
    return Span(
        name=JOB,
        trace=trace,
        job_id=job_id,
        start_s=facts["start_s"],
        end_s=facts["end_s"],
        attributes=attributes,
        error="" if outcome in NO_ERROR else outcome,
    )


def open_tracer() -> Tracer | None:
    """Return a tracer as OpenTelemetry's variables set it, or None if they want no traces. Raises ValueError."""
    settings = load_tracing()
    if settings is None:
        return None
    try:
        found = find_spec("opentelemetry.exporter.otlp.proto.http")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(f"traces to {settings.endpoint} need the package {EXPORTER}, which is not installed")
    return Tracer(settings)


def given(traceparent: str | None) -> Parent | None:
    """Parse a client's header; None for none, and for an invalid one or a version that cannot be read."""
    match = TRACEPARENT.fullmatch(traceparent or "")
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    parent = Parent(int(match[2], 16), int(match[3], 16), bool(int(match[4], 16) & 1))
    return parent if parent.trace_id and parent.span_id else None


def parse(trace: str) -> Parent:
    """Parse the trace that a job's row keeps."""
    _, trace_id, span_id, flags = trace.split("-")
    return Parent(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & 1))


def _span_id(job_id: str, name: str, key: str = "") -> int:
    """Return 64 bits; never 0, which would be no id."""
    return int.from_bytes(blake2b(f"{job_id}/{name}/{key}".encode(), digest_size=8).digest()) or 1
