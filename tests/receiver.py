"""A server on the loopback that plays the other end of a webhook, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

OK = b"HTTP/1.1 204 No Content\r\n\r\n"


def status(code: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {code} X", *headers, "content-length: 0"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@dataclass
class Receiver:
    """Answers each request with the next of `answers`, the last of them for ever; an endless one is an iterator."""

    answers: list[bytes | Iterator[bytes]]
    port: int = 0
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # request line, headers, body
    sent_bytes: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = (line.split(": ", 1) for line in head[1:] if line)
            headers = {name.lower(): text for name, text in fields}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append((head[0], headers, body))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            for piece in [answer] if isinstance(answer, bytes) else answer:
                writer.write(piece)
                await writer.drain()
                self.sent_bytes += len(piece)
            await reader.read()  # until the client hangs up
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiver(
    *answers: bytes | Iterator[bytes], host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    heard = Receiver(list(answers) or [OK])
    server = await asyncio.start_server(heard.handle, host, port, ssl=tls)
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()
