"""A whole service in one process, without Ray: ingresses on free ports of the loopback, and a loop that works on jobs.

The application and what stands before it in Ray's proxy, the store, `Worker`, `Leases`, `Outbox` and `Sweeper` are the
service's own. What is played here is what Ray does otherwise: `Crew` is the Dispatcher and an EngineReplica, with the
calls between them left out.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

from skylapse.runtime.engine.engine import Engine
from skylapse.serve.accounts.keys import SCOPES
from skylapse.serve.core.config import ServeConfig
from skylapse.serve.deployment.proxy_middleware import Edge
from skylapse.serve.engine.host_memory import host_memory
from skylapse.serve.engine.measurements import Measures
from skylapse.serve.engine.worker import Worker
from skylapse.serve.http.app import create_app
from skylapse.serve.jobs.garbage_collector import Sweeper
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.jobs.webhooks import deliver_due, open_secret
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.outbox import Outbox
from skylapse.serve.store.processes import DISPATCHER, ENGINE, READY
from skylapse.serve.store.traces import JobTraces
from skylapse.serve.telemetry.tracing import job_span

LOOK_S, BEAT_S = 0.02, 1.0
START_S = STOP_S = 20.0
Headers = dict[str, str]
SMALL = {"prompt": "a red circle", "num_inference_steps": 2, "num_frames": 5, "size": "64x64"}  # a quarter of a second


@dataclass(frozen=True)
class Service:
    """A running service, as tests see it. `urls`: one an ingress, without a path."""

    context: Context
    urls: list[str]
    webhook_secret: str
    working: threading.Event = field(repr=False)  # while it is clear, no job is begun

    @property
    def url(self) -> str:
        return self.urls[0]

    def key(self, tenant: str | None = None, scopes: tuple[str, ...] = SCOPES[:2], max_priority: int = 0) -> str:
        """Return a new key; of a new tenant, who sees nobody else's videos, unless one is named."""
        return self.context.keys.create(tenant or f"tenant-{secrets.token_hex(6)}", scopes, max_priority=max_priority)[
            1
        ]

    def client(self, key: str | None = None, ingress: int = 0, headers: Headers | None = None) -> httpx.Client:
        """Return a plain HTTP client of one ingress, with a new tenant's key unless one is given."""
        headers = {"authorization": f"Bearer {key or self.key()}", **(headers or {})}
        return httpx.Client(base_url=self.urls[ingress], headers=headers, timeout=60.0, trust_env=False)

    def make(self, key: str, **fields: Any) -> dict[str, Any]:
        """Make a video and return it once finished, small unless `fields` say otherwise."""
        with self.client(key) as client:
            made = client.post("/v1/videos", json={**SMALL, **fields})
            assert made.status_code == 200, made.text
        video = self.wait(key, made.json()["id"])
        assert video["status"] == "completed", video
        return video

    def wait(self, key: str, video_id: str, ingress: int = 0, at_most_s: float = 60.0) -> dict[str, Any]:
        """Wait for a video's end and return it."""
        with self.client(key, ingress) as client:
            until_s = time.monotonic() + at_most_s
            while (video := client.get(f"/v1/videos/{video_id}").json())["status"] in ("queued", "in_progress"):
                assert time.monotonic() < until_s, video
                time.sleep(LOOK_S)
        return dict(video)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Begin no job within the block: what is created stays queued. Jobs that run go on."""
        self.working.clear()
        try:
            yield
        finally:
            self.working.set()


@contextmanager
def serving(
    folder: Path, engine: Engine | Mapping[str, Engine], ingresses: int = 1, **config: Any
) -> Iterator[Service]:
    """Run a service with its data in `folder`, until the block is left; `config`: fields of `ServeConfig`.

    engine: of the one model, or deployment -> the engine of each of several.
    Every ingress opens the store for itself, as replicas in processes of their own do.
    """
    asked = ServeConfig(data=str(folder), **{"webhook_private": True, **config})
    contexts = [open_context(asked) for _ in range(ingresses + 1)]
    asked.scratch.mkdir(exist_ok=True)
    working, stop = threading.Event(), threading.Event()
    working.set()
    with ExitStack() as stack:
        for context in contexts:
            stack.callback(context.database.close)
        # asyncio turns Nagle's algorithm off only where the protocol is named; else an answer in two writes waits 40 ms
        # for its reader's delayed acknowledgement, and schemathesis's 530 requests take 30 s and not 10.
        sockets = [stack.enter_context(socket.socket(proto=socket.IPPROTO_TCP)) for _ in range(ingresses)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        apps = [Edge(create_app(context)) for context in contexts[1:]]
        configs = [uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=1) for app in apps]
        servers = [uvicorn.Server(config) for config in configs]
        crew = Crew(contexts[0], engine, working)
        ended: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(_run(servers, sockets, crew, stop))
            except BaseException as error:  # told to the test below
                ended.append(error)

        thread = threading.Thread(target=run, name="skylapse-test-service")
        thread.start()
        try:
            until_s = time.monotonic() + START_S
            while not all(server.started for server in servers):
                assert not ended and time.monotonic() < until_s, f"the service did not start: {ended}"
                time.sleep(LOOK_S)
            urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]
            yield Service(contexts[0], urls, crew.secret, working)
        finally:
            stop.set()
            thread.join(STOP_S)
            for worker in crew.workers:
                worker.keeper.close()
        assert not ended and not thread.is_alive(), f"the service did not stop well: {ended}"


async def _run(servers: list[uvicorn.Server], sockets: list[socket.socket], crew: Crew, stop: threading.Event) -> None:
    tasks = [asyncio.create_task(server.serve([s])) for server, s in zip(servers, sockets, strict=True)]
    tasks.append(asyncio.create_task(crew.work()))
    while not stop.is_set() and not any(task.done() for task in tasks):
        await asyncio.sleep(LOOK_S)
    for server in servers:
        server.should_exit = True
    tasks[-1].cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


class Crew:
    """Works on jobs and keeps the store tidy: a Dispatcher and an EngineReplica in one."""

    def __init__(self, context: Context, engine: Engine | Mapping[str, Engine], working: threading.Event) -> None:
        config = context.config
        self.context, self.config, self.working = context, config, working
        self.id = f"crew-{secrets.token_hex(4)}"
        self.leases = Leases(context.database, config.lease_s, config.max_attempts, context.ledger)
        self.outbox = Outbox(context.database, config.webhook_attempts)
        self.traces = JobTraces(context.database)
        self.sweeper = Sweeper(context)
        self.secret = open_secret(config)
        engines = engine if isinstance(engine, Mapping) else {"Engine": engine}
        self.groups = [config.group(deployment) for deployment in engines]
        self.measures = [
            Measures(engine.meter, group.name) for group, engine in zip(self.groups, engines.values(), strict=True)
        ]
        self.workers = [
            Worker(
                engine,
                self.leases,
                context.artifacts,
                measures,
                scratch=config.scratch,
                stage_deadline_s=config.stage_deadline_s,
                checkpoint_every=config.checkpoint_every,
                queue=group.queue,
                revision=group.revision,
                tracer=context.tracer,
            )
            for group, engine, measures in zip(self.groups, engines.values(), self.measures, strict=True)
        ]
        self._calls: list[set[asyncio.Task[str | None]]] = [set() for _ in self.groups]

    async def work(self) -> None:
        """Work until cancelled; the first error ends it."""
        async with asyncio.TaskGroup() as group:
            for task, seconds in (
                (self._call, LOOK_S),
                (self._deliver, LOOK_S),
                (self._trace, LOOK_S),
                (self._beat, BEAT_S),
                (self._tidy, BEAT_S),
            ):
                group.create_task(self._every(seconds, task))

    async def _every(self, seconds: float, task: Callable[[], Awaitable[None]]) -> None:
        while True:
            await task()
            await asyncio.sleep(seconds)

    async def _call(self) -> None:
        for calls in self._calls:
            for call in [call for call in calls if call.done()]:
                calls.remove(call)
                call.result()
        if not self.working.is_set():
            return
        loads = await asyncio.to_thread(self.leases.loads, self.id, [group.queue for group in self.groups])
        for (waiting, mine), group, worker, calls in zip(loads, self.groups, self.workers, self._calls, strict=True):
            for _ in range(min(group.engine_slots, waiting + mine) - len(calls)):
                calls.add(asyncio.create_task(worker.run_next(f"{self.id}-{secrets.token_hex(4)}")))

    async def _deliver(self) -> None:
        await deliver_due(self.outbox, self.secret, self.config, tracer=self.context.tracer)

    async def _trace(self) -> None:
        if self.context.tracer is not None:
            for ended in await asyncio.to_thread(self.traces.take):
                self.context.tracer.write(job_span(*ended))

    async def _beat(self) -> None:
        beat = self.context.processes.beat
        await asyncio.to_thread(beat, f"{self.id}-dispatcher", DISPATCHER, {"calls": sum(map(len, self._calls))})
        for index, (group, worker, measures) in enumerate(zip(self.groups, self.workers, self.measures, strict=True)):
            facts = {**group.facts, "state": READY, "slots": group.engine_slots, **measures.facts}
            facts |= {"running": len(worker.keeper.held)} | host_memory() | worker.engine.decoders.report.facts
            await asyncio.to_thread(beat, f"{self.id}-engine-{index}", ENGINE, facts)
            await asyncio.to_thread(measures.tell, self.context.database, self.context.ledger.counters)

    async def _tidy(self) -> None:
        await asyncio.to_thread(self.leases.expire)
        await asyncio.to_thread(self.sweeper.sweep)
