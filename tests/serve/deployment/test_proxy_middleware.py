"""The middleware in Ray's proxy: how far ahead it reads, and what it refuses."""

from __future__ import annotations

import asyncio
import pickle
from collections import deque
from importlib import import_module

import pytest
from starlette.types import Message, Receive, Scope, Send

from skylapse.serve.deployment.local_service import RAY
from skylapse.serve.deployment.proxy_middleware import MAX_HEADER_BYTES, WINDOW_BYTES, Edge, middlewares

CHUNK = 2**16


class Sender:
    """A client that sends as long as it is read, and takes the answer."""

    def __init__(self, num_chunks: int) -> None:
        self.num_read, self.num_chunks = 0, num_chunks
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        self.num_read += 1
        return {"type": "http.request", "body": bytes(CHUNK), "more_body": self.num_read < self.num_chunks}

    async def send(self, message: Message) -> None:
        self.answer.append(message)


class Proxy:
    """A proxy like Ray's: it puts on a queue whatever comes, without asking whether anybody fetches it."""

    def __init__(self) -> None:
        self.queue: deque[Message] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            self.queue.append(await receive())
            if not self.queue[-1]["more_body"]:
                return


def scope(headers: list[tuple[bytes, bytes]] | None = None, path: bytes = b"/v1/videos") -> Scope:
    return {"type": "http", "method": "POST", "path": path.decode(), "raw_path": path, "headers": headers or []}


def test_no_more_than_a_window_is_read_ahead() -> None:
    asyncio.run(read_ahead())


async def read_ahead() -> None:
    sender, proxy = Sender(1000), Proxy()
    task = asyncio.create_task(Edge(proxy)(scope(), sender.receive, sender.send))
    fetched = 0
    while not task.done():
        await asyncio.sleep(0)
        assert sum(len(message["body"]) for message in proxy.queue) <= WINDOW_BYTES
        if len(proxy.queue) * CHUNK >= WINDOW_BYTES:  # it stands still until something is fetched
            before = sender.num_read
            await asyncio.sleep(0.001)
            assert sender.num_read == before
            batch = pickle.loads(pickle.dumps(list(proxy.queue)))
            assert {type(message) for message in batch} == {dict}, "the ingress gets plain messages"
            fetched += len(batch)
            proxy.queue.clear()
    await task
    assert fetched + len(proxy.queue) == sender.num_read == 1000


def test_what_is_never_let_go_of_does_not_hang_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skylapse.serve.deployment.proxy_middleware.LOOK_S", 0.01)
    sender, proxy = Sender(50), Proxy()
    asyncio.run(asyncio.wait_for(Edge(proxy)(scope(), sender.receive, sender.send), 10.0))
    assert len(proxy.queue) == 50


@pytest.mark.parametrize(
    "too_much",
    [
        scope([(b"x", b"a" * MAX_HEADER_BYTES)]),
        scope([(b"x", b"a" * 50)] * 2000),
        scope(path=b"/" + b"a" * MAX_HEADER_BYTES),
    ],
    ids=["one", "many", "target"],
)
def test_large_headers_are_refused_before_the_ingress_sees_them(too_much: Scope) -> None:
    sender, proxy = Sender(1), Proxy()
    asyncio.run(Edge(proxy)(too_much, sender.receive, sender.send))
    assert sender.answer[0]["status"] == 431 and b'"code":"headers_too_large"' in sender.answer[1]["body"]
    assert not proxy.queue


def test_what_is_not_http_passes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "lifespan.startup.complete"})

    sender = Sender(1)
    asyncio.run(Edge(app)({"type": "lifespan"}, sender.receive, sender.send))
    assert sender.answer == [{"type": "lifespan.startup.complete"}]


def test_the_service_names_it_to_ray() -> None:
    module, _, name = RAY["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(".")
    assert getattr(import_module(module), name) is middlewares
