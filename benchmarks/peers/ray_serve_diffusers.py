"""A plain Ray Serve + diffusers service, as Ray's own examples build one: what skylapse's service is compared with.

    python -m skylapse.benchmarks.peers.ray_serve_diffusers --port 8001 --threads 2

Two deployments as in Ray's Stable Diffusion tutorial (a FastAPI ingress, and one with the pipeline), and requests
batched by `@serve.batch` as in its guide to dynamic batching: one queue for each shape and number of steps, since a
pipeline takes one shape a call. The pipeline is diffusers' WanPipeline on the same folder, in the same precision and
with as many threads as ours; clips are written by the same encoder. The API is the least of OpenAI's Videos that a
client needs. Jobs are kept in the ingress' memory, as such examples do: nothing survives a restart, and a clip that is
being made cannot be stopped; one that waits can.
"""

# Ray pickles the ingress by value while this file is being read: its routes' types must be no strings, and what its
# methods use must stand above it. So there is no `from __future__ import annotations` here.
import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

MAX_BATCH, BATCH_WAIT_S = 10, 0.01  # what `@serve.batch` has of itself
OBJECT_STORE_BYTES = 80 * 2**20  # as `skylapse serve` has it
app = FastAPI(title="ray-serve-diffusers")


class Asked(BaseModel):
    """The fields of a request; None: the checkpoint's own defaults, which the driver hands over."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1)
    model: str | None = None
    negative_prompt: str = ""
    size: str | None = Field(None, pattern=r"^[1-9]\d{1,3}x[1-9]\d{1,3}$")
    seconds: str | None = None
    num_frames: int | None = Field(None, ge=1)
    fps: int | None = Field(None, ge=1)
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """What requests of one batch have in common."""

    width: int
    height: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float


def shape_of(asked: Asked, defaults: dict[str, Any]) -> Shape:
    width, height = (int(side) for side in asked.size.split("x")) if asked.size else defaults["size"]
    fps = asked.fps or defaults["fps"]
    num_frames = asked.num_frames or defaults["num_frames"]
    if asked.seconds is not None:
        num_frames = 4 * -(-round(float(asked.seconds) * fps - 1) // 4) + 1
    steps = asked.num_inference_steps or defaults["num_inference_steps"]
    guidance = defaults["guidance_scale"] if asked.guidance_scale is None else asked.guidance_scale
    return Shape(width, height, num_frames, fps, steps, guidance)


@dataclass
class Job:
    id: str
    asked: Asked
    shape: Shape
    created_at: float = field(default_factory=time.time)
    status: str = "queued"
    error: str | None = None
    clip: bytes = b""

    def show(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "id": self.id,
            "object": "video",
            "model": self.asked.model or "demo",
            "status": self.status,
            "progress": 100 if self.status == "completed" else 0,
            "created_at": int(self.created_at),
            "prompt": self.asked.prompt,
            "size": f"{shape.width}x{shape.height}",
            "seconds": f"{shape.num_frames / shape.fps:g}",
            "error": None if self.error is None else {"code": "internal_error", "message": self.error},
        }


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Pipeline:
    """WanPipeline, one call at a time; whoever is of one shape shares a call."""

    def __init__(self, model: str, dtype: str, threads: int, max_batch: int, wait_s: float) -> None:
        import torch
        from diffusers import AutoencoderKLWan, WanPipeline

        from ...runtime.checkpoints.hub import resolve_folder

        torch.set_num_threads(threads)
        folder = resolve_folder(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The VAE in fp32 as ours, and one timestep for all tokens: the same function, cheaper for the peer.
        vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32)
        precision = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.pipeline = WanPipeline.from_pretrained(folder, vae=vae, dtype=precision).to(device)
        self.pipeline.register_to_config(expand_timesteps=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.max_batch, self.wait_s = max_batch, wait_s
        self.queues: dict[Shape, Callable[[Job], Awaitable[bytes]]] = {}
        self.dropped: set[str] = set()
        self.turn = asyncio.Lock()

    async def make(self, job: Job) -> bytes:
        """The mp4 of one job; empty where it was dropped before its turn."""
        if job.shape not in self.queues:
            self.queues[job.shape] = self._queue()
        return await self.queues[job.shape](job)

    def drop(self, job_id: str) -> None:
        self.dropped.add(job_id)

    def tune(self, max_batch: int) -> None:
        """For whoever looks for the batch size that serves this service best; nobody may wait meanwhile."""
        self.max_batch = max_batch
        self.queues.clear()

    def _queue(self) -> Callable[[Job], Awaitable[bytes]]:
        async def batch(jobs: list[Job]) -> list[bytes]:
            async with self.turn:
                wanted = [job for job in jobs if job.id not in self.dropped]
                clips = await asyncio.to_thread(self.run, wanted) if wanted else []
            made = {job.id: clip for job, clip in zip(wanted, clips, strict=True)}
            return [made.get(job.id, b"") for job in jobs]

        return serve.batch(max_batch_size=self.max_batch, batch_wait_timeout_s=self.wait_s)(batch)

    def run(self, jobs: list[Job]) -> list[bytes]:
        """One call of the pipeline for all of them."""
        import numpy as np
        import torch

        from ...runtime.media.writer import write_video

        shape = jobs[0].shape
        with torch.inference_mode():
            videos = self.pipeline(
                prompt=[job.asked.prompt for job in jobs],
                negative_prompt=[job.asked.negative_prompt for job in jobs],
                width=shape.width,
                height=shape.height,
                num_frames=shape.num_frames,
                num_inference_steps=shape.steps,
                guidance_scale=shape.guidance_scale,
                generator=[torch.Generator().manual_seed(job.asked.seed) for job in jobs],
                output_type="np",
            ).frames
        clips = []
        with tempfile.TemporaryDirectory() as folder:
            for frames in videos:
                path = Path(folder) / "video.mp4"
                write_video(path, (frames * 255).round().astype(np.uint8), shape.fps)
                clips.append(path.read_bytes())
        return clips


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
@serve.ingress(app)
class Ingress:
    """OpenAI's shapes over the pipeline."""

    def __init__(self, pipeline: Any, defaults: dict[str, Any]) -> None:
        self.pipeline, self.defaults = pipeline, defaults
        self.jobs: dict[str, Job] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    @app.post("/v1/videos")
    async def create(self, asked: Asked) -> dict[str, Any]:
        job = Job(f"video_{uuid.uuid4().hex}", asked, shape_of(asked, self.defaults))
        self.jobs[job.id] = job
        task = asyncio.create_task(self._make(job))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return job.show()

    @app.get("/v1/videos/{video_id}")
    async def get(self, video_id: str) -> dict[str, Any]:
        return self._find(video_id).show()

    @app.get("/v1/videos/{video_id}/content")
    async def content(self, video_id: str) -> Response:
        job = self._find(video_id)
        if job.status != "completed":
            raise HTTPException(400, f"{video_id} is {job.status}")
        return Response(job.clip, media_type="video/mp4")

    @app.delete("/v1/videos/{video_id}")
    async def delete(self, video_id: str) -> dict[str, Any]:
        job = self._find(video_id)
        if job.status == "queued":
            await self.pipeline.drop.remote(video_id)
        del self.jobs[video_id]
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/tune")
    async def tune(self, max_batch: int) -> None:
        await self.pipeline.tune.remote(max_batch)

    async def _make(self, job: Job) -> None:
        try:
            job.clip = await self.pipeline.make.remote(job)
            job.status = "completed"
        except Exception as error:  # whatever a pipeline raises is its client's to know
            job.status, job.error = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def _find(self, video_id: str) -> Job:
        if video_id not in self.jobs:
            raise HTTPException(404, f"there is no {video_id}")
        return self.jobs[video_id]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stopped = Event()
    import ray

    from ...runtime.engine.engine import Engine

    defaults = Engine.from_pretrained(options.model, device="cpu").defaults
    facts = {
        name: getattr(defaults, name) for name in ("num_frames", "fps", "num_inference_steps", "guidance_scale")
    } | {"size": (defaults.width, defaults.height)}
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # behind Ray's own, which ends the process in the midst
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        model: Any = Pipeline  # what `@serve.deployment` makes of a class has `bind`, which its types do not tell
        ingress: Any = Ingress
        pipeline = model.bind(options.model, options.dtype, options.threads, options.max_batch, options.batch_wait)
        serve.run(ingress.bind(pipeline, facts), name="peer", route_prefix="/", blocking=False)
        print(f"the peer serves at http://127.0.0.1:{options.port}", flush=True)
        stopped.wait()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--port", type=int, default=8001)
    option("--model", default="demo", help="demo or a diffusers folder")
    option("--dtype", choices=("fp32", "bf16"), default="fp32")
    option("--threads", type=int, default=os.cpu_count() or 1)
    option("--max-batch", type=int, default=MAX_BATCH, help="requests of one shape in a call")
    option("--batch-wait", type=float, default=BATCH_WAIT_S, metavar="S", help="for a batch to fill")
    return parser


if __name__ == "__main__":
    # As the module of its name, not as __main__: Ray's workers must find the classes.
    from . import ray_serve_diffusers

    sys.exit(ray_serve_diffusers.main())
