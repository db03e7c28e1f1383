"""Services that a comparison starts: on a port of their own, waited for, and gone with whoever started them."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...runtime.core.config import environment

MARK = "SKYLAPSE_BENCH_SERVICE"  # in the environment of all processes of one service
START_S, STOP_S, KILL_S = 180.0, 60.0, 10.0
REST_S, REST_LOOK_S, REST_CORES = 420.0, 4.0, 0.25
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Service:
    name: str
    url: str
    key: str | None
    start_s: float
    command: str
    mark: str = ""  # of all its processes

    def cpu_s(self) -> dict[int, float]:
        """Seconds of CPU of each of its processes; none where the system does not tell."""
        used = {}
        for pid in _marked(self.mark) if self.mark else ():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                used[pid] = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        return used


def idle_cores(services: Sequence[Service]) -> dict[str, float]:
    """What each uses with nothing to do, once all are at rest: ours builds a decoder behind its first start.

    RuntimeError where one does not come to rest, since it would take from the other what is measured.
    """
    until_s = time.monotonic() + REST_S
    while True:
        before, began_s = [one.cpu_s() for one in services], time.monotonic()
        time.sleep(REST_LOOK_S)
        took_s = time.monotonic() - began_s
        after = [one.cpu_s() for one in services]
        cores = {
            one.name: sum(used - then.get(pid, 0.0) for pid, used in now.items()) / took_s
            for one, then, now in zip(services, before, after, strict=True)
        }
        have_ended = any(set(then) - set(now) for then, now in zip(before, after, strict=True))
        if max(cores.values()) < REST_CORES and not have_ended:
            return cores
        if time.monotonic() > until_s:
            raise RuntimeError(f"the services do not come to rest within {REST_S:g} s: they use {cores} cores")


@contextmanager
def ours(threads: int | None, model: str = "demo") -> Iterator[Service]:
    """`skylapse serve` with its default settings, but for the threads where they are given."""
    key = "sk-skylapse-" + secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="skylapse-bench-", ignore_cleanup_errors=True) as folder:
        options = ["--data", folder, "--model", model]
        if threads is not None:
            config = Path(folder) / "config.json"
            config.write_text(json.dumps({"threads": threads}))
            options += ["--config", str(config)]
        command = [sys.executable, "-m", "skylapse", "serve", *options]
        with started("skylapse", command, "/readyz", key, Path(folder) / "driver.log") as service:
            yield service


@contextmanager
def plain_ray_serve(threads: int | None, model: str) -> Iterator[Service]:
    """peers/ray_serve_diffusers.py, in fp32 as our service on a CPU."""
    with tempfile.TemporaryDirectory(prefix="skylapse-bench-", ignore_cleanup_errors=True) as folder:
        module = "skylapse.benchmarks.peers.ray_serve_diffusers"
        command = [sys.executable, "-m", module, "--model", model]
        command += ["--threads", str(threads or os.cpu_count() or 1)]
        with started("ray_serve", command, "/openapi.json", None, Path(folder) / "driver.log") as service:
            yield service


@contextmanager
def started(name: str, command: Sequence[str], ready: str, key: str | None, log: Path) -> Iterator[Service]:
    """Yields once `ready` answers 200; RuntimeError with the log's end where it ends before. All of it ends with us."""
    mark = secrets.token_hex(8)
    port = _free_port()
    variables = {MARK: mark} | ({"SKYLAPSE_API_KEY": key} if key else {})
    url = f"http://127.0.0.1:{port}"
    began_s = time.monotonic()
    with log.open("w") as output:
        driver = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=environment(variables),
            cwd=log.parent,
            start_new_session=True,  # Ctrl-C is for us, and we tell it in order
            preexec_fn=_die_with_parent(),
        )
    try:
        while not _answers(url + ready):
            if driver.poll() is not None:
                raise RuntimeError(f"{name} ended before it was ready: {log.read_text()[-600:]}")
            if time.monotonic() - began_s > START_S:
                raise RuntimeError(f"{name} was not ready within {START_S:g} s: {log.read_text()[-600:]}")
            time.sleep(0.2)
        shown = " ".join(["python", *command[1:]]).replace(str(log.parent), "DIR")
        yield Service(name, url, key, time.monotonic() - began_s, shown, mark)
    finally:
        _stop(driver, mark)


def tune(peer: Service, max_batch: int) -> None:
    """How many requests of one shape the peer puts into a call."""
    url = f"{peer.url}/tune?max_batch={max_batch}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method="POST"), timeout=30.0) as response:
        response.read()


def _stop(driver: subprocess.Popen[bytes], mark: str) -> None:
    """In order, then by force: Ray's processes outlive a driver that was killed."""
    if driver.poll() is None:
        driver.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            driver.wait(STOP_S)
    until_s = time.monotonic() + KILL_S
    while time.monotonic() < until_s and (left := list(_marked(mark))):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    with suppress(subprocess.TimeoutExpired):
        driver.wait(KILL_S)


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux the driver is told to stop where we are killed and cannot tell it."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # found here: nothing may be imported between fork and exec
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(urllib.error.URLError, OSError), opener.open(url, timeout=5.0) as response:
        return bool(response.status == 200)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
