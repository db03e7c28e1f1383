"""One trace holds a job across kill -9 of its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from collector import Collector, collector
from running import Running, wait_for

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def traced(there: Collector) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": there.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def test_a_job_whose_engine_is_killed_has_one_trace_without_gaps_or_orphans(tmp_path: Path) -> None:
    with collector() as there:
        service = Running(tmp_path / "data", environment=traced(there))
        try:
            service.start()
            service.client.headers["traceparent"] = CLIENT
            job = service.create(num_inference_steps=120)["id"]
            wait_for(lambda: service.get(job)["progress"] >= 30, 90.0, "the job to be stepping")
            service.kill("engine")
            (video,) = service.ended([job])
            assert video["status"] == "completed" and video["resumed_from_step"]
            spans = there.wait(lambda spans: {"job", "store"} <= {span.name for span in spans})
        finally:
            service.stop()
    (whole,) = [span for span in spans if span.name == "job"]
    assert {span.trace_id for span in there.spans} == {CLIENT.split("-")[1]} and whole.parent_id == CLIENT.split("-")[2]
    assert {span.parent_id for span in there.spans if span is not whole} == {whole.span_id}, "an orphan"
    assert len({span.span_id for span in there.spans}) == len(there.spans), "a span was written twice"
    assert (whole.attributes["outcome"], whole.attributes["epoch"]) == ("completed", 2)
    assert whole.attributes["resumed_from_step"] == video["resumed_from_step"]
    found = [(span.name, span.attributes["epoch"]) for span in spans if span.name != "job"]
    first, second = [("queue", 1), ("encode", 1)], ["queue", "encode", "denoise", "decode", "finish", "store"]
    assert found == first + [(name, 2) for name in second], "what the dead engine was at is written by nobody"
    waited = next(span for span in spans if (span.name, span.attributes.get("epoch")) == ("queue", 2))
    (lost,) = waited.events.values()
    assert lost["stage"] == "denoise" and lost["epoch"] == 1 and int(str(lost["step"])) >= video["resumed_from_step"]
    assert not any(b"a red circle" in body for body in there.raw)
