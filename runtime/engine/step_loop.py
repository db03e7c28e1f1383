"""An engine's step loop in a thread of its own, and its events in any number of asyncio loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from ..core.events import DeviceLost, Event, Failed, Finished, Ticket

if TYPE_CHECKING:
    from .engine import Engine


class StepLoop:
    """Steps the engine while it has work and sleeps otherwise."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="skylapse-steps", daemon=True)
        self._thread.start()

    async def events(self, ticket: Ticket, join: Callable[[], object]) -> AsyncGenerator[Event, None]:
        """Submit by `join`, off the event loop, and hand on the ticket's events up to the last."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def hand_on(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, event)
            except RuntimeError:  # that event loop has been closed: nobody listens any more
                self.engine.abort(ticket)

        left = threading.Event()

        def submit() -> None:
            join()
            if left.is_set():  # a thread cannot be cancelled: the stream may have been left meanwhile
                self.engine.abort(ticket)

        event = None
        with self.engine.listening(ticket, hand_on):
            try:
                await asyncio.to_thread(submit)
                while not isinstance(event, Finished | Failed):
                    event = await queue.get()
                    yield event
            finally:
                if not isinstance(event, Finished | Failed):
                    left.set()
                    self.engine.abort(ticket)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Stop after the step that is running."""
        self._closing = True
        self.notify()
        self._thread.join()

    def notify(self) -> None:
        """There may be new work."""
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self.engine.is_busy)
            if self._closing:
                return
            try:
                self.engine.advance()
            except DeviceLost:  # everyone who listens has been told
                return
