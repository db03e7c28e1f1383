"""Background work of a job that nothing waits for: storing previews and checkpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)
Work = Callable[[], Awaitable[None]]


class Aside:
    """Runs one piece of work at a time; of those of one kind that wait, only the newest is done."""

    def __init__(self) -> None:
        self._waiting: dict[str, Work] = {}
        self._task: asyncio.Task[None] | None = None

    def put(self, kind: str, work: Work) -> None:
        self._waiting[kind] = work
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def drop(self) -> None:
        """Discard all work that waits; what has begun in a thread runs to its end there."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while self._waiting:
            work = self._waiting.pop(next(iter(self._waiting)))
            try:
                await work()
            except Exception:  # a preview less, or an older checkpoint to go on from
                logger.warning("work beside a job failed", exc_info=True)
