"""The deployment that makes clips: one engine a replica, which works on as many claimed jobs as it has slots."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import ray
import torch
from ray import serve
from sqlalchemy.exc import SQLAlchemyError

from ...runtime.checkpoints.hub import Download, resolve_folder
from ...runtime.core.config import load_settings
from ...runtime.core.threads import usable_cores
from ...runtime.engine.engine import Engine
from ...runtime.engine.warm_up import warm_up
from ..core.logs import log_as_json
from ..engine.gpu import gpu_reader, open_nvml
from ..engine.gpu_health import GpuHealth, GpuWatch
from ..engine.host_memory import host_memory
from ..engine.measurements import Measures
from ..engine.startup import StartTimes, in_words
from ..engine.worker import Worker
from ..jobs.garbage_collector import sweep_scratch
from ..jobs.served_models import check_fingerprint
from ..jobs.services import Context, open_context
from ..store.leases import Leases
from ..store.processes import DRAINING, ENGINE, FAILED, LOADING, READY, SICK
from .loopback import stay_on_loopback

logger = logging.getLogger(__name__)
T = TypeVar("T")
BEAT_S = 1.0
DOWNLOAD_LINE_S = 10.0  # from one line of a download to the next
NICE = 10
MAX_REASON = 1000  # characters of why a start failed
UNCHECKED_S = 5.0  # health checks come every second; a replica that is being drained gets none


def give_way() -> None:
    """Lower the priority of this thread, and of those that it starts; not of the process.

    Clients who ask where their job stands do not wait for its steps, and neither do health checks and signs of life.
    """
    os.nice(NICE)  # Linux counts it by threads


def in_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread of its own and return its result, or raise its error."""
    with ThreadPoolExecutor(1, "skylapse-load") as thread:
        return thread.submit(call).result()


class EngineReplica:
    """The deployment. A request for `run_next` lasts as long as its job, so Serve sees the load and lets it end."""

    def __init__(self, config: dict[str, Any], deployment: str = "Engine") -> None:
        """Start the engine. deployment: the name of its group in the configuration."""
        self._began_s = time.perf_counter()
        log_as_json("engine")
        stay_on_loopback()
        context = open_context(config)
        self.config, self.tracer = context.config, context.tracer
        self.processes, self.tenants = context.processes, context.tenants
        self.group = self.config.group(deployment)
        self.id = serve.get_replica_context().replica_id.unique_id
        self._standing: dict[str, Any] = self.group.facts | {"state": LOADING}
        self._download_told_s = float("-inf")
        self._closing = threading.Event()
        self.gpu: GpuWatch | None = None
        self._beating = threading.Thread(target=self._beat, name="skylapse-heartbeat", daemon=True)
        self._beating.start()
        try:
            self._open(context)
        except Exception as error:
            self._tell_failure(error)
            raise

    def _open(self, context: Context) -> None:
        """Load the model, and take work from then on."""
        self._load_times = (0.0, 0.0)
        self.gpu = self.watch_gpu()
        self.engine = in_thread(self.load)
        self.measures = Measures(self.engine.meter, self.group.name)
        self.database, self.counters = context.database, context.ledger.counters
        self.config.scratch.mkdir(parents=True, exist_ok=True)
        sweep_scratch(self.config.scratch)
        self.worker = Worker(
            self.engine,
            Leases(
                context.database,
                self.config.lease_s,
                self.config.max_attempts,
                context.ledger,
                context.tenant_weights,
            ),
            context.artifacts,
            self.measures,
            scratch=self.config.scratch,
            stage_deadline_s=self.config.stage_deadline_s,
            checkpoint_every=self.config.checkpoint_every,
            queue=self.group.queue,
            revision=self.group.revision,
            tracer=self.tracer,
        )
        self._checked_s = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._released = asyncio.Event()  # calls that a drained engine keeps to itself may return
        self._sick_s: float | None = None  # since when
        self._packed = (0, 0)
        self.started = StartTimes(*self._load_times, time.perf_counter() - self._began_s).facts
        logger.info(in_words(self.started))
        facts = {"state": READY, "fingerprint": self.engine.model.fingerprint}
        self._standing = self.group.facts | facts  # without what was told of a download

    def _tell_failure(self, error: Exception) -> None:
        """Leave the reason in the store, where whoever waits reads it; Serve would tell it after twenty tries."""
        self._closing.set()
        self._beating.join()
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        logger.error("the engine did not start: %s", reason)
        facts = {"state": FAILED, "error": reason, "is_mistake": isinstance(error, ValueError | FileNotFoundError)}
        with suppress(SQLAlchemyError):
            self.processes.beat(self.id, ENGINE, self._standing | facts)

    def watch_gpu(self) -> GpuWatch | None:
        """Watch the GPU that this engine is about to load onto. Raises GpuSick if nothing can work on it."""
        if not self.config.gpu_health or self.group.device == "cpu" or not torch.cuda.is_available():
            return None
        opened = open_nvml(0)  # the only one that Ray shows
        return None if opened is None else GpuWatch(GpuHealth(*opened, self.config.ignored_xids))

    def load(self) -> Engine:
        """Return the engine, after doing what its first request would otherwise wait for."""
        group = self.group
        cache_dir = load_settings().cache_dir
        folder = resolve_folder(group.model, cache_dir, group.revision, self._tell_download)
        check_fingerprint(group, folder)
        began_s = time.perf_counter()
        torch.set_num_threads(group.threads or usable_cores())  # Ray has set one for a fraction of a core
        engine = Engine.from_pretrained(
            group.model,
            group.device,
            group.dtype,
            cache_dir,
            quantize=group.quantize,
            offload=group.offload,
            revision=group.revision,
        )
        if engine.device.type == "cpu":
            give_way()
        _ = engine.memory, engine.previewer
        engine.decoders.prepare()
        loaded_s = time.perf_counter()
        if engine.device.type == "cuda" if group.warm_up is None else group.warm_up:
            warm_up(engine)
        self._load_times = loaded_s - began_s, time.perf_counter() - loaded_s
        engine.decoders.build_in_background()
        engine.start_stepping()
        return engine

    def _tell_download(self, progress: Download) -> None:
        """Put the progress of a download into the next heartbeat, and now and then into the log."""
        facts = {"bytes": progress.num_bytes, "total_bytes": progress.total_bytes, "progress": round(progress.share, 4)}
        self._standing = self._standing | facts
        if progress.share < 1 and time.monotonic() - self._download_told_s < DOWNLOAD_LINE_S:
            return
        self._download_told_s = time.monotonic()
        logger.info("downloading %s: %s", progress.model, progress, extra={"facts": facts})

    async def run_next(self, owner: str) -> str | None:
        """Work on the next job to its end, as `owner`, by which its lease is found when this replica dies.

        The job goes on when the caller does not: a dispatcher's death is no reason to begin again.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            # They wait for store, disk and encoder. Python's default is as many as there are cores, and 4.
            initializer = give_way if self.engine.device.type == "cpu" else None
            self._loop.set_default_executor(ThreadPoolExecutor(32, "skylapse", initializer))
        if self.worker.is_draining:  # an answer would bring the next call at once: Serve prefers who has little to do
            await self._released.wait()
            return None
        return await asyncio.shield(asyncio.ensure_future(self.worker.run_next(owner)))

    def check_health(self) -> None:
        """Called by Serve every second; raises where the replica has to be replaced.

        It waits for nothing, and the loop that it runs on does no work of a job: threads that do have a lower priority.
        """
        self._checked_s = time.monotonic()
        if self.worker.is_lost:
            raise RuntimeError("the engine's device is lost, or a stage of it has stalled")
        if not self.worker.keeper.is_alive:
            raise RuntimeError("the thread that keeps leases has died")
        if self._sick_s is not None and self._is_rid_of_jobs:
            raise RuntimeError(f"the GPU is sick: {self._standing['reason']}")

    async def __del__(self) -> None:
        """Called by Serve when nothing is ongoing any more."""
        self._closing.set()
        if "worker" in self.__dict__:  # else its start failed
            await asyncio.to_thread(self.worker.close)
        if self.gpu is not None:
            await asyncio.to_thread(self.gpu.close)
        with suppress(SQLAlchemyError):
            await asyncio.to_thread(self.processes.leave, self.id)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    def _beat(self) -> None:
        """Leave a heartbeat every second with this engine's facts, and apply the settings of operators."""
        read_facts: Callable[[], dict[str, Any]] | None = None
        while True:
            is_asked = False
            try:
                if read_facts is None and self._standing["state"] != LOADING:
                    read_facts = self._facts_reader()
                is_asked = self.processes.beat(self.id, ENGINE, self._standing | (read_facts() if read_facts else {}))
                if read_facts is not None:
                    self.measures.tell(self.database, self.counters)
                    if self.tracer is not None:
                        self.tracer.tell(self.database, self.counters)
                    self.engine.weigh_tenants(self.tenants.weights())
            except SQLAlchemyError as error:
                logger.warning("no sign of life could be left: %s", type(error).__name__)
            if read_facts is not None:
                self._drain_where_due(is_asked)
            if self._closing.wait(BEAT_S):
                return

    def _drain_where_due(self, is_asked: bool) -> None:
        """Begin to drain when the GPU is sick, an operator asks for it, or Serve has begun to stop this engine."""
        if self.gpu is not None and self.gpu.reason is not None and self._sick_s is None:
            self._standing = self._standing | {"reason": self.gpu.reason}
            self.measures.sick()
            self._drain(SICK, 0.0)
            self._sick_s = time.monotonic()
        if is_asked and self._standing["state"] == READY:
            logger.info("an operator has this engine drained: it takes no more jobs")
            self._drain(DRAINING, 0.7 * self.config.drain_s)
        if self._loop is not None and not self._released.is_set() and self.is_drained:
            if self._standing["state"] == READY:
                logger.info("this engine is being stopped: what does not fit is given back")
                self._drain(DRAINING, 0.7 * self.config.drain_s)
            self._loop.call_soon_threadsafe(self._released.set)

    def _drain(self, state: str, budget_s: float) -> None:
        """Take no more jobs and give back those that do not fit into `budget_s`; called by the heartbeat thread."""
        self._standing = self._standing | {"state": state}
        self.worker.is_draining = True
        if self._loop is not None:  # else nothing was ever asked of this engine
            asyncio.run_coroutine_threadsafe(self.worker.drain(budget_s), self._loop)

    @property
    def _is_rid_of_jobs(self) -> bool:
        """True once a draining engine has given back all jobs, or had the time to: a sick GPU may never end a step."""
        assert self._sick_s is not None
        return self.worker.is_idle or time.monotonic() - self._sick_s > self.config.drain_s

    def _facts_reader(self) -> Callable[[], dict[str, Any]]:
        """Return a function that reads the facts of an engine that takes work."""
        device = self.engine.device
        read_device = gpu_reader(device.index or 0) if device.type == "cuda" else host_memory
        fixed = {"device": str(device), "slots": self.group.engine_slots, "gpus": ray.get_gpu_ids(), **self.started}

        def read() -> dict[str, Any]:
            told = fixed | self.measures.facts | self._packs() | read_device()
            told |= self.engine.decoders.report.facts | self.engine.model.residency.report.facts
            told |= {} if self.tracer is None else self.tracer.facts
            told |= {} if self.gpu is None else self.gpu.health.facts
            return told | {"running": len(self.worker.keeper.held), "draining": self.worker.is_draining}

        return read

    def _packs(self) -> dict[str, float]:
        """Return the mean tokens of the packs since the last heartbeat, if there were any."""
        (packs, tokens), before = self.engine.pack_stats, self._packed
        self._packed = packs, tokens
        return {} if packs == before[0] else {"pack_tokens": round((tokens - before[1]) / (packs - before[0]), 1)}

    @property
    def is_drained(self) -> bool:
        """Return whether Serve stops this replica, which it does not announce: it only stops checking its health, and
        counts a replica of this deployment as stopping.
        """
        if time.monotonic() - self._checked_s < UNCHECKED_S:
            return False
        context = serve.get_replica_context()
        try:
            application = serve.status().applications[context.app_name]
            states: dict[Any, int] = dict(application.deployments[context.deployment].replica_states)
            return states.get("STOPPING", 0) > 0
        except Exception:  # the controller is away, which is no reason to stop
            return False
