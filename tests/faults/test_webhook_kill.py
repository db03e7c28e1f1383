"""A webhook is delivered, under one id, though the dispatcher dies between two attempts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from receiver import Receiver, receiver, status
from running import Running, wait_for


@pytest.fixture
def hook() -> Iterator[Receiver]:
    """Refuses the first two attempts; runs in a loop of its own."""
    loop = asyncio.new_event_loop()
    ready: list[Receiver] = []
    stopped = asyncio.Event()

    async def serve() -> None:
        async with receiver(status(500), status(503), status(204)) as heard:
            ready.append(heard)
            await stopped.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    yield wait_for(lambda: next(iter(ready), None), 10.0, "the receiver")
    loop.call_soon_threadsafe(stopped.set)
    thread.join()
    loop.close()


def test_a_webhook_survives_the_death_of_its_dispatcher(service: Running, hook: Receiver) -> None:
    job = service.create(num_inference_steps=3, webhook_url=f"http://127.0.0.1:{hook.port}/done")["id"]
    wait_for(lambda: hook.requests, 60.0, "the first attempt")
    service.kill("dispatcher")
    wait_for(lambda: len(hook.requests) >= 3, 90.0, "the attempt that is taken")
    ids = {headers["webhook-id"] for _, headers, _ in hook.requests}
    assert len(ids) == 1
    assert {job in body.decode() for _, _, body in hook.requests} == {True}
