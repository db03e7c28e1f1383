"""A machine that has no time for the service: nothing that lives is killed for being slow, and jobs complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2 as httpx
import pytest
from running import PARTS, Running, wait_for
from test_kills import check_completed, start_jobs, wait_until_stepping

STOPPED_S = 20.0  # longer than three checks of two seconds, and two of ten, which killed it


@contextmanager
def busy_neighbours(each_core: int = 6) -> Iterator[None]:
    """Loops on all cores that give way to nobody; an engine's threads are niced, and starve first."""
    script = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100000))"
    count = each_core * (os.cpu_count() or 1)
    loops = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with the limits that everybody has."""
    running = Running(tmp_path_factory.mktemp("patient"), {"webhook_private": True}, limits={})
    try:
        running.start()
        yield running
    finally:
        running.stop()


def parts(service: Running) -> dict[str, list[int]]:
    return {part: service.pids(part) for part in PARTS}


def test_busy_cores_kill_nothing_and_jobs_complete(patient: Running) -> None:
    before = parts(patient)
    jobs = start_jobs(patient, 2, steps=30)
    with busy_neighbours():
        wait_until_stepping(patient, jobs, 10)
        until_s = time.monotonic() + 40.0
        slowest_s = 0.0
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            assert patient.client.get("/healthz", timeout=20.0).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            time.sleep(0.5)
        print(f'{{"slowest_healthz_s": {slowest_s:.2f}}}')
        check_completed(patient, patient.ended(jobs, 300.0))
    assert parts(patient) == before, "a process that lived was replaced"


@pytest.mark.parametrize("part", ["engine", "proxy", "ingress", "dispatcher"])
def test_a_part_that_stands_still_for_seconds_is_waited_for(part: str, patient: Running) -> None:
    """The part is stopped as if the machine swapped. An engine's job may go on elsewhere, or on it when it wakes."""
    before = parts(patient)
    jobs = start_jobs(patient, 2, steps=60)
    wait_until_stepping(patient, jobs, 10)
    (pid,) = patient.pids(part)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED_S)
    os.kill(pid, signal.SIGCONT)
    check_completed(patient, patient.ended(jobs, 300.0))
    assert parts(patient) == before, "a process that lived was replaced"


def test_an_engine_that_gives_no_sign_is_told_in_the_log_and_again_when_it_does(patient: Running) -> None:
    (pid,) = patient.pids("engine")
    os.kill(pid, signal.SIGSTOP)

    def said(words: str) -> bool:
        return any(line["message"].startswith("engine ") and words in line["message"] for line in patient.log())

    try:
        wait_for(lambda: said("has given no sign for more than 5 s"), 20.0, "the warning")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: said("is well again"), 20.0, "its end")


def test_a_killed_proxy_is_back_soon_with_these_limits_too(patient: Running) -> None:
    """A timeout is for who lives: the dead are noticed at the next check."""
    times_s = []
    for _ in range(2):  # the machine may be busy with something else
        patient.kill("proxy")
        killed_s = time.monotonic()
        wait_for(lambda: not answers(patient), 5.0, "the port to be dead", 0.02)
        wait_for(lambda: answers(patient), 60.0, "the port to be back", 0.05)
        times_s.append(time.monotonic() - killed_s)
        if times_s[-1] < 8:
            break
    print(f'{{"proxy_dead_s": {times_s}}}')
    assert min(times_s) < 8


def answers(service: Running) -> bool:
    with suppress(httpx.HTTPError):
        return service.client.get("/healthz", timeout=1.0).status_code == 200
    return False


def test_only_the_threads_that_work_on_jobs_give_way(patient: Running) -> None:
    """The threads that answer health checks and leave heartbeats have everybody's priority."""
    patient.ended(start_jobs(patient, 1, steps=2))
    priorities: dict[int, list[str]] = {}
    for task in Path(f"/proc/{patient.pids('engine')[0]}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        priorities.setdefault(int(fields[16]), []).append(task.name)
    assert {*priorities} == {0, 10} and len(priorities[0]) > 5 and priorities[10], priorities
    for part in ("proxy", "ingress", "dispatcher", "controller"):
        assert os.getpriority(os.PRIO_PROCESS, patient.pids(part)[0]) == 0
