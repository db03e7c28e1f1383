"""A bad request, the answers that it may get, and ways of making one."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .bad_media import media
from .bodies import FORM, JSON, file, form
from .bodies import field as text
from .raw_http import Answer, Client

MIB = 2**20
VIDEOS, EDITS, EXTENSIONS, GENERATIONS = (f"/v1/videos{rest}" for rest in ("", "/edits", "/extensions", "/generations"))
NOBODYS = "video_" + "0" * 31 + "1"
BODIES = "huge and endless bodies"
Headers: TypeAlias = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Case:
    """A request and its permitted answers: `{mine}` and `{theirs}` in it stand for ids."""

    id: str
    kind: str
    method: str
    target: str | bytes
    headers: Headers = ()
    body: Callable[[], bytes | Iterator[bytes]] = field(default=lambda: b"", repr=False)
    statuses: frozenset[int] = frozenset({400})
    code: str | None = None  # of the envelope; None: any
    num_bytes: int | None = None  # Content-Length, where that is a lie
    may_hang_up: bool = False  # the connection may end before the answer was read
    by_proxy: bool = False  # what the HTTP server refuses by itself, in words of its own

    def send(self, client: Client, mine: str = NOBODYS, theirs: str = NOBODYS) -> Answer:
        def with_ids(value: Any) -> Any:
            if isinstance(value, bytes):
                return value.replace(b"{mine}", mine.encode()).replace(b"{theirs}", theirs.encode())
            return value.replace("{mine}", mine).replace("{theirs}", theirs) if isinstance(value, str) else value

        return client.send(self.method, with_ids(self.target), self.headers, with_ids(self.body()), self.num_bytes)

    def problem(self, answer: Answer) -> str | None:
        """Return the fault in the answer, or None."""
        if answer.status is None:
            return None if self.may_hang_up else f"{self.id}: no answer"
        if answer.status not in self.statuses:
            return f"{self.id}: {answer.status}, not {sorted(self.statuses)}: {answer.body[:300]!r}"
        if self.by_proxy or self.method == "HEAD":
            return None
        try:
            error = json.loads(answer.body)["error"]
        except (ValueError, KeyError, TypeError):
            return f"{self.id}: no envelope: {answer.body[:300]!r}"
        if {*error} != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
            return f"{self.id}: an envelope of another form: {error}"
        if self.code is not None and error["code"] != self.code:
            return f"{self.id}: code {error['code']}, not {self.code}"
        if len(answer.body) > 1000 or any(word in answer.body for word in (b"Traceback", b"site-packages", b"/tmp/")):
            return f"{self.id}: says too much: {answer.body[:1500]!r}"
        return None


# -------------------------------------------------------------------------------------------------- ways of making one


def as_json(id: str, kind: str, body: Any, path: str = VIDEOS, status: int = 400, code: str | None = None) -> Case:
    """Make a JSON request. `body`: fields beside the prompt, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps({"prompt": "a star", **body}).encode()
    return Case(id, kind, "POST", path, [("Content-Type", JSON)], lambda: content, frozenset({status}), code)


def as_form(
    id: str,
    kind: str,
    parts: Callable[[], Sequence[bytes]],
    path: str = VIDEOS,
    status: int | set[int] = 400,
    code: str | None = None,
    **more: Any,
) -> Case:
    """Make a form of `parts` beside the prompt and, for an extension, the seconds."""
    first = [text("prompt", b"a star"), *([text("seconds", b"1")] if path == EXTENSIONS else [])]
    statuses = frozenset({status} if isinstance(status, int) else status)
    body = lambda: form(*first, *parts())  # noqa: E731
    return Case(id, kind, "POST", path, [("Content-Type", FORM)], body, statuses, code, **more)


def as_file(
    kind: str, names: str, path: str = VIDEOS, code: str | None = None, file_name: str = "upload", prefix: str = ""
) -> list[Case]:
    """Make requests of files of bad_media, each sent as the file that the path takes."""

    def one(name: str) -> Case:
        part_name = "input_reference" if path == VIDEOS else "video"
        id = f"{prefix or path.rpartition('/')[2]}_{name}"
        return as_form(id, kind, lambda: [file(part_name, media(name), file_name)], path, 400, code)

    return [one(name) for name in names.split()]


def plain(
    id: str,
    kind: str,
    target: str | bytes,
    status: int | set[int],
    method: str = "GET",
    headers: Headers = (),
    **more: Any,
) -> Case:
    statuses = frozenset({status} if isinstance(status, int) else status)
    return Case(id, kind, method, target, headers, statuses=statuses, **more)


def endless(start: bytes, piece: bytes) -> Callable[[], Iterator[bytes]]:
    """Make a chunked body, of 1 GiB at most, so that a server that reads it fails a test and not the machine."""

    def pieces() -> Iterator[bytes]:
        if start:  # an empty chunk would be the end
            yield start
        for _ in range(2**30 // len(piece)):
            yield piece

    return pieces


def without_end(id: str, content_type: str, start: bytes, piece: bytes, statuses: frozenset[int]) -> Case:
    body = endless(start, piece)
    return Case(id, BODIES, "POST", VIDEOS, [("Content-Type", content_type)], body, statuses, may_hang_up=True)


def shorter(id: str, content_type: str, body: bytes, path: str = VIDEOS) -> Case:
    """Make a request whose body is shorter than it promised."""
    headers = [("Content-Type", content_type)]
    return Case(
        id, BODIES, "POST", path, headers, lambda: body, frozenset({400}), num_bytes=len(body) + 1000, may_hang_up=True
    )


def data_url(name: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [text("input_reference[image_url]", b"data:image/png;base64," + base64.b64encode(media(name)))]
