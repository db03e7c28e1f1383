"""The service's log lines reach the follower: whole, once, in order, across a file that was full."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from skylapse.serve.core import logs
from skylapse.serve.core.logs import JsonLines, as_text, log_as_json
from skylapse.serve.deployment.log_following import LogFollower

JOB = "video_" + "0a" * 16


@pytest.fixture
def bare_logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger without the handlers of other tests."""
    logger = logging.getLogger("skylapse")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(logger, "level", logger.level)
    return logger


def stopped(folder: Path, found: list[str]) -> LogFollower:
    """A follower that looks when it is told to, and lets go of its files when it is closed again."""
    follower = LogFollower(folder, found.append)
    follower.close()
    follower._files.clear()
    return follower


def test_lines_of_all_files_are_handed_on_in_the_order_of_their_times(tmp_path: Path) -> None:
    for name, seconds in (("engine-1", (1, 4)), ("ingress-2", (2, 3))):
        lines = [json.dumps({"time": f"2026-11-28T00:00:0{s}.000Z", "message": name}) for s in seconds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found: list[str] = []
    LogFollower(tmp_path, found.append).close()
    assert [json.loads(line)["message"] for line in found] == ["engine-1", "ingress-2", "ingress-2", "engine-1"]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    found: list[str] = []
    follower = stopped(tmp_path, found)
    with (tmp_path / "a.jsonl").open("a") as file:
        for text, whole in (("one\ntw", ["one"]), ("o\n", ["one", "two"])):
            file.write(text)
            file.flush()
            follower._look()
            assert found == whole
    follower._run()  # it has been closed: a last look, and its files are too


def test_a_file_that_was_full_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare_logger: logging.Logger
) -> None:
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 2000)
    monkeypatch.setenv("SKYLAPSE_LOG_TO", str(tmp_path))
    log_as_json("engine")
    found: list[str] = []
    follower = stopped(tmp_path, found)
    for number in range(40):
        bare_logger.info("job %s, line %d", JOB, number)
        follower._look()
    follower._run()
    for handler in bare_logger.handlers:
        handler.close()
    assert [json.loads(line)["message"] for line in found] == [f"job {JOB}, line {number}" for number in range(40)]
    assert {json.loads(line)["job"] for line in found} == {JOB}
    assert len([*tmp_path.iterdir()]) == 2, "the file and the one before it"


def test_a_single_file_such_as_a_containers_stdout_takes_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare_logger: logging.Logger
) -> None:
    monkeypatch.setenv("SKYLAPSE_LOG_TO", str(tmp_path / "log"))
    monkeypatch.setenv("SKYLAPSE_LOG_LEVEL", "warning")
    log_as_json("engine")
    bare_logger.info("not this")
    bare_logger.warning("this")
    for handler in bare_logger.handlers:
        handler.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["message"] == "this" and json.loads(line)["process"] == "engine"


def test_a_terminal_shows_the_time_the_part_and_the_message() -> None:
    record = logging.LogRecord(
        "skylapse.serve.engine.worker", logging.WARNING, __file__, 1, "job %s failed", (JOB,), None
    )
    told = as_text(JsonLines("engine").format(record))
    assert told[12:] == f" warning engine: job {JOB} failed" and told[2] == ":"
    assert as_text("no JSON") == "no JSON"


def test_a_pipe_named_by_proc_as_a_containers_stdout_is_takes_lines(
    monkeypatch: pytest.MonkeyPatch, bare_logger: logging.Logger
) -> None:
    """deploy/kuberay.yaml names /proc/1/fd/1."""
    read, write = os.pipe()
    monkeypatch.setenv("SKYLAPSE_LOG_TO", f"/proc/{os.getpid()}/fd/{write}")
    log_as_json("engine")
    bare_logger.warning("job %s failed", JOB)
    for handler in bare_logger.handlers:
        handler.close()
    os.close(write)
    with os.fdopen(read) as pipe:
        assert json.loads(pipe.read())["job"] == JOB
