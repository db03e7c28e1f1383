"""The deployment that makes clips: one engine a replica, which works on as many claimed jobs as it has slots."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
import torch
from ray import serve
from sqlalchemy.exc import SQLAlchemyError

from ..runtime.engine import Engine
from ..runtime.warm_up import warm_up
from .context import open_context
from .gpu import gpu_reader
from .logs import log_as_json
from .measures import Measures
from .ready import StartTimes, in_words
from .store.leases import Leases
from .store.processes import ENGINE
from .sweep import sweep_scratch
from .worker import Worker

logger = logging.getLogger(__name__)
BEAT_S = 1.0
NICE = 10
UNCHECKED_S = 5.0  # health checks come every second; a replica that is being drained gets none


class EngineReplica:
    """`run_next` is an ongoing Serve request while its job is worked on, so Serve sees the load and lets it end."""

    def __init__(self, config: dict[str, Any]) -> None:
        began_s = time.perf_counter()
        context = open_context(config)
        log_as_json()
        self.config = context.config
        self.id = serve.get_replica_context().replica_id.unique_id
        self._load_times = (0.0, 0.0)
        self.engine = self.load()
        self.measures = Measures()
        self.processes, self.tenants = context.processes, context.tenants
        self.config.scratch.mkdir(parents=True, exist_ok=True)
        sweep_scratch(self.config.scratch)
        self.worker = Worker(
            self.engine,
            Leases(context.database, self.config.lease_s, self.config.max_attempts, context.tenant_weights),
            context.artifacts,
            self.measures,
            scratch=self.config.scratch,
            stage_deadline_s=self.config.stage_deadline_s,
            checkpoint_every=self.config.checkpoint_every,
        )
        self._checked_s = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._released = asyncio.Event()  # calls that a drained engine keeps to itself may return
        self._packed = (0, 0)
        self._closing = threading.Event()
        self.started = StartTimes(*self._load_times, time.perf_counter() - began_s).facts
        logger.info(in_words(self.started))
        self._beating = threading.Thread(target=self._beat, name="skylapse-heartbeat", daemon=True)
        self._beating.start()

    def load(self) -> Engine:
        """The engine, and what its first request would otherwise wait for."""
        began_s = time.perf_counter()
        torch.set_num_threads(self.config.threads or os.cpu_count() or 1)  # Ray has set one for a fraction of a core
        config = self.config
        engine = Engine.from_pretrained(
            config.model, config.device, config.dtype, quantize=config.quantize, offload=config.offload
        )
        if engine.device.type == "cpu":
            os.nice(NICE)  # clients who ask where their job stands do not wait for its steps
        _ = engine.memory, engine.previewer
        engine.decoders.prepare()
        loaded_s = time.perf_counter()
        if engine.device.type == "cuda" if config.warm_up is None else config.warm_up:
            warm_up(engine)
        self._load_times = loaded_s - began_s, time.perf_counter() - loaded_s
        engine.decoders.build_in_background()
        return engine

    async def run_next(self, owner: str) -> str | None:
        """Work on the next job to its end, as `owner`, by which its lease is found when this replica dies.

        The job goes on when the caller does not: a dispatcher's death is no reason to begin again.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            # They wait for store, disk and encoder. Python's default is as many as there are cores, and 4.
            self._loop.set_default_executor(ThreadPoolExecutor(32, thread_name_prefix="skylapse"))
        if self.worker.is_draining:  # an answer would bring the next call at once: Serve prefers who has little to do
            await self._released.wait()
            return None
        return await asyncio.shield(asyncio.ensure_future(self.worker.run_next(owner)))

    def check_health(self) -> None:
        """Called by Serve every second, on its own thread; raises where the replica has to be replaced."""
        self._checked_s = time.monotonic()
        if self.worker.is_lost:
            raise RuntimeError("the engine's device is lost, or a stage of it has stalled")
        if not self.worker.keeper.is_alive:
            raise RuntimeError("the thread that keeps leases has died")

    async def __del__(self) -> None:
        """Called by Serve when nothing is ongoing any more."""
        self._closing.set()
        await asyncio.to_thread(self.worker.close)
        with suppress(SQLAlchemyError):
            await asyncio.to_thread(self.processes.leave, self.id)

    def _beat(self) -> None:
        """Leave a sign every second, with what is known of this engine, and take what operators have set.

        An engine begins to drain when an operator asks it to, or Serve has begun to stop it.
        """
        device = self.engine.device
        read_gpu = gpu_reader(device.index or 0) if device.type == "cuda" else dict
        facts = {"model": self.config.model, "device": str(device), "slots": self.config.engine_slots}
        facts |= {"gpus": ray.get_gpu_ids(), **self.started}
        while not self._closing.wait(BEAT_S):
            try:
                told = facts | self.measures.facts | self._packs() | read_gpu()
                told |= self.engine.decoders.report.facts | self.engine.model.residency.report.facts
                told |= {"running": len(self.worker.keeper.held), "draining": self.worker.is_draining}
                is_asked = self.processes.beat(self.id, ENGINE, told)
                self.engine.weigh_tenants(self.tenants.weights())
                if is_asked and not self.worker.is_draining:
                    logger.info("an operator has this engine drained: it takes no more jobs")
                    self._drain()
            except SQLAlchemyError as error:
                logger.warning("no sign of life could be left: %s", type(error).__name__)
            if self._loop is not None and self.is_drained:
                logger.info("this engine is being stopped: what does not fit is given back")
                self._drain()
                self._loop.call_soon_threadsafe(self._released.set)
                return

    def _drain(self) -> None:
        """Called by the thread that leaves signs."""
        self.worker.is_draining = True
        if self._loop is not None:  # else nothing was ever asked of this engine
            asyncio.run_coroutine_threadsafe(self.worker.drain(0.7 * self.config.drain_s), self._loop)

    def _packs(self) -> dict[str, float]:
        """Mean tokens of the packs since the last sign, where there were any."""
        (packs, tokens), before = self.engine.pack_stats, self._packed
        self._packed = packs, tokens
        return {} if packs == before[0] else {"pack_tokens": round((tokens - before[1]) / (packs - before[0]), 1)}

    @property
    def is_drained(self) -> bool:
        """Whether Serve stops this replica. It does not say so before the end: but it checks its health no more, and
        counts a replica of this deployment as stopping."""
        if time.monotonic() - self._checked_s < UNCHECKED_S:
            return False
        context = serve.get_replica_context()
        try:
            application = serve.status().applications[context.app_name]
            states: dict[Any, int] = dict(application.deployments[context.deployment].replica_states)
            return states.get("STOPPING", 0) > 0
        except Exception:  # the controller is away, which is no reason to stop
            return False
