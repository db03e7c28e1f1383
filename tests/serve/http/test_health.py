"""Health is answered while everything else is busy, and each request leaves one line in the log."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from skylapse.serve.core.logs import JsonLines
from skylapse.serve.http import health as signs
from skylapse.serve.http.app import create_app
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.processes import DISPATCHER, ENGINE


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    context = open_context({"data": str(tmp_path)})
    yield context
    context.database.close()


@pytest.fixture
def client(context: Context) -> Iterator[TestClient]:
    with TestClient(create_app(context)) as client:
        yield client


def test_ready_once_a_dispatcher_is_alive(context: Context, client: TestClient) -> None:
    assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (503, "no dispatcher")
    context.processes.beat("d", DISPATCHER, {})
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_store_that_hangs_is_alive_and_not_ready_and_holds_one_thread(
    context: Context, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.processes.beat("e", ENGINE, {"model": "demo"})
    going_on, asked = threading.Event(), []

    def hangs(*_: object) -> list[Any]:
        asked.append(1)
        going_on.wait(20)
        return []

    monkeypatch.setattr(signs, "ANSWER_S", 0.1)
    monkeypatch.setattr(type(context.processes), "alive", hangs)
    began_s = time.monotonic()
    try:
        for _ in range(3):
            health, ready = client.get("/healthz"), client.get("/readyz")
            assert (health.status_code, health.json()["store"], health.json()["engines"]) == (200, "unreachable", [])
            assert (ready.status_code, ready.json()["status"]) == (503, "store unreachable")
    finally:
        going_on.set()
    assert time.monotonic() - began_s < 5 and len(asked) == 1


def test_a_store_that_fails_is_alive_and_not_ready(
    context: Context, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OperationalError("", {}, Exception())

    monkeypatch.setattr(type(context.processes), "alive", fails)
    assert client.get("/healthz").json()["store"] == "unreachable"
    assert client.get("/readyz").status_code == 503


def test_health_is_answered_while_all_threads_for_requests_wait(
    context: Context, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty requests of a key that is looked for in a store that does not answer."""
    going_on, waiting = threading.Event(), threading.Semaphore(0)

    def hangs(*_: object) -> None:
        waiting.release()
        going_on.wait(20)

    monkeypatch.setattr(type(context.keys), "find", hangs)
    headers = {"authorization": "Bearer sk-none"}
    threads = [
        threading.Thread(target=client.get, args=("/v1/videos",), kwargs={"headers": headers}) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            assert waiting.acquire(timeout=20)
        began_s = time.monotonic()
        assert client.get("/healthz").json()["store"] == "ok"
        assert time.monotonic() - began_s < 2
    finally:
        going_on.set()
        for thread in threads:
            thread.join()


def test_a_request_is_one_line_with_its_id_and_without_its_url(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "skylapse.serve.http.app"):
        answer = client.get("/v1/videos/video_" + "0a" * 16 + "?secret=zeppelin")
        client.get("/healthz")
        client.get("/nothing/zeppelin")
    lines = [json.loads(JsonLines("ingress").format(record)) for record in caplog.records if hasattr(record, "facts")]
    asked, poll, unknown = lines
    assert (asked["method"], asked["route"], asked["status"]) == ("GET", "/v1/videos/{video_id}", 401)
    assert asked["job"] == "video_" + "0a" * 16 and asked["ms"] >= 0 and asked["level"] == "info"
    assert (poll["level"], poll["route"], unknown["route"], unknown["status"]) == ("debug", "/healthz", "unknown", 404)
    assert "zeppelin" not in json.dumps(lines) and answer.headers["x-request-id"].startswith("req_")


def test_lines_of_an_answer_carry_its_requests_id(
    context: Context, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id is also on the lines of threads that work for the request."""
    lines: list[dict[str, Any]] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(JsonLines("ingress").format(record)))

    def fails(*_: object) -> None:
        raise OperationalError("", {}, Exception())

    monkeypatch.setattr(type(context.keys), "find", fails)
    handler = Kept()
    logging.getLogger("skylapse").addHandler(handler)
    try:
        answer = client.get("/v1/videos", headers={"authorization": "Bearer sk-none"})
    finally:
        logging.getLogger("skylapse").removeHandler(handler)
    told = [line for line in lines if "the store does not answer" in line["message"]]
    assert answer.status_code == 503 and told[0]["request"] == answer.headers["x-request-id"]
