"""A server in a thread of this process, for clients that have a loop of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from skylapse.benchmarks.load.stub import start

Serve = Callable[[web.Application], str]


@pytest.fixture
def serving() -> Iterator[Serve]:
    """Starts applications on loopback; returns their URLs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners: list[web.AppRunner] = []

    def serve(app: web.Application) -> str:
        runner, url = asyncio.run_coroutine_threadsafe(start(app), loop).result(10)
        runners.append(runner)
        return url

    try:
        yield serve
    finally:
        for runner in runners:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
