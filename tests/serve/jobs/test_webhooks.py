"""Webhooks: OpenAI's own client accepts what is sent, and every event arrives at least once under one id."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from receiver import OK, Receiver, receiver, status
from sqlalchemy import select, update

from skylapse.serve.core.config import ServeConfig
from skylapse.serve.jobs import webhooks
from skylapse.serve.jobs.webhooks import deliver_due, make_secret, open_secret, sign
from skylapse.serve.store.database import Database
from skylapse.serve.store.outbox import Delivery, Outbox, enqueue
from skylapse.serve.store.tables import outbox as table

openai = pytest.importorskip("openai")
SECRET = make_secret()
BODY = '{"id":"evt_1","object":"event","created_at":1,"type":"video.completed","data":{"id":"video_1"}}'


def unwrap(body: str | bytes, headers: dict[str, str], secret: str = SECRET) -> Any:
    with openai.OpenAI(api_key="unused", webhook_secret=secret) as client:
        return client.webhooks.unwrap(body, headers)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    yield Outbox(database, max_attempts=2)
    database.close()


def add(outbox: Outbox, url: str, job_id: str = "video_1") -> str:
    with outbox.database.write() as connection:
        return enqueue(connection, job_id, url, "video.completed")


def make_due(outbox: Outbox) -> None:
    with outbox.database.write() as connection:
        connection.execute(update(table).values(next_at=0.0))


def rows(outbox: Outbox) -> dict[str, Any]:
    with outbox.database.read() as connection:
        return {row.job_id: row for row in connection.execute(select(table))}


def send(outbox: Outbox, secret: str = SECRET, **fields: Any) -> int:
    return asyncio.run(send_due(outbox, secret, **fields))


async def send_due(outbox: Outbox, secret: str = SECRET, **fields: Any) -> int:
    return await deliver_due(outbox, secret, ServeConfig(**{"webhook_private": True, **fields}))


def test_openais_client_accepts_what_is_signed() -> None:
    event = unwrap(BODY, sign(SECRET, "evt_1", int(time.time()), BODY))
    assert (event.id, event.type, event.data.id) == ("evt_1", "video.completed", "video_1")


@pytest.mark.parametrize("change", ["body", "id", "timestamp", "secret", "old"])
def test_openais_client_refuses_what_was_changed(change: str) -> None:
    at = int(time.time()) - (301 if change == "old" else 0)
    headers = sign(make_secret() if change == "secret" else SECRET, "evt_1", at, BODY)
    body = BODY.replace("video_1", "video_2") if change == "body" else BODY
    headers |= {"id": {"webhook-id": "evt_2"}, "timestamp": {"webhook-timestamp": str(at + 1)}}.get(change, {})
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(body, headers)


def test_receivers_with_the_old_and_the_new_secret_accept_while_they_change() -> None:
    new = make_secret()
    headers = sign(f"{new} {SECRET}", "evt_1", int(time.time()), BODY)
    assert headers["webhook-signature"].count("v1,") == 2
    assert unwrap(BODY, headers, new).id == unwrap(BODY, headers, SECRET).id == "evt_1"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrap(BODY, headers, make_secret())


def test_secrets_are_long_random_and_said_to_be_secrets() -> None:
    secret = make_secret()
    assert secret != make_secret() and len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


@pytest.mark.parametrize(
    "secret", ["", " ", "whsec_", "whsec_c2hvcnQ=", "whsec_???", "plain", f"{SECRET} plain"], ids=range(7)
)
def test_what_is_no_secret_signs_nothing(secret: str) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        sign(secret, "evt_1", 1, BODY)
    assert "c2hvcnQ" not in str(caught.value) and "plain" not in str(caught.value)


def test_a_secret_is_made_at_the_first_start_and_kept(tmp_path: Path) -> None:
    config = ServeConfig(data=str(tmp_path / "data"))
    with ThreadPoolExecutor(8) as pool:
        (secret,) = {*pool.map(lambda _: open_secret(config), range(8))}
    sign(secret, "evt_1", 1, BODY)
    (file,) = (tmp_path / "data").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and open_secret(config) == secret


def test_a_configured_secret_is_the_one_and_is_checked_at_the_start(tmp_path: Path) -> None:
    assert open_secret(ServeConfig(data=str(tmp_path), webhook_secret=SECRET)) == SECRET
    with pytest.raises(ValueError, match="a webhook secret must be like"):
        open_secret(ServeConfig(data=str(tmp_path), webhook_secret="hunter2"))
    assert [*tmp_path.iterdir()] == []


def test_an_event_arrives_as_openais_client_reads_it_and_once(outbox: Outbox) -> None:
    async def run() -> Receiver:
        async with receiver(OK) as heard:
            add(outbox, f"http://127.0.0.1:{heard.port}/hook")
            assert [await send_due(outbox), await send_due(outbox)] == [1, 0]
            return heard

    heard = asyncio.run(run())
    ((line, headers, body),) = heard.requests
    event = unwrap(body, headers)
    assert (event.type, event.data.id) == ("video.completed", "video_1")
    assert event.id == headers["webhook-id"] and headers["content-type"] == "application/json"
    assert line == "POST /hook HTTP/1.1"
    make_due(outbox)
    assert send(outbox) == 0


def test_the_second_attempt_has_the_same_id_and_body_and_a_new_timestamp(outbox: Outbox) -> None:
    times = iter([1e9, 1e9 + 60])

    async def run() -> Receiver:
        async with receiver(status(500), OK) as heard:
            add(outbox, f"http://127.0.0.1:{heard.port}/")
            for _ in range(2):
                make_due(outbox)
                await deliver_due(outbox, SECRET, ServeConfig(webhook_private=True), lambda: next(times))
            return heard

    (_, first, body), (_, second, again) = asyncio.run(run()).requests
    assert first["webhook-id"] == second["webhook-id"] and body == again
    assert (first["webhook-timestamp"], second["webhook-timestamp"]) == ("1000000000", "1000000060")
    assert first["webhook-signature"] != second["webhook-signature"]


@pytest.mark.parametrize("code", [302, 400, 404, 429, 500])
def test_any_answer_but_2xx_is_a_failure(code: int, outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with receiver(status(code, "location: http://127.0.0.1:1/")) as heard:
            event_id = add(outbox, f"http://127.0.0.1:{heard.port}/?token=hidden")
            for _ in range(2):
                make_due(outbox)
                assert await send_due(outbox) == 1
        assert caplog.messages == [f"gave up webhook {event_id} of video_1: answered {code}"]

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    row = rows(outbox)["video_1"]
    assert row.failed_at and row.last_error == f"answered {code}"


def test_a_receiver_inside_is_not_reached_unless_the_operator_allows_it(outbox: Outbox) -> None:
    async def run() -> None:
        async with receiver() as heard:
            add(outbox, f"https://127.0.0.1:{heard.port}/")
            assert await send_due(outbox, webhook_private=False) == 1
        assert heard.requests == []

    asyncio.run(run())
    assert rows(outbox)["video_1"].last_error == "its host is not a public one"


def test_one_bad_receiver_holds_up_nobody(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPT_S", 0.2)

    async def run() -> Receiver:
        async with receiver() as closed:
            pass  # its port is closed again
        async with receiver(b"") as silent, receiver(OK) as good:
            for job_id, port in (("silent", silent.port), ("closed", closed.port), ("good", good.port)):
                add(outbox, f"http://127.0.0.1:{port}/", job_id)
            assert await send_due(outbox) == 3
            return good

    good = asyncio.run(run())
    found = rows(outbox)
    assert json.loads(good.requests[0][2])["data"] == {"id": "good"} and found["good"].delivered_at
    assert (found["silent"].last_error, found["closed"].last_error) == ("timed out", "no connection")


def test_a_dispatcher_that_dies_with_an_attempt_leaves_it_to_another(outbox: Outbox) -> None:
    async def run() -> Receiver:
        async with receiver(b"", OK) as heard:
            add(outbox, f"http://127.0.0.1:{heard.port}/")
            dying = asyncio.create_task(send_due(outbox))
            while not heard.requests:
                await asyncio.sleep(0)
            dying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await dying
            assert await send_due(outbox) == 0  # the claim still holds
            make_due(outbox)
            assert await send_due(outbox) == 1
            return heard

    first, second = asyncio.run(run()).requests
    assert first[1]["webhook-id"] == second[1]["webhook-id"] and first[2] == second[2]
    assert rows(outbox)["video_1"].delivered_at


def test_a_store_that_fails_is_told_once_all_attempts_have_ended(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> Receiver:
        async with receiver(OK) as heard:
            for job_id in ("a", "b", "c"):
                add(outbox, f"http://127.0.0.1:{heard.port}/", job_id)
            delivered = outbox.delivered

            def breaks(delivery: Delivery) -> None:
                if delivery.job_id == "a":
                    raise OSError("the disk is full")
                delivered(delivery)

            monkeypatch.setattr(outbox, "delivered", breaks)
            with pytest.raises(OSError, match="the disk is full"):
                await send_due(outbox)
            return heard

    assert len(asyncio.run(run()).requests) == 3
    assert {job_id: bool(row.delivered_at) for job_id, row in rows(outbox).items()} == {
        "a": False,
        "b": True,
        "c": True,
    }
