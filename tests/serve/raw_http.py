"""An HTTP client that sends exactly the bytes it is given, and takes an answer whenever it comes, or none."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit

MAX_ANSWER_BYTES = 2**20


@dataclass(frozen=True)
class Answer:
    """An answer. Status None: the connection was closed without one, or with one that could not be read."""

    status: int | None
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Client:
    """A client of one server, which opens a connection for each request."""

    url: str
    key: str = ""
    timeout_s: float = 60.0

    def send(
        self,
        method: str,
        target: str | bytes,
        headers: Sequence[tuple[str, str | bytes]] = (),
        body: bytes | Iterable[bytes] = b"",
        num_bytes: int | None = None,
    ) -> Answer:
        """Send a request, chunked if the body is in pieces. num_bytes: the promised Content-Length, right or not."""
        place = urlsplit(self.url)
        assert place.hostname is not None
        names = {name.lower() for name, _ in headers}
        lines = [_bytes(method) + b" " + _bytes(target) + b" HTTP/1.1", b"Host: " + place.netloc.encode()]
        if self.key and "authorization" not in names:
            lines.append(b"Authorization: Bearer " + self.key.encode())
        if isinstance(body, bytes):
            pieces: Iterable[bytes] = [body[start : start + 2**16] for start in range(0, len(body), 2**16)]
            if body or num_bytes is not None or method in ("POST", "PUT", "PATCH"):
                lines.append(b"Content-Length: %d" % (len(body) if num_bytes is None else num_bytes))
        else:
            pieces = (b"%x\r\n%s\r\n" % (len(piece), piece) for piece in body)
            lines.append(b"Transfer-Encoding: chunked")
        lines += [_bytes(name) + b": " + _bytes(value) for name, value in headers]
        head = b"\r\n".join([*lines, b"Connection: close", b"", b""])
        with socket.create_connection((place.hostname, place.port or 80), timeout=self.timeout_s) as connection:
            try:
                connection.sendall(head)
                for piece in pieces:
                    if select.select([connection], [], [], 0)[0]:  # an answer, or the end
                        break
                    connection.sendall(piece)
                else:
                    if not isinstance(body, bytes):
                        connection.sendall(b"0\r\n\r\n")
                    if body and num_bytes is not None:
                        connection.shutdown(socket.SHUT_WR)  # that was all
            except OSError:
                pass  # the server listens no more; it may have said why
            return _answer(connection, method)


def _answer(connection: socket.socket, method: str) -> Answer:
    response = HTTPResponse(connection, method=method)
    try:
        response.begin()
        return Answer(
            response.status, {k.lower(): v for k, v in response.getheaders()}, response.read(MAX_ANSWER_BYTES)
        )
    except (HTTPException, OSError):
        return Answer(None, {}, b"")
    finally:
        response.close()


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
