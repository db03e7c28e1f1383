"""A job's events as they happen (server-sent events): its row, sent again whenever its version changes.

An event's id is the version of the row that it was read from, so any ingress goes on where a client says it was.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import Response, StreamingResponse

from ...jobs.services import Context
from ...store.jobs import Job
from ...store.tables import COMPLETED, IN_PROGRESS, QUEUED
from ...wire.requests import show_video
from ..auth import Reader
from ..job_feed import Watch
from .videos import VideoId, find_job

router = APIRouter(prefix="/v1/videos", tags=["videos"])
STREAM_S = 60.0  # then the client connects again, where it was; short requests survive reloads of proxies
RETRY_MS = 1000
COMMENT_S = 15.0  # a line that says nothing, or proxies would take the stream for dead
POSITION_S = 2.0  # between two looks at a queued job's place


@router.get("/{video_id}/events", operation_id="streamVideoEvents", response_class=Response)
async def events(
    request: Request,
    caller: Reader,
    video_id: VideoId,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> StreamingResponse:
    """Stream a video's events: its position in the queue, progress with stage, step and eta, previews, the end."""
    job = await asyncio.to_thread(find_job, request, caller, video_id)
    last = int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 10 else -1
    state = request.app.state
    return StreamingResponse(
        _stream(state.context, state.watch, job, last),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


async def _stream(context: Context, watch: Watch, job: Job, last: int) -> AsyncIterator[bytes]:
    until_s = time.monotonic() + STREAM_S
    yield f"retry: {RETRY_MS}\n".encode()  # no blank line: the SDKs take any for the end of an event, and parse nothing
    async with watch.watching(job) as queue:
        teller = Teller(context, last)
        newest: Job | None = job
        said_s = time.monotonic()
        while newest is not None:
            for line in await asyncio.to_thread(teller.tell, newest):
                yield line
                said_s = time.monotonic()
            if newest.has_ended or time.monotonic() > until_s:
                return
            wait_s = min(POSITION_S if newest.state == QUEUED else COMMENT_S, until_s - time.monotonic())
            try:
                newest = await asyncio.wait_for(queue.get(), max(0.0, wait_s))
                while not queue.empty():
                    newest = queue.get_nowait()
            except TimeoutError:
                if time.monotonic() - said_s >= COMMENT_S:
                    yield b": still here\n"  # no blank line either
                    said_s = time.monotonic()


class Teller:
    """The events that one client has been sent, and those that a row adds."""

    def __init__(self, context: Context, last: int) -> None:
        self.context, self.last = context, last
        self._position: int | None = None
        self._preview: str | None = None
        self._has_begun = False

    def tell(self, job: Job) -> list[bytes]:
        """Return the lines of the events that this row adds."""
        if job.state == QUEUED:
            position = self.context.jobs.position(job)
            if position == self._position and job.version <= self.last:
                return []
            self._position, self.last = position, job.version
            return [self._event(job, "video.queued", position=position)]
        if job.version <= self.last and not job.has_ended:
            return []
        self.last = job.version
        lines = []
        if job.state == IN_PROGRESS and not self._has_begun:
            self._has_begun = True
            lines.append(self._event(job, "video.in_progress"))
        if job.state == IN_PROGRESS and job.num_steps:
            facts = dict(stage=job.stage, step=job.step, num_steps=job.num_steps, eta_s=job.eta_s)
            lines.append(self._event(job, "video.progress", **facts))
        if not job.has_ended and job.preview is not None and job.preview["key"] != self._preview:
            self._preview = job.preview["key"]
            try:
                picture = b"".join(self.context.artifacts.read(job.preview["key"]))
            except FileNotFoundError:  # the next one has taken its place
                picture = b""
            if picture:
                shown = {"b64_json": base64.b64encode(picture).decode(), "mime": "image/webp"}
                shown |= {"step": job.preview["step"], "index": job.preview["index"]}
                lines.append(self._event(job, "video.preview", preview=shown))
        if job.has_ended:
            lines.append(self._event(job, "video.completed" if job.state == COMPLETED else "video.failed"))
        return lines

    def _event(self, job: Job, kind: str, **facts: Any) -> bytes:
        """Return one event; a failure is told within the video, as the SDKs raise on a top-level key `error`."""
        data = {"type": kind, "video": show_video(job, self.context.config.retention_s), **facts}
        return f"id: {job.version}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()
