"""The deployment that keeps engines busy and the store tidy. Any number of it is correct: all that counts is atomic.

It does not hand jobs out: it makes calls, and an engine that has a slot for a call claims the job that is next by then.
So no lease runs while a call waits, an engine takes what it has room for, and Serve sees the load that it scales by. A
call that dies names its owner, whose job is queued again at once; that a lease expires is the backstop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from sqlalchemy.exc import SQLAlchemyError

from .context import open_context
from .logs import log_as_json
from .store.leases import Leases
from .store.outbox import Outbox
from .store.processes import DISPATCHER, ENGINE
from .store.traces import JobTraces
from .sweep import Sweeper
from .tracing import job_span
from .webhooks import deliver_due, open_secret

logger = logging.getLogger(__name__)
LOOK_S, BEAT_S, EXPIRE_S, TRACE_S, SWEEP_S = 0.1, 1.0, 1.0, 1.0, 5.0
PAUSE_S = 0.3  # after a call that found no job
OUTAGE_S = 1.0  # between two looks whether store or artifacts are back
MAX_CALLS = 256  # that wait or work at a time; Serve scales engines by them


class Dispatcher:
    """Its loops begin with the first health check, on the loop that the replica runs on."""

    def __init__(self, config: dict[str, Any], engine: DeploymentHandle[Any]) -> None:
        context = open_context(config)
        log_as_json()
        self.config, self.processes = context.config, context.processes
        self.id = serve.get_replica_context().replica_id.unique_id
        self.engine = engine
        self.leases = Leases(context.database, self.config.lease_s, self.config.max_attempts, context.ledger)
        self.outbox = Outbox(context.database, self.config.webhook_attempts)
        self.traces, self.tracer = JobTraces(context.database), context.tracer
        self.sweeper = Sweeper(context)
        self.secret = open_secret(self.config)
        self._calls: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._kept = 0  # calls that engines which drain may keep
        self._pause_until_s = self._store_was_away_s = float("-inf")

    async def check_health(self) -> None:
        """Called by Serve every second."""
        if not self._loops:
            loops = (
                (self._call, LOOK_S),
                (self._expire, EXPIRE_S),
                (self._beat, BEAT_S),
                (self._deliver, LOOK_S),
                (self._trace, TRACE_S),
                (self._sweep, SWEEP_S),
            )
            self._loops = [asyncio.ensure_future(self._every(seconds, work)) for work, seconds in loops]
        for loop in self._loops:
            if loop.done():
                loop.result()  # what has ended it

    async def __del__(self) -> None:
        for loop in self._loops:
            loop.cancel()
        with suppress(SQLAlchemyError):
            await asyncio.to_thread(self.processes.leave, self.id)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """For ever. An outage is waited for; an error of ours ends the loop, and Serve replaces the dispatcher."""
        while True:
            try:
                await work()
            except SQLAlchemyError as error:
                logger.warning("the store does not answer: %s", type(error).__name__)
                self._store_was_away_s = time.monotonic()
                await asyncio.sleep(OUTAGE_S)
            except OSError as error:
                logger.warning("the artifacts do not answer: %s", type(error).__name__)
                await asyncio.sleep(OUTAGE_S)
            await asyncio.sleep(seconds)

    async def _call(self) -> None:
        """Keep as many calls going as there are jobs that wait, and that calls of this dispatcher work on.

        Engines that drain keep calls to themselves, up to their slots, so there are so many more.
        """
        if time.monotonic() < self._pause_until_s:
            return
        waiting, mine = await asyncio.to_thread(self.leases.load, self.id)
        kept = self._kept if waiting else 0
        for _ in range(min(MAX_CALLS, waiting + mine + kept) - len(self._calls)):
            call = asyncio.ensure_future(self._run_next(f"{self.id}-{secrets.token_hex(4)}"))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _run_next(self, owner: str) -> None:
        """One call: a slot of an engine for as long as its job takes."""
        try:
            if await self.engine.run_next.remote(owner) is None:  # somebody else's by now, or a suspect that waits
                self._pause_until_s = time.monotonic() + PAUSE_S
        except asyncio.CancelledError:
            raise
        except Exception as error:  # its engine died
            logger.warning("an engine died under %s: %s", owner, type(error).__name__)
            for job in await asyncio.to_thread(self.leases.expire, owner):
                logger.warning("job %s is %s again, from step %d", job.id, job.state, job.checkpoint_step)

    async def _expire(self) -> None:
        """Leases end while the store is away; whoever holds one is given the time to renew it first."""
        if time.monotonic() - self._store_was_away_s > self.config.lease_s:
            for job in await asyncio.to_thread(self.leases.expire):
                logger.warning("the lease of job %s was not renewed; it is %s", job.id, job.state)

    async def _beat(self) -> None:
        traced = {} if self.tracer is None else self.tracer.facts
        await asyncio.to_thread(self.processes.beat, self.id, DISPATCHER, {"calls": len(self._calls), **traced})
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.tell, self.leases.database, self.leases.ledger.counters)
        engines = await asyncio.to_thread(self.processes.alive, kind=ENGINE)
        self._kept = sum(engine.facts.get("slots", 0) for engine in engines if engine.facts.get("draining"))

    async def _deliver(self) -> None:
        await deliver_due(self.outbox, self.secret, self.config, tracer=self.tracer)

    async def _trace(self) -> None:
        """Write the spans of jobs that have ended, whoever ended them."""
        if self.tracer is not None:
            for ended in await asyncio.to_thread(self.traces.take):
                self.tracer.write(job_span(*ended))

    async def _sweep(self) -> None:
        await asyncio.to_thread(self.sweeper.sweep)
