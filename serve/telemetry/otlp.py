"""OpenTelemetry's exporter behind a bounded queue: nothing waits for it, and lost spans are counted."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from threading import Lock, Thread

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags, set_span_in_context
from opentelemetry.trace.status import Status, StatusCode

from ... import __version__
from ...runtime.core.config import TraceSettings
from .tracing import JOB, WEBHOOK, Parent, Span, parse

logger = logging.getLogger(__name__)
CLOSE_S = 3.0  # for what waits when the process ends; a collector that hangs is not waited for longer
TELL_S = 60.0  # between two lines about spans that were lost
LIBRARY = ("opentelemetry.exporter.otlp", "opentelemetry.sdk._shared_internal")  # loggers
KINDS = {JOB: SpanKind.SERVER, WEBHOOK: SpanKind.CLIENT}
SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class Pipeline:
    """The exporter of a process. The SDK's batch processor has the thread, its exporter OTEL_EXPORTER_OTLP_TIMEOUT."""

    def __init__(self, settings: TraceSettings) -> None:
        for name in LIBRARY:  # what they would tell at each failure is told below, once
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        self.settings = settings
        ours = {"service.name": "skylapse", "service.version": __version__}
        ours |= {"host.name": socket.gethostname(), "process.pid": os.getpid()}  # type: ignore[dict-item]
        resource = Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # for OTEL_TRACES_SAMPLER, too
        self._resource, self._sampler = provider.resource, provider.sampler
        self._scope = InstrumentationScope("skylapse", __version__)
        self._exporter = CountingExporter()
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=settings.max_queue, max_export_batch_size=settings.max_batch
        )
        self._given = self._turned_away = 0
        self._lock = Lock()

    @property
    def num_dropped(self) -> int:
        """The number of spans that reached no collector."""
        return self._turned_away + self._exporter.num_lost

    def samples(self, parent: Parent) -> bool:
        """Return whether a job with this parent is traced, as the sampler decides."""
        context = Context()
        if parent.span_id:
            flags = SAMPLED if parent.is_sampled else TraceFlags(TraceFlags.DEFAULT)
            remote = SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags)
            context = set_span_in_context(NonRecordingSpan(remote), context)
        return self._sampler.should_sample(context, parent.trace_id, JOB, SpanKind.SERVER).decision.is_sampled()  # type: ignore[no-untyped-call]

    def write(self, span: Span) -> None:
        """Queue a span for the exporter's thread, or drop and count it if too many wait."""
        with self._lock:
            if self._given - self._exporter.num_taken >= self.settings.max_queue:
                self._turned_away += 1
                return
            self._given += 1
        self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Shut down for CLOSE_S at most; the SDK would wait for up to half a minute."""
        ends = Thread(target=self._processor.shutdown, name="skylapse-traces-end", daemon=True)
        ends.start()
        ends.join(CLOSE_S)

    def _readable(self, span: Span) -> ReadableSpan:
        trace_id, parent_id = parse(span.trace).trace_id, span.parent_id
        parent = SpanContext(trace_id, parent_id, is_remote=True, trace_flags=SAMPLED) if parent_id else None
        return ReadableSpan(
            span.name,
            context=SpanContext(trace_id, span.span_id, is_remote=False, trace_flags=SAMPLED),
            parent=parent,
            resource=self._resource,
            attributes=dict(span.attributes) | {"job_id": span.job_id},
            events=tuple(Event(event.name, dict(event.attributes), _ns(event.at_s)) for event in span.events),
            kind=KINDS.get(span.name, SpanKind.INTERNAL),
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=_ns(span.start_s),
            end_time=_ns(max(span.start_s, span.end_s)),
            instrumentation_scope=self._scope,
        )


class CountingExporter(SpanExporter):
    """Exports OTLP over HTTP/protobuf, as OTEL_EXPORTER_OTLP_* sets it, and counts failures instead of raising."""

    def __init__(self) -> None:
        self.num_taken = self.num_lost = 0  # by one thread
        self._exporter = OTLPSpanExporter()
        self._told_s = float("-inf")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.num_taken += len(spans)
        try:
            result = self._exporter.export(spans)
            problem = "the collector took them not"
        except Exception as error:
            result, problem = SpanExportResult.FAILURE, type(error).__name__
        if result is not SpanExportResult.SUCCESS:
            self.num_lost += len(spans)
            if time.monotonic() - self._told_s > TELL_S:
                self._told_s = time.monotonic()
                logger.warning("%d spans were not exported so far: %s", self.num_lost, problem)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
