"""A stand-in for a model hub on the loopback: it speaks the hub's API as far as huggingface_hub asks for it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

CHUNK_BYTES = 2**14


@dataclass
class Hub:
    """The hub's models, and its faults. `asked`: (method, file) -> number of requests, of files alone."""

    models: dict[str, dict[str, Path]]  # id -> commit -> folder; the newest, which is main, is the last
    url: str = ""
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    gated: set[str] = field(default_factory=set)
    breaks: Counter[str] = field(default_factory=Counter)  # file -> how many times its connection breaks in the middle
    pause_s: float = 0.0  # between two chunks
    sent_bytes: int = 0
    status: int | None = None  # of every answer, where it is ill

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables for a process that uses it; `tests/conftest.py` forbids the network to all others."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}

    def weights_asked(self) -> int:
        return sum(count for (method, path), count in self.asked.items() if not path.endswith(".json"))

    def gets(self, path: str) -> int:
        return self.asked[("GET", path)]

    # --- answers ----------------------------------------------------------------------------------------------------

    async def info(self, request: web.Request) -> web.StreamResponse:
        name, commit = self._find(request)
        siblings = [{"rfilename": path} for path in self._files(name, commit)]
        return web.json_response({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    async def tree(self, request: web.Request) -> web.StreamResponse:
        name, commit = self._find(request)
        found = self._files(name, commit)
        return web.json_response(
            [{"type": "file", "path": path, "size": len(data), "oid": etag(data)} for path, data in found.items()]
        )

    async def file(self, request: web.Request) -> web.StreamResponse:
        name, commit = self._find(request)
        path = request.match_info["path"]
        data = self._files(name, commit).get(path)
        if data is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        self.asked[(request.method, path)] += 1
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(data)}"', "Accept-Ranges": "bytes"}
        headers["Content-Length"] = str(len(data) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        is_cut = self.breaks[path] > 0
        self.breaks[path] -= is_cut
        stop = start + (len(data) - start) // 2 if is_cut else len(data)
        for at in range(start, stop, CHUNK_BYTES):
            piece = data[at : min(stop, at + CHUNK_BYTES)]
            await response.write(piece)
            self.sent_bytes += len(piece)
            await asyncio.sleep(self.pause_s)
        if is_cut:
            assert request.transport is not None
            request.transport.close()
        return response

    def _find(self, request: web.Request) -> tuple[str, str]:
        if self.status is not None:
            raise Ill(self.status)
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name in self.gated:
            raise web.HTTPForbidden(headers={"X-Error-Code": "GatedRepo"})
        if name not in self.models:
            raise web.HTTPUnauthorized(headers={"X-Error-Code": "RepoNotFound"})  # as the real one does without a token
        revision = request.match_info.get("revision", "main")
        commit = [*self.models[name]][-1] if revision == "main" else revision
        if commit not in self.models[name]:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return name, commit

    def _files(self, name: str, commit: str) -> dict[str, bytes]:
        folder = self.models[name][commit]
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Ill(web.HTTPException):
    def __init__(self, status: int) -> None:
        self.status_code = status
        super().__init__()


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


@contextmanager
def standing_in(models: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """Serves until the block is left; commits are 40 hexadecimal digits."""
    hub = Hub(models)
    app = web.Application()
    app.router.add_get("/api/models/{owner}/{name}", hub.info)
    app.router.add_get("/api/models/{owner}/{name}/revision/{revision}", hub.info)
    app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", hub.tree)
    app.router.add_get("/{owner}/{name}/resolve/{revision}/{path:.+}", hub.file)
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="stand-in-hub")
    thread.start()
    assert started.wait(10), "the stand-in hub did not start"
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what HF_ENDPOINT and HF_HUB_OFFLINE=0 do in one that starts with them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
