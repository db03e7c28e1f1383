"""A fault of a running service is logged once, and its end once; a failed start is told with its cause."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skylapse.serve.core.config import ServeConfig
from skylapse.serve.deployment.status_watch import StatusWatch, failure_in
from skylapse.serve.store.database import Database
from skylapse.serve.store.processes import DISPATCHER, ENGINE, Processes

GROUPS = ServeConfig().groups
TRACEBACK = """The deployment failed to start 1 times in a row. This may be due to a problem with its constructor or \
initial health check failing. See controller logs for details. Retrying 2 more time(s). Error:
ray::ServeReplica:skylapse:Engine.initialize_and_get_metadata() (pid=1)
  File "replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  File "registry.py", line 1, in resolve_folder
    raise ValueError("no")
ValueError: model must be demo, a folder or a hub id, got 'nope'
"""


def status(
    application: str = "RUNNING", engine: str = "HEALTHY", message: str = "", running: int = 1, proxy: str = "HEALTHY"
) -> Any:
    """Return a status as Serve's controller tells it."""

    def enum(name: str) -> Enum:
        return Enum("Status", [(name, name)])[name]  # type: ignore[misc, index]

    part = SimpleNamespace(status=enum(engine), message=message, replica_states={enum("RUNNING"): running})
    app = SimpleNamespace(status=enum(application), message="", deployments={"Engine": part})
    return SimpleNamespace(proxies={"node": enum(proxy)}, applications={"skylapse": app})


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    database.migrate()
    yield Processes(database)
    database.close()


def ready(processes: Processes) -> tuple[StatusWatch, dict[str, Any]]:
    """A watch of a service that has started, and what Serve says of it from now on, to be changed."""
    now = {"status": status()}

    def ask() -> Any:
        if isinstance(now["status"], Exception):
            raise now["status"]
        return now["status"]

    watch = StatusWatch(ask, processes, "skylapse", GROUPS)
    processes.beat("d", DISPATCHER, {})
    processes.beat("e", ENGINE, {"state": "ready", "model": "demo", "ready_s": 1.0, "load_s": 1.0, "warm_up_s": 0.0})
    watch.look()
    assert watch.is_ready and watch.failure is None and watch.engines["Engine"]["ready_s"] == 1.0
    return watch, now


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (status(engine="UNHEALTHY", running=0), "Engine is unhealthy: 0 of 0 run"),
        (status(proxy="UNHEALTHY"), "the HTTP proxy is unhealthy"),
        (ConnectionError(), "Serve's controller does not answer (ConnectionError)"),
    ],
)
def test_what_is_unhealthy_is_said_once_and_its_end_too(
    bad: Any, said: str, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    watch, now = ready(processes)
    with caplog.at_level(logging.INFO, "skylapse"):
        for now["status"] in (bad, bad, status(), status()):
            watch.look()
    assert caplog.messages[0] == said
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[1].endswith("is well again")


def test_an_engine_that_gives_no_sign_is_told(
    processes: Processes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, _ = ready(processes)
    monkeypatch.setattr("skylapse.serve.deployment.status_watch.SILENT_S", -1.0)
    with caplog.at_level(logging.INFO, "skylapse"):
        watch.look()
        watch.look()
    assert sorted(caplog.messages) == [
        "dispatcher d has given no sign for more than -1 s",
        "engine e has given no sign for more than -1 s",
    ]


def test_signs_of_the_service_before_this_one_make_nothing_ready(processes: Processes) -> None:
    processes.beat("d", DISPATCHER, {})
    processes.beat("e", ENGINE, {"state": "failed", "error": "of yesterday"})
    watch = StatusWatch(status, processes, "skylapse", GROUPS)
    watch.look()
    assert not watch.is_ready and watch.failure is None


def test_the_reason_of_a_failed_start_comes_from_the_store_or_from_serve(processes: Processes) -> None:
    watch = StatusWatch(lambda: status("DEPLOYING", "UPDATING"), processes, "skylapse", GROUPS)
    processes.beat("e", ENGINE, {"state": "failed", "error": "the weights lack x", "is_mistake": False})
    watch.look()
    assert str(watch.failure) == "Engine cannot be started: the weights lack x" and not watch.failure.is_mistake
    watch = StatusWatch(lambda: status("DEPLOYING", "UPDATING", TRACEBACK), processes, "skylapse", GROUPS)
    watch.look()
    told = "Engine cannot be started: model must be demo, a folder or a hub id, got 'nope'"
    assert str(watch.failure) == told and watch.failure.is_mistake


def test_an_error_of_ours_is_told_with_its_type_and_a_death_is_no_reason() -> None:
    assert str(failure_in("Engine", "torch.OutOfMemoryError: 3 GiB")) == (
        "Engine cannot be started: OutOfMemoryError: 3 GiB"
    )
    assert failure_in("Engine", "The replica died unexpectedly.") is None
