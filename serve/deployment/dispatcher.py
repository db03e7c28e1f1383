"""The deployment that keeps engines busy and the store tidy. Any number of it is correct: all that counts is atomic.

It does not hand jobs out: it makes calls, and an engine that has a slot for a call claims the job that is next by then.
So no lease runs while a call waits, an engine takes what it has room for, and Serve sees the load that it scales by. A
call that dies names its owner, whose job is queued again at once; the expiry of leases is the backstop.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from sqlalchemy.exc import SQLAlchemyError

from ..core.logs import log_as_json
from ..core.model_entry import EngineGroup
from ..jobs.garbage_collector import Sweeper
from ..jobs.services import open_context
from ..jobs.webhooks import deliver_due, open_secret
from ..store.leases import Leases
from ..store.outbox import Outbox
from ..store.processes import DISPATCHER, ENGINE
from ..store.traces import JobTraces
from ..telemetry.tracing import job_span
from .loopback import stay_on_loopback

logger = logging.getLogger(__name__)
LOOK_S, BEAT_S, EXPIRE_S, TRACE_S, SWEEP_S = 0.1, 1.0, 1.0, 1.0, 5.0
PAUSE_S = 0.3  # after a call that found no job
OUTAGE_S = 1.0  # between two looks whether store or artifacts are back
MAX_CALLS = 256  # to one group's engines, that wait or work at a time; Serve scales engines by them


@dataclass
class Caller:
    """Calls to one group's engines, waiting or running, and when to look again after a call that found no job."""

    group: EngineGroup
    engine: DeploymentHandle[Any]
    calls: set[asyncio.Task[None]] = field(default_factory=set)
    pause_until_s: float = float("-inf")
    num_kept: int = 0  # calls that engines which drain may keep


class Dispatcher:
    """The deployment. Its loops begin with the first health check, on the loop that the replica runs on."""

    def __init__(self, config: dict[str, Any], engines: Mapping[str, DeploymentHandle[Any]]) -> None:
        """Open the store. engines: deployment -> its handle, one for each of the configuration's groups of engines."""
        log_as_json("dispatcher")
        stay_on_loopback()
        context = open_context(config)
        self.config, self.processes = context.config, context.processes
        self.id = serve.get_replica_context().replica_id.unique_id
        self.callers = [Caller(group, engines[group.deployment]) for group in self.config.groups]
        self.leases = Leases(context.database, self.config.lease_s, self.config.max_attempts, context.ledger)
        self.outbox = Outbox(context.database, self.config.webhook_attempts)
        self.traces, self.tracer = JobTraces(context.database), context.tracer
        self.sweeper = Sweeper(context)
        self.secret = open_secret(self.config)
        self._loops: list[asyncio.Task[None]] = []
        self._store_was_away_s = float("-inf")

    async def check_health(self) -> None:
        """Start the loops at the first call, and raise if one has ended. Called by Serve every second."""
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
        """Repeat `work`. An outage is waited for; an error of ours ends the loop, and Serve replaces the dispatcher."""
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
        """Keep as many calls to each group going as there are jobs that wait for it, and that its engines work on.

        Engines that drain keep calls to themselves, up to their slots, so there are so many more.
        """
        loads = await asyncio.to_thread(self.leases.loads, self.id, [caller.group.queue for caller in self.callers])
        for caller, (waiting, mine) in zip(self.callers, loads, strict=True):
            if time.monotonic() < caller.pause_until_s:
                continue
            kept = caller.num_kept if waiting else 0
            for _ in range(min(MAX_CALLS, waiting + mine + kept) - len(caller.calls)):
                call = asyncio.ensure_future(self._run_next(caller, f"{self.id}-{secrets.token_hex(4)}"))
                caller.calls.add(call)
                call.add_done_callback(caller.calls.discard)

    async def _run_next(self, caller: Caller, owner: str) -> None:
        """Make one call, which takes a slot of an engine for as long as its job runs."""
        try:
            if await caller.engine.run_next.remote(owner) is None:  # somebody else's by now, or a suspect that waits
                caller.pause_until_s = time.monotonic() + PAUSE_S
        except asyncio.CancelledError:
            raise
        except Exception as error:  # its engine died
            logger.warning("an engine died under %s: %s", owner, type(error).__name__)
            for job in await asyncio.to_thread(self.leases.expire, owner):
                logger.warning("job %s is %s again, from step %d", job.id, job.state, job.checkpoint_step)

    async def _expire(self) -> None:
        """Expire leases that nobody renewed; after an outage of the store, holders first get time to renew them."""
        if time.monotonic() - self._store_was_away_s > self.config.lease_s:
            for job in await asyncio.to_thread(self.leases.expire):
                logger.warning("the lease of job %s was not renewed; it is %s", job.id, job.state)

    async def _beat(self) -> None:
        calls = sum(len(caller.calls) for caller in self.callers)
        traced = {} if self.tracer is None else self.tracer.facts
        await asyncio.to_thread(self.processes.beat, self.id, DISPATCHER, {"calls": calls, **traced})
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.tell, self.leases.database, self.leases.ledger.counters)
        engines = await asyncio.to_thread(self.processes.alive, kind=ENGINE)
        draining = [engine.facts for engine in engines if engine.facts.get("draining")]
        for caller in self.callers:
            mine = caller.group.name, caller.group.is_canary
            kept = [facts["slots"] for facts in draining if (facts.get("model"), facts.get("canary")) == mine]
            caller.num_kept = sum(kept)

    async def _deliver(self) -> None:
        await deliver_due(self.outbox, self.secret, self.config, tracer=self.tracer)

    async def _trace(self) -> None:
        """Write the spans of jobs that have ended, whoever ended them."""
        if self.tracer is not None:
            for ended in await asyncio.to_thread(self.traces.take):
                self.tracer.write(job_span(*ended))

    async def _sweep(self) -> None:
        await asyncio.to_thread(self.sweeper.sweep)
