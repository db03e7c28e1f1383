"""A real `skylapse serve` for tests that kill parts of it: started, watched, killed piece by piece, stopped."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx

T = TypeVar("T")
MARK = "SKYLAPSE_TEST_SERVICE"  # in the environment of the driver, and so of all processes that it starts
KEY = "sk-skylapse-the-key-of-the-fault-tests"
START_S = 150.0
# Parts that these tests kill have to be noticed soon; the service's own limits let a starved process live.
TIGHT = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "10",
    "SKYLAPSE_HEALTH_TIMEOUT_S": "10",
}
COMMAND = (sys.executable, "-m", "skylapse", "serve")
PARTS = {
    "engine": re.compile(r"ray::ServeReplica:skylapse:Engine"),
    "dispatcher": re.compile(r"ray::ServeReplica:skylapse:Dispatcher"),
    "ingress": re.compile(r"ray::ServeReplica:skylapse:Ingress"),
    "proxy": re.compile(r"ray::ProxyActor"),
    "controller": re.compile(r"ray::ServeController"),
}


class Running:
    """One service, on a port and a data folder of its own."""

    def __init__(
        self,
        data: Path,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        command: tuple[str, ...] = COMMAND,
        limits: Mapping[str, str] = TIGHT,
    ) -> None:
        self.data, self.config, self.command = data, dict(config or {}), command
        self.environment = {**limits, **(environment or {})}
        self.mark = secrets.token_hex(8)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.driver: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=20.0, trust_env=False
        )

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> float:
        """Start the service and wait until it is ready; return the seconds until `/readyz` said so."""
        self.data.mkdir(parents=True, exist_ok=True)
        file = self.data / "config.json"
        file.write_text(json.dumps(self.config))
        # Ray reads the mode when it is imported, which scripts that subclass a replica do before the service sets it.
        mode = {"RAY_AUTH_MODE": "token"}
        environment = {**os.environ, **mode, **self.environment, MARK: self.mark, "SKYLAPSE_API_KEY": KEY}
        options = ("--port", str(self.port), "--data", str(self.data), "--config", str(file))
        began_s = time.monotonic()
        with (self.data / "driver.log").open("a") as log:
            self.driver = subprocess.Popen(
                (*self.command, *options),
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                cwd=self.data,
            )
        wait_for(self._is_ready, START_S, "the service to be ready")
        return time.monotonic() - began_s

    def _is_ready(self) -> bool:
        assert self.driver is not None
        if self.driver.poll() is not None:
            raise AssertionError(f"the service ended:\n{(self.data / 'driver.log').read_text()[-2000:]}")
        with suppress(httpx.HTTPError):
            return self.client.get("/readyz").status_code == 200 and any(
                engine.get("state", "ready") == "ready" for engine in self.client.get("/healthz").json()["engines"]
            )
        return False

    def stop(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.driver.wait(60)
        code = None if self.driver is None else self.driver.returncode
        self.kill_all()
        self.client.close()
        assert code in (None, 0, -signal.SIGKILL), f"the driver ended with {code}, as nobody asked it to"

    def kill_driver(self) -> None:
        """Kill the driver with kill -9, and all that Ray leaves behind of it: as if the machine had lost power."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()
        self.kill_all()

    def kill_all(self) -> None:
        for pid, _ in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not list(self.processes()), 20.0, "its processes to end")

    # --- parts ----------------------------------------------------------------------------------------------------

    def processes(self) -> Iterator[tuple[int, str]]:
        """Yield (process id, title) of all processes that belong to this service."""
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                with suppress(OSError):
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        if title.strip():
                            yield int(folder.name), title

    @property
    def ray_variables(self) -> dict[str, str]:
        """Return the environment by which a second driver reaches this one's Ray: its token, and its address."""
        pid = self.pids("controller")[0]
        variables = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
        return {name: text for name, _, text in (v.partition("=") for v in variables) if name.startswith("RAY_")}

    def log(self) -> list[dict[str, Any]]:
        """The lines of JSON that the service has printed."""
        lines = (self.data / "driver.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    @property
    def gcs_address(self) -> str:
        """Return the GCS address of its Ray cluster; there may be others on this machine."""
        found = (re.search(r"--gcs-address=(\S+)", title) for _, title in self.processes())
        return next(match[1] for match in found if match)

    def pids(self, part: str) -> list[int]:
        return [pid for pid, title in self.processes() if PARTS[part].match(title)]

    def kill(self, part: str) -> int:
        """Kill one process of a part with kill -9; return its id."""
        pid = wait_for(lambda: next(iter(self.pids(part)), None), 30.0, f"a {part}")
        os.kill(pid, signal.SIGKILL)
        return pid

    def engines(self) -> list[dict[str, Any]]:
        """Return the live engines, as `/healthz` tells of them."""
        return self.client.get("/healthz").json()["engines"]

    # --- clients --------------------------------------------------------------------------------------------------

    def create(self, **fields: Any) -> dict[str, Any]:
        response = self.client.post("/v1/videos", json={"prompt": "a red circle moving right", **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, video_id: str) -> dict[str, Any]:
        """Get a path, again if an ingress or the proxy was killed meanwhile."""

        def ask() -> dict[str, Any] | None:
            with suppress(httpx.HTTPError):
                response = self.client.get(f"/v1/videos/{video_id}")
                if response.status_code == 200:
                    return response.json()
            return None

        return wait_for(ask, 60.0, f"an answer about {video_id}")

    def ended(self, video_ids: list[str], within_s: float = 180.0) -> list[dict[str, Any]]:
        """Return all videos once they have ended; their progress on the way must never fall."""
        seen: dict[str, int] = dict.fromkeys(video_ids, 0)

        def look() -> list[dict[str, Any]] | None:
            videos = [self.get(video_id) for video_id in video_ids]
            for video in videos:
                assert video["progress"] >= seen[video["id"]] or video["status"] == "failed", "progress fell"
                seen[video["id"]] = video["progress"]
            return videos if all(video["status"] in ("completed", "failed") for video in videos) else None

        return wait_for(look, within_s, "the jobs to end", 0.2)

    def content(self, video_id: str) -> bytes:
        response = self.client.get(f"/v1/videos/{video_id}/content")
        assert response.status_code == 200, response.text
        return response.content


def wait_for(ask: Callable[[], T | None], within_s: float, what: str, every_s: float = 0.1) -> T:
    """Return the first answer that is true. Raises AssertionError if there is none in time."""
    until_s = time.monotonic() + within_s
    while True:
        if answer := ask():
            return answer
        assert time.monotonic() < until_s, f"waited {within_s:g} s for {what}"
        time.sleep(every_s)
