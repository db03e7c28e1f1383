"""A service's start and end from outside: where it listens, what a wrong one says, what is left, odd surroundings."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import COMMAND, KEY, Running, wait_for
from test_kills import check_completed, start_jobs

from skylapse.serve.deployment.ray_session import PREFIX


def listeners(pids: set[int]) -> dict[str, int]:
    """Addresses that processes listen at -> the process; of IPv4 and IPv6, in plain words."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes[match[1]] = pid
            except OSError:
                continue
    found = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found[f"{socket.inet_ntop(family, b''.join(words))} {int(port, 16)}"] = inodes[rest[5]]
    return found


def test_nothing_of_it_listens_outside_the_loopback(service: Running) -> None:
    check_completed(service, service.ended(start_jobs(service, 1, steps=2)))  # every part has started by now
    titles = dict(service.processes())
    found = listeners({*titles})
    assert len(found) > 5 and f"127.0.0.1 {service.port}" in found
    outside = {
        address: titles[pid][:60] for address, pid in found.items() if not re.match(r"127\.|::1 |::ffff:127\.", address)
    }
    assert outside == {}


@pytest.fixture
def odd_place() -> Iterator[Path]:
    """A folder for temporary files with a path that no socket's would fit into."""
    folder = Path(tempfile.mkdtemp(prefix="x" * 150))
    yield folder
    shutil.rmtree(folder)


def test_it_runs_without_a_home_and_with_a_long_tmpdir(tmp_path: Path, odd_place: Path) -> None:
    """HOME names no folder, as for a user that a container does not know; it leaves nothing of Ray behind."""
    before = {*Path("/tmp").glob(f"{PREFIX}*")}
    service = Running(tmp_path / "data", environment={"HOME": "/nonexistent", "TMPDIR": str(odd_place)})
    try:
        service.start()
        check_completed(service, service.ended(start_jobs(service, 1, steps=2)))
        assert len({*Path("/tmp").glob(f"{PREFIX}*")} - before) == 1
    finally:
        service.stop()
    assert {*Path("/tmp").glob(f"{PREFIX}*")} <= before
    assert "HOME is no folder: what is cached goes to" in (service.data / "driver.log").read_text()


def test_a_model_that_engines_cannot_load_ends_the_start_with_its_reason(tmp_path: Path, root: Path) -> None:
    """Weights that do not fit are seen by engines alone: JSON files are all that is looked at before."""
    model = tmp_path / "model"
    shutil.copytree(root / "runtime" / "models" / "demo", model)
    weights = next(model.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    service = Running(tmp_path / "data")
    options = ("--port", str(service.port), "--data", str(service.data), "--model", str(model))
    began_s = time.monotonic()
    done = subprocess.run(
        (*COMMAND, *options), env={**os.environ, "SKYLAPSE_API_KEY": KEY}, capture_output=True, text=True, timeout=300
    )
    took_s = time.monotonic() - began_s
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    started_s = next(line["time"] for line in lines if "did not start" in line["message"])
    print(json.dumps({"failed_start_s": round(took_s, 1), "told_at": started_s}))
    last = done.stderr.splitlines()[-1]
    assert last.startswith("skylapse: ") and "Engine cannot be started: " in last and weights.name in last, done.stderr
    assert done.returncode in (1, 2) and took_s < 150
    assert sum("did not start" in line["message"] for line in lines) <= 2, "it was not tried twenty times"


def test_a_stop_while_it_starts_is_heard(tmp_path: Path) -> None:
    service = Running(tmp_path / "data")
    log = tmp_path / "log"
    with log.open("w") as output:
        options = ("--port", str(service.port), "--data", str(service.data))
        driver = subprocess.Popen((*COMMAND, *options), stdout=output, stderr=output)
        wait_for(lambda: "the service starts" in log.read_text(), 60.0, "its first line")
        time.sleep(2.0)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(90) == 0, log.read_text()
