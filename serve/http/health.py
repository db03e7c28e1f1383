"""Reads the live processes for health checks, in a thread of its own, once for all requests that wait.

A request waits a bounded time. Requests and media share the threads of the event loop, of which a busy ingress has none
to spare.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from sqlalchemy.exc import SQLAlchemyError

from ..store.processes import Process, Processes

ANSWER_S = 3.0  # probes wait for 4 or 5
SILENT_S = 30.0  # a starved process gives its sign late, and is alive


class Signs:
    """The reader of one ingress."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._reading: Future[list[Process]] | None = None

    async def alive(self) -> list[Process] | None:
        """Return dispatchers and engines with a recent heartbeat, newest first; None if the store does not answer."""
        if self._reading is None or self._reading.done():
            self._reading = Future()
            threading.Thread(target=self._read, args=(self._reading,), name="skylapse-signs", daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._reading)), ANSWER_S)
        except (TimeoutError, SQLAlchemyError):
            return None

    def _read(self, reading: Future[list[Process]]) -> None:
        try:
            reading.set_result(self.processes.alive(SILENT_S))
        except BaseException as error:
            reading.set_exception(error)
