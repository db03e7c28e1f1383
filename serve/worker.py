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

from ..runtime.engine import Engine
from ..runtime.events import Checkpointed, DeviceLost, Event, Failed, Finished, Preview, Progress
from ..runtime.resume import INDEX
from .artifacts import ArtifactStore
from .aside import Aside
from .asking import INPUTS, LATENTS, input_key, preview_every
from .clip import finished, preview_webp, shown
from .failures import failure
from .keeper import DRAINED, STALLED, Held, Keeper
from .measures import Measures
from .store.jobs import Job
from .store.leases import Leases, Standing, Weights
from .store.model_queue import ModelQueue

logger = logging.getLogger(__name__)
T = TypeVar("T")
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0


class Worker:
    """Any number of jobs at a time, on one event loop."""

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
    ) -> None:
        self.engine, self.leases, self.artifacts, self.measures = engine, leases, artifacts, measures
        self.scratch, self.checkpoint_every = scratch, checkpoint_every
        self.queue, self.weights = queue, Weights(engine.model.fingerprint, revision)
        self.keeper = Keeper(leases, stage_deadline_s)
        self.is_lost = False  # nothing comes out of this engine any more
        self._running = 0
        self._has_suspect = False
        self._claiming = asyncio.Lock()

    async def run_next(self, owner: str) -> str | None:
        """Claim a job as `owner` and work on it to its end; its id, or None where there was none to claim."""
        async with self._claiming:
            if self.is_lost or self._has_suspect:
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
        """Finish what fits into so many seconds by estimate; give the rest back, to go on from its checkpoint."""
        until_s = time.monotonic() + budget_s
        for held in self.keeper.held:
            if held.standing.eta_s is None or held.standing.eta_s > budget_s / 2:
                held.end(DRAINED)
        while self._running and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
        for held in self.keeper.held:
            held.end(DRAINED)

    def close(self) -> None:
        self.keeper.close()
        self.engine.close()

    # --- one job --------------------------------------------------------------------------------------------------

    async def _hold(self, job: Job) -> None:
        """Work on a job while the lease is kept; `held.reason` tells what ended it early."""
        loop = asyncio.get_running_loop()
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=f"{job.id}-", dir=self.scratch))
        work: asyncio.Task[None] | None = None

        def stop() -> None:
            if work is not None:
                loop.call_soon_threadsafe(work.cancel)

        with self.keeper.holding(job, stop) as held:
            work = loop.create_task(self._work(job, held, folder))
            await asyncio.wait([work])
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if not work.cancelled():
            return work.result()
        self.measures.ended(held.reason or "stopped")
        if held.reason == DRAINED:
            await persist(partial(self.leases.release, job))
        elif held.reason == STALLED:
            self.is_lost = True

    async def _work(self, job: Job, held: Held, folder: Path) -> None:
        held.report(Standing("encode", job.step, job.num_steps))
        logger.info("job %s begins at step %d, attempt %d", job.id, job.checkpoint_step or 0, job.epoch)
        aside = Aside()
        try:
            files = await persist(partial(self._inputs, job, folder))
            ended = await self._denoise(job, held, aside, files, folder)
            if isinstance(ended, Failed):
                raise ended.error
            began_s = time.perf_counter()
            held.report(replace(held.standing, stage="finish", eta_s=0.0))
            artifacts = await asyncio.to_thread(finished, job.request, files, ended.video, folder)
            stored = {}
            for variant, path in artifacts.files.items():
                key = f"jobs/{job.id}/{job.epoch}/{path.name}"
                stored[variant] = asdict(await persist(partial(self.artifacts.write, key, path, replace=True)))
            aside.drop()
            if await persist(partial(self.leases.complete, job, stored)):
                self.measures.ended("completed", time.perf_counter() - began_s)
                logger.info("job %s is completed", job.id)
        except DeviceLost as error:
            self.is_lost = True
            logger.error("job %s is given back: %s", job.id, error)
            await persist(partial(self.leases.release, job))
        except Exception as error:
            code, message = failure(error)
            logger.warning("job %s failed: %s", job.id, code, exc_info=error if code == "internal_error" else None)
            if await persist(partial(self.leases.fail, job, code, message)):
                self.measures.ended("failed")
        finally:
            aside.drop()

    async def _denoise(
        self, job: Job, held: Held, aside: Aside, files: dict[str, Path], folder: Path
    ) -> Finished | Failed:
        """From the job's checkpoint where this engine can go on from it, else from the beginning."""
        checkpoint = folder / "checkpoint"
        if job.checkpoint is not None:
            await persist(partial(self._fetch, job.checkpoint, checkpoint))
            try:
                events = self.engine.stream_resumed(checkpoint)
                self.measures.resumed(max(0, job.step - job.checkpoint_step))
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
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    last = event
                    stage = "denoise" if event.step < event.num_steps else "decode"
                    held.report(Standing(stage, event.step, event.num_steps, event.eta_s))
                elif isinstance(event, Preview):
                    aside.put("preview", partial(self._show, job, event))
                elif isinstance(event, Checkpointed):
                    aside.put("checkpoint", partial(self._keep, job, event.folder))
                elif isinstance(event, Finished):
                    self.measures.made(event.video, last, job.request["tokens"])
                    return event
                else:
                    return event
        raise AssertionError("an engine's events end with Finished or Failed")

    # --- what is stored on the way --------------------------------------------------------------------------------

    def _inputs(self, job: Job, folder: Path) -> dict[str, Path]:
        """The files that the request shows, brought to this machine."""
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

    async def _keep(self, job: Job, folder: Path) -> None:
        """Store the newest checkpoint, then let the job's row point at it."""
        newest = await asyncio.to_thread(_snapshot, folder)
        if newest is None:
            return
        snapshot, step = newest
        prefix = f"jobs/{job.id}/{job.epoch}/checkpoint-{step}"
        for path in sorted(snapshot.iterdir()):
            await persist(partial(self.artifacts.write, f"{prefix}/{path.name}", path, replace=True))
        if await persist(partial(self.leases.checkpoint, job, prefix, step)):
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
        """Remove what this attempt has stored of earlier steps."""
        for key in self.artifacts.keys(f"jobs/{job.id}/{job.epoch}"):
            name = key.split("/")[3]
            if name.startswith(stem) and name != f"{stem}{step}":
                self.artifacts.remove(key.rpartition("/")[0])


async def persist(call: Callable[[], T]) -> T:
    """The result of a call on the store or the artifacts, in a thread, tried again while they do not answer.

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
    """(a copy of the newest checkpoint by hard links, its step); None where the next one is replacing it just now."""
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
