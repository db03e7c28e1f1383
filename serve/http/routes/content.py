"""A finished video's files: whole, by ranges, or at a bucket's own address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from ...jobs.source_video import files_gone, video_of
from ...wire.errors import ApiError
from ..auth import Reader
from .videos import VideoId, find_job

router = APIRouter(prefix="/v1/videos", tags=["videos"])
TYPES = {"video": "video/mp4", "thumbnail": "image/webp"}
SUFFIXES = {"video": "mp4", "thumbnail": "webp"}
SIGNED_S = 3600.0
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@router.get("/{video_id}/content", operation_id="downloadVideo", response_class=Response)
@router.head("/{video_id}/content", include_in_schema=False)
def content(
    request: Request,
    caller: Reader,
    video_id: VideoId,
    variant: Annotated[str, Query(description="video or thumbnail")] = "video",
) -> Response:
    """Download the mp4, or the thumbnail."""
    if variant not in TYPES:
        code = "unsupported" if variant == "spritesheet" else "invalid_value"
        raise ApiError(400, "Invalid 'variant': must be video or thumbnail.", code=code, param="variant")
    context = request.app.state.context
    artifact = video_of(find_job(request, caller, video_id), variant)
    if context.config.downloads == "redirect" and (url := context.artifacts.sign(artifact["key"], SIGNED_S)):
        return RedirectResponse(url, 307)
    size, etag = int(artifact["num_bytes"]), f'"{artifact["sha256"]}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, max-age=3600",
        "content-disposition": f'inline; filename="{video_id}.{SUFFIXES[variant]}"',
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", etag) == etag:
        start, end = _range(asked, size)
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=TYPES[variant])
    try:
        pieces: Iterator[bytes] = context.artifacts.read(artifact["key"], start, end)
    except FileNotFoundError:
        raise files_gone() from None
    return StreamingResponse(pieces, status, headers, TYPES[variant])


def _range(asked: str, size: int) -> tuple[int, int]:
    """Return [start, end) of the one range asked for. Raises ApiError 416 for none, many, or one beyond the end.

    Many ranges in one answer cost more than they are worth (CVE-2025-62727), and players ask for one at a time.
    """
    found = RANGE.fullmatch(asked.replace(" ", ""))
    first, last = found.groups() if found else ("", "")
    if first:
        start, end = int(first), min(size, int(last) + 1) if last else size
    else:
        start, end = max(0, size - int(last or 0)), size
    if not 0 <= start < end:
        raise ApiError(416, "Invalid 'Range': one range within the file.", code="invalid_range", param="range")
    return start, end
