"""The page at / and its files: served as they are packaged, and allowed to talk to this host alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from ...wire.errors import ApiError

FOLDER = Path(__file__).parents[2] / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Whatever is not named is forbidden: inline scripts and styles, frames, other hosts. blob: and data: are pictures that
# the visitor has just chosen, and previews out of the event stream.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # "no-referrer" would make the Origin of some requests "null"
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, but asked for every time: the files of one release belong together
}


@dataclass(frozen=True)
class File:
    """A file of the page as it is sent."""

    body: bytes
    media_type: str
    etag: str


def _read(path: Path) -> File:
    body = path.read_bytes()
    return File(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


FILES = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}  # a few kilobytes
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
def page(request: Request) -> Response:
    return _send(request, FILES["index.html"])


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
def static(request: Request, name: str) -> Response:
    """Serve one of the page's files and nothing else: names are looked up in a table, not opened."""
    if name not in FILES:
        raise ApiError(404, "There is no such file.", code="not_found")
    return _send(request, FILES[name])


def _send(request: Request, file: File) -> Response:
    """304 where the browser has it; it may know several versions, and a proxy may have called them weak."""
    headers = {**HEADERS, "etag": file.etag}
    known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    headers["content-length"] = str(len(file.body))
    return Response(b"" if request.method == "HEAD" else file.body, headers=headers, media_type=file.media_type)
