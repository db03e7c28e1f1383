"""Debian's Prometheus on the loopback, with the configuration that is shipped, pointed at one service."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
START_S = 30.0


@dataclass(frozen=True)
class Prometheus:
    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return each series: its labels as `metric`, and (time, value) as `value`."""
        found: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("targets")["activeTargets"]
        return found

    def wait(self, query: str, at_most_s: float = START_S) -> list[dict[str, Any]]:
        """Wait for the first answer that is not empty."""
        until_s = time.monotonic() + at_most_s
        while not (found := self.query(query)):
            assert time.monotonic() < until_s, (query, self.targets())
            time.sleep(0.1)
        return found


@contextmanager
def prometheus(folder: Path, url: str) -> Iterator[Prometheus]:
    """Run Prometheus, which scrapes `url` every second; the test skips where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian's package of that name)")
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy" / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [url.removeprefix("http://")]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = (f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={address}")
    log = folder / "prometheus.log"
    with log.open("w") as out:
        process = subprocess.Popen((program, *options), stdout=out, stderr=out, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10.0, trust_env=False) as client:
            until_s = time.monotonic() + START_S
            while not _is_ready(client):
                assert process.poll() is None and time.monotonic() < until_s, log.read_text()[-2000:]
                time.sleep(0.05)
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.HTTPError:
        return False
