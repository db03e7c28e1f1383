"""Bodies of requests for tests: put together by hand, and read or refused without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from skylapse.serve.intake.body import Body, read_body
from skylapse.serve.wire.errors import ApiError

MAX = 2**20
FORM = "multipart/form-data; boundary=b"
JSON = "application/json"


def request(content_type: str | None, pieces: Iterator[bytes], length: int | None) -> Request:
    headers = {"content-type": content_type, "content-length": None if length is None else str(length)}

    async def receive() -> dict[str, Any]:
        piece = next(pieces, None)
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    raw = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}, receive)


def reader(folder: Path) -> Callable[..., Body]:
    def read(
        content_type: str | None, body: bytes | Iterator[bytes], max_bytes: int = MAX, length: int | None = None
    ) -> Body:
        pieces = iter([body]) if isinstance(body, bytes) else body
        return asyncio.run(
            read_body(request(content_type, pieces, length), max_bytes=max_bytes, folder=folder / "scratch")
        )

    return read


def refuser(folder: Path) -> Callable[..., ApiError]:
    """Return a function that reads a bad body, checks that no file is left, and returns a refusal that can be sent."""

    def refuse(*asked: Any, **more: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            reader(folder)(*asked, **more)
        assert files_in(folder) == []
        assert len(caught.value.message) < 300
        json.dumps(caught.value.body, ensure_ascii=False).encode()
        return caught.value

    return refuse


def files_in(folder: Path) -> list[Path]:
    """Return the files, and the folders that hold something of a request's."""
    return [path for path in folder.rglob("*") if path.is_file() or path.name.startswith("upload-")]


def part(disposition: str, content: bytes = b"x", more: str = "") -> bytes:
    return f"--b\r\nContent-Disposition: form-data; {disposition}\r\n{more}\r\n".encode() + content + b"\r\n"


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(parts) + end


def field(name: str, value: bytes = b"x") -> bytes:
    return part(f'name="{name}"', value)


def file(name: str, content: bytes = b"x", file_name: str = "upload") -> bytes:
    return part(f'name="{name}"; filename="{file_name}"', content, "Content-Type: application/octet-stream\r\n")
