"""A server of the OpenAI Videos API that makes nothing and takes a known time for it, to test generators of load with.

python -m skylapse.benchmarks.load.stub --service 0.05 --slots 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "stub", "version": "1"},
    "paths": {
        "/v1/videos": {
            "post": {
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": {
                                "properties": {
                                    name: {}
                                    for name in ("prompt", "model", "size", "seconds", "seed", "num_frames", "fps")
                                }
                            }
                        }
                    }
                }
            }
        }
    },
}


@dataclass
class Stub:
    """service_s: of each clip; slots: how many at a time, the others wait in turn (0: all at once)."""

    service_s: float = 0.05
    slots: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    _done_at: dict[str, float] = field(default_factory=dict)
    _free_at: list[float] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/openapi.json", self.openapi)
        app.router.add_post("/v1/videos", self.create)
        app.router.add_get("/v1/videos/{id}", self.get)
        app.router.add_delete("/v1/videos/{id}", self.delete)
        return app

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response(OPENAPI)

    async def create(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        now = time.perf_counter()
        begins = now
        if self.slots:
            self._free_at = self._free_at or [now] * self.slots
            begins = max(now, min(self._free_at))
            self._free_at[self._free_at.index(min(self._free_at))] = begins + self.service_s
        identity = f"video_{len(self._done_at):032x}"
        self._done_at[identity] = begins + self.service_s
        self.asked.append(body)
        return self.show(identity, now)

    async def get(self, request: web.Request) -> web.Response:
        identity = request.match_info["id"]
        if identity not in self._done_at:
            return web.json_response({"error": {"message": "none", "code": "video_not_found"}}, status=404)
        return self.show(identity, time.perf_counter())

    async def delete(self, request: web.Request) -> web.Response:
        self.deleted.append(request.match_info["id"])
        return web.json_response({"id": request.match_info["id"], "object": "video.deleted", "deleted": True})

    def show(self, identity: str, now: float) -> web.Response:
        status = "completed" if now >= self._done_at[identity] else "in_progress"
        text = f'{{"id":"{identity}","object":"video","status":"{status}","seconds":"2"}}'
        return web.Response(text=text, content_type="application/json")


async def start(app: web.Application, port: int = 0) -> tuple[web.AppRunner, str]:
    """(to be cleaned up, URL) of a server on loopback."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", type=float, default=0.05, help="seconds a clip takes")
    parser.add_argument("--slots", type=int, default=0, help="clips at a time; 0: any number")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(arguments)

    async def serve() -> None:
        _, url = await start(Stub(options.service, options.slots).app(), options.port)
        print(url, flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
