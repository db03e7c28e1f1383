"""Works on jobs with one engine: claims, asks, keeps checkpoints and previews, finishes, stores.

Everything that a client waits for is written under the job's lease, so a worker whose job was taken away, cancelled or
deleted writes nothing more. What fails because store or artifacts do not answer is tried again until they do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from sqlalchemy.exc import SQLAlchemyError

from ...runtime.core.events import Checkpointed, DeviceLost, Event, Failed, Finished, Preview, Progress
from ...runtime.core.request import Video
from ...runtime.core.usage import Account, Usage
from ...runtime.engine.engine import Engine
from ...runtime.engine.request_checkpoint import INDEX
from ...runtime.media.postprocess import Artifact
from ..jobs.artifacts import ArtifactStore
from ..jobs.failures import failure
from ..jobs.job_request import INPUTS, LATENTS, input_key, preview_every
from ..store.jobs import Job
from ..store.leases import Leases, Standing, Weights
from ..store.ledger import Used
from ..store.model_queue import ModelQueue
from ..telemetry.tracing import Tracer
from .background import Aside
from .job_media import finished, preview_webp, shown
from .job_spans import JobSpans
from .lease_heartbeat import DRAINED, STALLED, Held, Keeper
from .measurements import Measures

logger = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
LOOK_S = 0.02  # between two looks whether an engine is through with a job that was aborted


class Worker:
    """Works on any number of jobs at a time, on one event loop."""

    def __init__(
        self,
        engine: Engine,
        leases: Leases,
        artifacts: ArtifactStore,
        measures: Measures,
        *,
        scratch: Path,
        stage_deadline_s: float,
        checkpoint_every: int,
        queue: ModelQueue | None = None,
        revision: str | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.engine, self.leases, self.artifacts, self.measures = engine, leases, artifacts, measures
        self.scratch, self.checkpoint_every, self.tracer = scratch, checkpoint_every, tracer
        self.stage_deadline_s = stage_deadline_s
        self.queue, self.weights = queue, Weights(engine.model.fingerprint, revision)
        self.keeper = Keeper(leases, stage_deadline_s, engine.device.type)
        self.is_lost = False  # nothing comes out of this engine any more
        self.is_draining = False  # no job is begun any more
        self._running = 0
        self._has_suspect = False
        self._claiming = asyncio.Lock()

    async def run_next(self, owner: str) -> str | None:
        """Claim a job as `owner` and work on it to its end; return its id, or None if there was none to claim."""
        async with self._claiming:
            if self.is_lost or self.is_draining or self._has_suspect:
                return None
            claim = partial(self.leases.claim, owner, queue=self.queue, weights=self.weights)
            found = await persist(partial(claim, is_idle=self._running == 0))
            if not found:
                return None
            (job,) = found
            self._has_suspect = job.is_suspect
            self._running += 1
        try:
            await self._hold(job)
        finally:
            self._running -= 1
            if job.is_suspect:
                self._has_suspect = False
        return job.id

    async def drain(self, budget_s: float) -> None:
        """Begin no more jobs, and finish those that fit into `budget_s` by estimate.

        The rest is given back, to go on from its checkpoint elsewhere.
        """
        self.is_draining = True
        until_s = time.monotonic() + budget_s
        for held in self.keeper.held:
            if held.standing.eta_s is None or held.standing.eta_s > budget_s / 2:
                held.end(DRAINED)
        while self._running and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
        for held in self.keeper.held:
            held.end(DRAINED)

    @property
    def is_idle(self) -> bool:
        """True if it works on no job, and has given back those that it does not finish."""
        return self._running == 0

    def close(self) -> None:
        self.keeper.close()
        self.engine.close()

    # --- one job --------------------------------------------------------------------------------------------------

    async def _hold(self, job: Job) -> None:
        """Work on a job while the lease is kept; `held.reason` tells what ended it early."""
        loop = asyncio.get_running_loop()
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=f"{job.id}-", dir=self.scratch))
        work: asyncio.Task[bool] | None = None
        account = Account()

        def stop() -> None:
            if work is not None:
                loop.call_soon_threadsafe(work.cancel)

        with self.keeper.holding(job, account, stop, JobSpans(self.tracer, job, self.leases.lease_s)) as held:
            work = loop.create_task(self._work(job, held, folder))
            await asyncio.wait([work])
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if work.cancelled():
            held.spans.end(held.reason or "stopped", is_error=held.reason == STALLED)
            self.measures.ended(held.reason or "stopped")
            if held.reason == DRAINED:
                await persist(partial(self.leases.release, job))
            elif held.reason == STALLED:
                self.is_lost = True
        elif work.result():
            return
        await self._settle(job, account)

    async def _settle(self, job: Job, account: Account) -> None:
        """Write down what a job used that this worker has not ended, once its engine is through with it."""
        until_s = time.monotonic() + self.stage_deadline_s
        while account.is_open and not self.is_lost and time.monotonic() < until_s:
            self.engine.meter.read()
            await asyncio.sleep(LOOK_S)
        await persist(partial(self.leases.settle, job, self._used(account)))

    def _used(self, account: Account) -> Used:
        return Used(account.usage, self.engine.device.type)

    async def _work(self, job: Job, held: Held, folder: Path) -> bool:
        """Return True if the job ended here with its usage; False if another process ended it, or goes on with it."""
        held.report(Standing("encode", job.step, job.num_steps))
        logger.info("job %s begins at step %d, attempt %d", job.id, job.checkpoint_step or 0, job.epoch)
        held.spans.reach("encode")
        aside = Aside()
        try:
            files = await persist(partial(self._inputs, job, folder))
            ended = await self._denoise(job, held, aside, files, folder)
            if isinstance(ended, Failed):
                raise ended.error
            began_s = time.perf_counter()
            held.report(replace(held.standing, stage="finish", eta_s=0.0))
            held.spans.reach("finish")
            artifacts = await asyncio.to_thread(self._finish, job, held, files, ended.video, folder)
            held.spans.reach("store")
            stored = {}
            for variant, path in artifacts.files.items():
                key = f"jobs/{job.id}/{job.epoch}/{path.name}"
                stored[variant] = asdict(await persist(partial(self.artifacts.write, key, path, replace=True)))
            aside.drop()
            held.spans.end("completed")
            stages_s = {**ended.video.metadata.timings_s, "finish": time.perf_counter() - began_s}
            used = self._used(held.account)
            if await persist(partial(self.leases.complete, job, stored, used, stages_s)):
                self.measures.ended("completed")
                logger.info("job %s is completed", job.id)
                return True
        except DeviceLost as error:
            self.is_lost = True
            held.spans.end("device_lost", is_error=True)
            logger.error("job %s is given back: %s", job.id, error)
            await persist(partial(self.leases.release, job))
            self.measures.ended("device_lost")
        except Exception as error:
            code, message = failure(error)
            held.spans.end(code, is_error=True)
            logger.warning("job %s failed: %s", job.id, code, exc_info=error if code == "internal_error" else None)
            if await persist(partial(self.leases.fail, job, code, message, self._used(held.account))):
                self.measures.ended("failed")
                return True
        finally:
            aside.drop()
        return False

    def _finish(self, job: Job, held: Held, files: dict[str, Path], video: Video, folder: Path) -> Artifact:
        """Write the clip's files; the time is charged to the job, like that of its encoding and decoding."""
        began_s = time.perf_counter()
        try:
            return finished(job.request, files, video, folder)
        finally:
            self.engine.meter.add_beside(held.account, time.perf_counter() - began_s)

    async def _denoise(
        self, job: Job, held: Held, aside: Aside, files: dict[str, Path], folder: Path
    ) -> Finished | Failed:
        """Denoise from the job's checkpoint if this engine can resume it, else from the beginning."""
        checkpoint = folder / "checkpoint"
        if job.checkpoint is not None:
            await persist(partial(self._fetch, job.checkpoint, checkpoint))
            try:
                events = self.engine.stream_resumed(checkpoint, account=held.account)
                return await self._follow(job, held, aside, events)
            except ValueError as error:  # another model's or release's, or broken; a request's own errors are events
                logger.warning("job %s starts again: %s", job.id, error)
                await persist(partial(self.leases.restart, job))
        request = await asyncio.to_thread(shown, job.request, files)
        request = request.resolved(self.engine.defaults, self.engine.limits)
        latents = torch.from_numpy(np.load(files[LATENTS])) if LATENTS in files else None
        events = self.engine.stream(
            request,
            latents,
            held.account,
            tenant=job.tenant,
            priority=job.priority,
            preview_every=preview_every(job.request),
            checkpoint_every=self.checkpoint_every,
            checkpoint_dir=checkpoint,
        )
        return await self._follow(job, held, aside, events)

    async def _follow(
        self, job: Job, held: Held, aside: Aside, events: AsyncGenerator[Event, None]
    ) -> Finished | Failed:
        last: Progress | None = None
        kept: dict[int, Usage] = {}  # step -> what had been used by then
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    last = event
                    stage = "denoise" if event.step < event.num_steps else "decode"
                    held.report(Standing(stage, event.step, event.num_steps, event.eta_s))
                    held.spans.reach("denoise", ago_s=event.step_s)  # the first one is told of after it
                    held.spans.note(steps=event.num_steps, steps_skipped=event.num_skipped)
                    held.spans.reach(stage)
                elif isinstance(event, Preview):
                    aside.put("preview", partial(self._show, job, event))
                elif isinstance(event, Checkpointed):
                    assert event.usage is not None
                    kept[event.step] = event.usage
                    aside.put("checkpoint", partial(self._keep, job, event, kept))
                elif isinstance(event, Finished):
                    self.measures.made(event.video, last, job.request["tokens"])
                    return event
                else:
                    return event
        raise AssertionError("an engine's events end with Finished or Failed")

    # --- what is stored on the way --------------------------------------------------------------------------------

    def _inputs(self, job: Job, folder: Path) -> dict[str, Path]:
        """Fetch the files that the request shows to this machine."""
        files = {}
        for name in INPUTS:
            if name in job.request.get("inputs", ()):
                files[name] = self._bring(input_key(job.id, name), folder / name)
        return files

    def _fetch(self, prefix: str, folder: Path) -> None:
        for key in self.artifacts.keys(prefix):
            self._bring(key, folder / key.rpartition("/")[2])

    def _bring(self, key: str, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in self.artifacts.read(key):
                file.write(piece)
        return path

    async def _keep(self, job: Job, event: Checkpointed, kept: dict[int, Usage]) -> None:
        """Store the newest checkpoint, then let the job's row point at it."""
        newest = await asyncio.to_thread(_snapshot, event.folder)
        if newest is None:
            return
        snapshot, step = newest
        prefix = f"jobs/{job.id}/{job.epoch}/checkpoint-{step}"
        for path in sorted(snapshot.iterdir()):
            await persist(partial(self.artifacts.write, f"{prefix}/{path.name}", path, replace=True))
        used = Used(kept.get(step, event.usage or Usage()), self.engine.device.type)
        if await persist(partial(self.leases.checkpoint, job, prefix, step, used)):
            await asyncio.to_thread(self._forget, job, "checkpoint-", step)  # nobody else reads while the lease is ours
        if job.is_suspect:
            self._has_suspect = False  # it has got further than its engine did
        await asyncio.to_thread(shutil.rmtree, snapshot, ignore_errors=True)

    async def _show(self, job: Job, preview: Preview) -> None:
        """Store a preview, then let the job's row point at it."""
        every = preview_every(job.request)
        picture = await asyncio.to_thread(preview_webp, preview.frames, job.request["fps"] / 4)
        key = f"jobs/{job.id}/{job.epoch}/preview-{preview.step}.webp"
        written = await persist(partial(self.artifacts.write, key, picture, replace=True))
        facts = {**asdict(written), "step": preview.step, "index": preview.step // every - 1}
        await persist(partial(self.leases.preview, job, facts))
        if preview.step == every:
            self.measures.previewed(time.time() - job.created_at)

    def _forget(self, job: Job, stem: str, step: int) -> None:
        """Remove files that this attempt has stored for earlier steps."""
        for key in self.artifacts.keys(f"jobs/{job.id}/{job.epoch}"):
            name = key.split("/")[3]
            if name.startswith(stem) and name != f"{stem}{step}":
                self.artifacts.remove(key.rpartition("/")[0])


async def persist(call: Callable[[], T]) -> T:
    """Return the result of a call on the store or the artifacts, in a thread, tried again while they do not answer.

    A full disk and an unreachable database are somebody's to mend, and the work of minutes is not thrown away
    meanwhile: the lease goes on being renewed until the stage's deadline.
    """
    wait_s = FIRST_RETRY_S
    while True:
        try:
            return await asyncio.to_thread(call)
        except FileNotFoundError:
            raise
        except (SQLAlchemyError, OSError) as error:
            logger.warning("tried again in %.1f s: %s", wait_s, type(error).__name__)
        await asyncio.sleep(wait_s)
        wait_s = min(LONGEST_RETRY_S, 2 * wait_s)


def _snapshot(folder: Path) -> tuple[Path, int] | None:
    """Return (a hard-linked copy of the newest checkpoint, its step); None while the next one is replacing it."""
    try:
        record = (folder / INDEX).read_text()
        name = json.loads(record)["tensors"]
        step = int(name.removeprefix("state-").removesuffix(".safetensors"))
        copy = folder.with_name(f"checkpoint-{step}")
        copy.mkdir()
        os.link(folder / name, copy / name)
        (copy / INDEX).write_text(record)
    except (FileNotFoundError, FileExistsError):
        return None
    return copy, step
