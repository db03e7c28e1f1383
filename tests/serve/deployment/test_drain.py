"""A drained engine claims nothing, gives back what does not fit, and keeps calls to itself; without Ray's processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skylapse.serve.jobs.artifacts import ArtifactStore
from skylapse.serve.jobs.services import Context, open_context
from skylapse.serve.store.jobs import Job
from skylapse.serve.store.leases import Leases
from skylapse.serve.store.processes import DISPATCHER, ENGINE

pytest.importorskip("ray")
RAYS = ("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray, when it is imported


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    context = open_context({"data": str(tmp_path / "data")})
    yield context
    context.database.close()


def worker_of(context: Context) -> Any:
    """A worker whose jobs end when they are stopped, and never else."""
    import torch

    from skylapse.runtime.engine.meter import Meter
    from skylapse.serve.engine.measurements import Measures
    from skylapse.serve.engine.worker import Worker

    class Endless(Worker):
        async def _work(self, job: Job, *others: Any) -> bool:
            await asyncio.Event().wait()
            return True

    meter, cpu = Meter(torch.device("cpu")), SimpleNamespace(type="cpu")
    model = SimpleNamespace(fingerprint="0" * 64)
    return Endless(
        SimpleNamespace(close=lambda: None, meter=meter, device=cpu, model=model),  # type: ignore[arg-type]
        Leases(context.database),
        ArtifactStore(str(context.config.scratch / "artifacts")),
        Measures(meter, "demo"),
        scratch=context.config.scratch,
        stage_deadline_s=60.0,
        checkpoint_every=5,
    )


@pytest.mark.filterwarnings(*RAYS)
def test_a_worker_that_drains_gives_back_and_claims_no_more(context: Context) -> None:
    job = context.jobs.create("a", {"prompt": "a star"})

    async def run() -> None:
        worker = worker_of(context)
        working = asyncio.ensure_future(worker.run_next("one"))
        until_s = time.monotonic() + 10
        while not worker.keeper.held:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.01)
        await worker.drain(0.2)
        assert await working == job.id and worker.is_draining
        assert await worker.run_next("two") is None
        worker.close()

    asyncio.run(run())
    left = context.jobs.get("a", job.id)
    assert (left.state, left.owner, left.attempts, left.is_suspect) == ("queued", None, 0, False)


@pytest.mark.filterwarnings(*RAYS)
def test_a_drained_replica_keeps_calls_until_it_is_stopped() -> None:
    """An answer would bring the next call at once, and the engines that work would get none."""
    from skylapse.serve.deployment.replica import EngineReplica

    async def run() -> None:
        loop = asyncio.get_running_loop()
        replica: Any = SimpleNamespace(_loop=loop, worker=SimpleNamespace(is_draining=True), _released=asyncio.Event())
        call = asyncio.ensure_future(EngineReplica.run_next(replica, "owner"))
        await asyncio.sleep(0.05)
        assert not call.done()
        replica._released.set()
        assert await call is None

    asyncio.run(run())


@pytest.mark.filterwarnings(*RAYS)
def test_a_dispatcher_makes_up_for_calls_that_are_kept(context: Context) -> None:
    from skylapse.serve.deployment.dispatcher import Caller, Dispatcher

    context.jobs.create("a", {})
    facts = context.config.groups[0].facts
    context.processes.beat("one", ENGINE, {**facts, "slots": 3, "draining": True})
    context.processes.beat("two", ENGINE, {**facts, "slots": 8, "draining": False})
    called: list[str] = []

    async def run_next(caller: Caller, owner: str) -> None:
        called.append(owner)
        await asyncio.Event().wait()

    (group,) = context.config.groups
    caller = Caller(group, SimpleNamespace())  # type: ignore[arg-type]
    dispatcher: Any = SimpleNamespace(
        id="dispatcher", processes=context.processes, leases=Leases(context.database), callers=[caller], tracer=None
    )
    dispatcher._run_next = run_next

    async def run() -> None:
        await Dispatcher._beat(dispatcher)
        await Dispatcher._call(dispatcher)
        await asyncio.sleep(0)
        assert len(called) == 4  # one job, and the three slots of the engine that drains
        for call in caller.calls:
            call.cancel()

    asyncio.run(run())
    assert [process.kind for process in context.processes.alive(kind=DISPATCHER)] == [DISPATCHER]
