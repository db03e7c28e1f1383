"""A job has one trace: its spans, their parents and times; what a collector does changes nothing for the job."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
from collector import Collector, Received, collector, until
from receiver import receiver

from skylapse.runtime.core.config import TraceSettings, load_tracing
from skylapse.runtime.engine.engine import Engine
from skylapse.serve.core.metric_definitions import SPANS_DROPPED
from skylapse.serve.engine.job_spans import LOST, JobSpans
from skylapse.serve.store.counters import Counters, read_counters
from skylapse.serve.store.database import Database
from skylapse.serve.store.jobs import Bounds, Job, JobStore
from skylapse.serve.store.leases import Leases, Standing
from skylapse.serve.store.traces import JobTraces
from skylapse.serve.telemetry.tracing import Parent, Span, Tracer, given, job_span, open_tracer, parse

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
STAGES = ["encode", "denoise", "decode", "finish", "store"]
PROMPT = "an unmistakable zeppelin"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that this process's traces go to, quickly."""
    with collector() as there:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", there.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield there


@pytest.fixture
def tracer(endpoint: Collector) -> Iterator[Tracer]:
    made = open_tracer()
    assert made is not None
    yield made
    made.close()


def named(*names: str) -> object:
    return lambda spans: set(names) <= {span.name for span in spans}


def begun(jobs: JobStore, tracer: Tracer, traceparent: str | None = None) -> Job:
    job_id = f"video_{len(jobs.page('a', 100)[0]) + 1:032x}"
    request = {"model": "demo", "kind": "generate", "prompt": PROMPT}
    return jobs.create("a", request, job_id=job_id, trace=tracer.begin(job_id, traceparent))


# ------------------------------------------------------------------------------------------------- a whole service


def test_a_job_has_exactly_its_spans_with_right_parents_and_times(
    endpoint: Collector, demo_engine: Engine, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    from ..service import SMALL, serving

    async def play() -> None:
        async with receiver() as there:
            with serving(tmp_path, demo_engine, webhook_private=True) as service:
                hook = f"http://127.0.0.1:{there.port}/hook"
                key = service.key()
                with service.client(key, headers={"traceparent": CLIENT}) as client:
                    made = await asyncio.to_thread(
                        client.post, "/v1/videos", json={**SMALL, "prompt": PROMPT, "webhook_url": hook}
                    )
                assert made.status_code == 200, made.text
                video = await asyncio.to_thread(service.wait, key, made.json()["id"])
                assert video["status"] == "completed"
                spans = await asyncio.to_thread(endpoint.wait, named("job", "webhook"))
                check(spans, video["id"])

    def check(spans: list[Received], video_id: str) -> None:
        by_name = {span.name: span for span in spans}
        assert sorted(span.name for span in spans) == sorted(["job", "queue", *STAGES, "webhook"])
        job, queue = by_name["job"], by_name["queue"]
        assert {span.trace_id for span in spans} == {CLIENT.split("-")[1]} and job.parent_id == CLIENT.split("-")[2]
        assert {span.parent_id for span in spans if span is not job} == {job.span_id}
        assert len({span.span_id for span in spans}) == len(spans)
        assert job.start == queue.start and job.attributes == {
            "job_id": video_id, "model": "demo", "kind": "generate", "outcome": "completed", "epoch": 1, "attempts": 0
        }  # fmt: skip
        ends = [queue.end]
        for stage in STAGES:
            assert abs(by_name[stage].start - ends[-1]) <= 1, "a stage begins where the one before has ended"
            ends.append(by_name[stage].end)
        assert sorted(ends) == ends and ends[-1] <= job.end + 10**7 and job.end <= by_name["webhook"].start + 10**8
        assert by_name["denoise"].attributes["steps"] == SMALL["num_inference_steps"]
        assert all(by_name[stage].attributes["epoch"] == 1 for stage in STAGES)
        assert by_name["webhook"].attributes["outcome"] == "delivered"
        assert by_name["webhook"].attributes["http.response.status_code"] == 204
        assert all(span.error is None and span.resource["service.name"] == "skylapse" for span in spans)
        assert endpoint.paths[0] == ("/v1/traces", "application/x-protobuf")

    asyncio.run(play())
    assert not any(PROMPT.encode() in body or b"sk-" in body for body in endpoint.raw)


def test_a_job_that_is_cancelled_deleted_or_fails_has_one_span_of_the_whole(
    endpoint: Collector, tracer: Tracer, store: JobStore, leases: Leases
) -> None:
    cancelled, deleted, failed, done = (begun(store, tracer) for _ in range(4))
    for _ in range(2):
        store.cancel("a", cancelled.id)
    store.delete("a", deleted.id)
    (claimed,) = leases.claim("me")
    assert leases.fail(claimed, "not_finite", "...") and not leases.fail(claimed, "not_finite", "...")
    (claimed,) = leases.claim("me")
    assert leases.complete(claimed, {})
    store.delete("a", claimed.id)
    taken = JobTraces(store.database).take()
    assert JobTraces(store.database).take() == []
    for ended in taken:
        tracer.write(job_span(*ended))
    spans = endpoint.wait(lambda spans: len(spans) == 4)
    told = {span.attributes["job_id"]: (span.attributes["outcome"], span.error) for span in spans}
    assert told == {
        cancelled.id: ("cancelled", None),
        deleted.id: ("deleted", None),
        failed.id: ("not_finite", "not_finite"),
        done.id: ("completed", None),
    }


def test_an_engine_that_dies_is_an_event_of_the_next_attempt_in_the_same_trace(
    endpoint: Collector, tracer: Tracer, store: JobStore, leases: Leases
) -> None:
    job = begun(store, tracer)
    (first,) = leases.claim("me")
    spans = JobSpans(tracer, first, leases.lease_s)
    spans.reach("encode")
    spans.reach("denoise")
    leases.report([(first, Standing("denoise", 7, 30))])
    leases.checkpoint(first, "key", 5)
    leases.expire("me")  # it was killed: what it was at is written by nobody
    (second,) = leases.claim("you")
    spans = JobSpans(tracer, second, leases.lease_s)
    spans.reach("denoise")
    spans.end("drained")
    leases.release(second)
    (third,) = leases.claim("they")
    JobSpans(tracer, third, leases.lease_s)
    found = endpoint.wait(lambda spans: len(spans) == 5)
    assert {span.trace_id for span in found} == {job.id.removeprefix("video_")} and found[0].parent_id != ""
    queues = {span.attributes["epoch"]: span for span in found if span.name == "queue"}
    assert queues[1].events == {} and queues[3].events == {}
    assert queues[2].events == {LOST: {"stage": "denoise", "step": 7, "epoch": 1}}
    assert queues[2].attributes["resumed_from_step"] == 5
    assert queues[1].end <= queues[2].start <= queues[2].end <= queues[3].start
    assert [(s.name, s.attributes["epoch"]) for s in found if s.name != "queue"] == [("encode", 1), ("denoise", 2)]


# --------------------------------------------------------------------------------------------------- what is wanted


def test_without_an_endpoint_nothing_is_traced(store: JobStore, leases: Leases) -> None:
    assert open_tracer() is None
    store.create("a", {"model": "demo"})
    (job,) = leases.claim("me")
    JobSpans(None, job, leases.lease_s).end("completed")
    leases.complete(job, {})
    assert job.trace is None and JobTraces(store.database).take() == []


@pytest.mark.parametrize(
    ("header", "parent"),
    [
        (CLIENT, Parent(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, True)),
        (CLIENT[:-1] + "0", Parent(0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, False)),
        ("cc" + CLIENT[2:] + "-what-a-later-version-adds", Parent(*[int(part, 16) for part in CLIENT.split("-")[1:3]])),
        (CLIENT + "-more", None),
        ("ff" + CLIENT[2:], None),
        (CLIENT.upper(), None),
        (f"00-{32 * '0'}-00f067aa0ba902b7-01", None),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{16 * '0'}-01", None),
        ("nonsense", None),
        ("", None),
        (None, None),
    ],
)
def test_a_clients_traceparent_counts_where_it_is_one(header: str | None, parent: Parent | None) -> None:
    assert given(header) == parent
    if parent:
        assert parse(str(parent)) == parent


def test_a_client_or_the_sampler_may_want_no_trace(endpoint: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    job = f"video_{7:032x}"

    def begin(header: str | None) -> str | None:
        tracer = open_tracer()
        assert tracer is not None
        try:
            return tracer.begin(job, header)
        finally:
            tracer.close()

    assert begin(CLIENT) == CLIENT and begin(CLIENT[:-1] + "0") is None
    assert begin(None) == begin("nonsense") == f"00-{7:032x}-{0:016x}-01"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert begin(CLIENT) is None and begin(None) is None


def test_names_and_attributes_are_those_of_opentelemetrys_variables(
    endpoint: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "clips")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    tracer = open_tracer()
    assert tracer is not None
    tracer.write(a_span())
    (span,) = endpoint.wait(lambda spans: len(spans) == 1)
    tracer.close()
    assert span.resource["service.name"] == "clips" and span.resource["deployment.environment"] == "test"
    assert span.resource["service.version"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "must be like http://collector:4318, got 'collector:4318'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf, got 'grpc'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER must be otlp or none, got 'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, "OTEL_EXPORTER_OTLP_TIMEOUT must be a number, got 'soon'"),
        ({"OTEL_BSP_SCHEDULE_DELAY": "0"}, "OTEL_BSP_SCHEDULE_DELAY must be a number above 0, got '0'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "OTEL_BSP_MAX_QUEUE_SIZE must be a whole number from 1 to 1000000"),
        ({"OTEL_TRACES_SAMPLER": "some"}, "OTEL_TRACES_SAMPLER must be always_on or always_off or"),
        ({"OTEL_TRACES_SAMPLER_ARG": "2"}, "OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, got '2'"),
        ({"OTEL_SDK_DISABLED": "perhaps"}, "OTEL_SDK_DISABLED must be 0 or 1, got 'perhaps'"),
    ],
)
def test_a_wrong_variable_is_named_with_what_it_may_be(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        load_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", **variables})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_turns_traces_on_and_off() -> None:
    there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4318"}
    assert load_tracing({}) is None and load_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}) is None
    assert load_tracing(there) == TraceSettings(endpoint="http://here:4318")
    traces = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://there/v1/traces"}
    assert load_tracing(there | traces) == TraceSettings(endpoint="https://there/v1/traces")
    assert load_tracing(there | {"OTEL_SDK_DISABLED": "true"}) is None
    assert load_tracing(there | {"OTEL_TRACES_EXPORTER": "none"}) is None
    few = load_tracing(there | {"OTEL_BSP_MAX_QUEUE_SIZE": "10"})
    assert few is not None and (few.max_queue, few.max_batch) == (10, 10)


# ---------------------------------------------------------------------------------- a collector that does not do well


def a_span(number: int = 0) -> Span:
    return Span(name="encode", trace=CLIENT, job_id=f"video_{number:032x}", start_s=1.0, end_s=2.0)


def test_a_collector_that_hangs_holds_nobody_up_and_what_is_lost_is_counted(
    endpoint: Collector, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")
    endpoint.open.clear()
    tracer = open_tracer()
    assert tracer is not None
    began_s = time.monotonic()
    for number in range(100):
        tracer.write(a_span(number))
    assert time.monotonic() - began_s < 1.0
    assert 100 - 2 * 8 <= tracer.facts["spans_dropped"] <= 100 - 8, "8 wait, and as many may be on their way"
    dropped = tracer.facts["spans_dropped"]
    for _ in range(2):
        tracer.tell(database, Counters())
    with database.read() as connection:
        assert {metric: sets for metric, sets in read_counters(connection)}[SPANS_DROPPED] == {(): {"": dropped}}
    began_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - began_s < 5.0


@pytest.mark.parametrize("status", [400, 404, None])
def test_a_collector_that_refuses_or_is_away_is_told_once(
    status: int | None, endpoint: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if status is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    endpoint.status = status or 200
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    tracer = open_tracer()
    assert tracer is not None
    with caplog.at_level(logging.INFO):
        for number in range(3):
            tracer.write(a_span(number))
            until(lambda number=number: tracer.facts["spans_dropped"] == number + 1)
    tracer.close()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in told] == ["skylapse.serve.telemetry.otlp"], "and no library's own words"


# ------------------------------------------------------------------------------------------------------- older stores


def test_a_store_without_traces_is_brought_up_to_date(database: Database) -> None:
    from sqlalchemy import inspect, text

    from skylapse.serve.store.migrations import STEPS
    from skylapse.serve.store.tables import job_traces, versions

    def at_the_release_before() -> None:
        with database.write() as connection:
            job_traces.drop(connection)
            for table, column in (("jobs", "trace"), ("jobs", "queued_at"), ("outbox", "trace")):
                connection.execute(text(f"alter table {table} drop column {column}"))
            connection.execute(versions.delete().where(versions.c.version > 1))

    before = JobStore(database).create("a", {"model": "demo", "prompt": PROMPT})
    at_the_release_before()
    with database.read() as connection:
        assert "trace" not in {column["name"] for column in inspect(connection).get_columns("jobs")}
    for _ in range(2):
        database.migrate()
    assert JobStore(database).get("a", before.id) == before
    with database.write() as connection:
        assert connection.scalar(versions.select().order_by(versions.c.version.desc())) == len(STEPS)
    job = JobStore(database).create("a", {"model": "demo", "kind": "generate"}, trace=CLIENT, bounds=Bounds())
    assert Leases(database).claim("me", 2)[1].trace == CLIENT
    JobStore(database).cancel("a", job.id)
    ((job_id, trace, facts),) = JobTraces(database).take()
    assert (job_id, trace, facts["outcome"]) == (job.id, CLIENT, "cancelled")
