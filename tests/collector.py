"""A server on the loopback in the place of OpenTelemetry's collector: it decodes spans by opentelemetry-proto."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Received:
    """A span as the collector got it. Ids are hexadecimal, times nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str  # "": none
    start: int
    end: int
    attributes: dict[str, object]
    events: dict[str, dict[str, object]]  # name -> attributes
    error: str | None  # the status's message; None: no error
    resource: dict[str, object]


@dataclass
class Collector:
    """The spans received so far. `status`: of each answer; while `open` is clear, nothing is answered."""

    url: str = ""
    status: int = 200
    spans: list[Received] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)  # bodies, decompressed
    paths: list[tuple[str, str]] = field(default_factory=list)  # (path, content type)
    open: threading.Event = field(default_factory=threading.Event)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def receive(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        found = [
            Received(
                name=span.name,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                start=span.start_time_unix_nano,
                end=span.end_time_unix_nano,
                attributes=_values(span.attributes),
                events={event.name: _values(event.attributes) for event in span.events},
                error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
                resource=_values(of_resource.resource.attributes),
            )
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        with self._changed:
            self.raw.append(body)
            self.spans += found
            self._changed.notify_all()

    def wait(self, has: Callable[[list[Received]], bool], at_most_s: float = 20.0) -> list[Received]:
        """Wait until `has` is true of the spans that have come, and return them, oldest first."""
        with self._changed:
            assert self._changed.wait_for(lambda: has(self.spans), at_most_s), [span.name for span in self.spans]
            return sorted(self.spans, key=lambda span: (span.start, -span.end))


def _values(pairs: Iterator[KeyValue]) -> dict[str, object]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}


@contextmanager
def collector() -> Iterator[Collector]:
    there = Collector()
    there.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            there.open.wait(60)
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            there.paths.append((self.path, self.headers["content-type"]))
            if there.status == 200:
                there.receive(body)
            self.send_response(there.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="collector")
    thread.start()
    try:
        yield there
    finally:
        there.open.set()
        server.shutdown()
        thread.join()
        server.server_close()


def until(ask: Callable[[], bool], at_most_s: float = 10.0) -> None:
    """Wait for a condition that has to be polled."""
    until_s = time.monotonic() + at_most_s
    while not ask():
        assert time.monotonic() < until_s
        time.sleep(0.01)
