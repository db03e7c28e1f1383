"""Counts the requests that an ingress answers in memory and adds them to the store every few seconds in one write."""

from __future__ import annotations

import asyncio
import logging

from fastapi.routing import APIRoute
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Scope

from ..core.metric_definitions import HTTP_REQUESTS, OTHER, REJECTIONS
from ..store.counters import Counters, Tally
from ..store.database import Database

logger = logging.getLogger(__name__)
FLUSH_S = 3.0
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
NO_ROUTE = "unmatched"


class RequestCounter:
    """The counter of one event loop. Requests counted while the store is away are added when it is back."""

    def __init__(self, database: Database, counters: Counters) -> None:
        self.database, self.counters = database, counters
        self._tally = Tally()
        self._task: asyncio.Task[None] | None = None

    def answered(self, scope: Scope, status: int) -> None:
        """Count an answer under its route's template; unknown methods count as other, so clients cannot make labels."""
        route = scope.get("route")
        path = route.path if isinstance(route, APIRoute) else NO_ROUTE
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self._tally.add(HTTP_REQUESTS, path, method, str(status))
        self._start()

    def refused(self, code: str) -> None:
        """Count a request for a job that was not taken."""
        self._tally.add(REJECTIONS, code, "intake")
        self._start()

    async def flush(self) -> None:
        """Add what has been counted. Raises SQLAlchemyError if the store does not answer, and nothing is lost."""
        tally, self._tally = self._tally, Tally()
        try:
            await asyncio.to_thread(self._add, tally)
        except SQLAlchemyError:
            self._tally.merge(tally)
            raise

    def _add(self, tally: Tally) -> None:
        if tally:
            with self.database.write() as connection:
                self.counters.add(connection, tally)

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._tally:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except SQLAlchemyError as error:
                logger.warning("the store does not answer: %s", type(error).__name__)
