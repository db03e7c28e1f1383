"""Suites as processes: how one ends and what is told of it; `bench all`, by suites that say how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from skylapse.benchmarks import command
from skylapse.benchmarks.suites import everything
from skylapse.benchmarks.suites.apart import Died, run_apart
from skylapse.benchmarks.suites.everything import Ended, Job

# --- processes --------------------------------------------------------------------------------------------------------


def test_function_apart_answers_and_its_end_is_told() -> None:
    assert run_apart(json.dumps, {"obj": [1, None]}) == "[1, null]"
    with pytest.raises(Died, match="exit code 3: it said nothing"):
        run_apart(os._exit, {"status": 3})
    with pytest.raises(Died, match=r"exit code 1: json\.decoder\.JSONDecodeError: Expecting"):
        run_apart(json.loads, {"s": "{"})
    with pytest.raises(Died, match="signal 6"):
        run_apart(os.abort, {})
    with pytest.raises(Died, match=r"not done within 0\.3 s"):
        run_apart(signal.pause, {}, timeout_s=0.3)


def test_suite_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "ENDING_S", 0.1)
    lines = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert everything._end(process) == -signal.SIGKILL


# --- all of them ------------------------------------------------------------------------------------------------------


class Suites:
    """Says how each suite ends, and how long it takes of a time that is told."""

    def __init__(self, **ends: tuple[int | type[BaseException], float]) -> None:
        self.ends, self.now, self.asked = ends, 0.0, dict[str, list[str]]()

    def run(self, words: Sequence[str], timeout_s: float) -> int:
        name, *rest = words
        self.asked[name] = [*rest, f"timeout {timeout_s:g}"]
        status, seconds = self.ends.get(name, (0, 10.0))
        self.now += seconds
        if not isinstance(status, int):
            raise status
        out = Path(rest[rest.index("--out") + 1])
        content = {"measurements": [1, 2], "failures": {"a/b": "no"} if status else {}, "partial": None}
        out.write_text(json.dumps(content))
        return status


def all_of(tmp_path: Path, suites: Suites, limit_s: float | None, *words: str) -> tuple[list[Ended], bool]:
    options = everything._parser().parse_args(["--results", str(tmp_path), *words])
    return everything.run_all(everything.jobs(options), limit_s, suites.run, lambda: suites.now)


def test_every_suite_runs_though_one_fails(tmp_path: Path) -> None:
    suites = Suites(decode=(1, 5.0))
    (tmp_path / "memory.json").write_text("an earlier run's")
    ended, interrupted = all_of(tmp_path, suites, None, "--quick", "--seed", "7")
    names = [name for name in everything.SHARES if name != "kernels-gpu" or torch.cuda.is_available()]
    assert [one.job.label for one in ended] == names
    assert not interrupted
    assert [one.job.label for one in ended if one.status] == ["decode"]
    assert suites.asked["kernels"][-4:] == ["--quick", "--suite", "cpu", "timeout inf"]
    assert {"--seed", "7", "--quick"} <= set(suites.asked["memory"])
    assert "--limit" not in suites.asked["memory"]
    text = everything.table(ended)
    assert "2 measurements, 1 failed (a/b)" in text
    assert text.count("\n") == len(ended) + 1


def test_time_that_one_leaves_over_is_the_others_and_none_begins_without_any(tmp_path: Path) -> None:
    suites = Suites(memory=(0, 0.0), startup=(0, 100.0))
    ended, _ = all_of(tmp_path, suites, 100.0, "--only", "startup", "--only", "memory", "--only", "engine")
    assert [one.job.label for one in ended] == ["engine", "startup", "memory"]
    assert suites.asked["engine"][-3:] == ["--limit", "50", "timeout 100"]  # 80 of 80 + 50 + 30
    assert suites.asked["startup"][-3:] == ["--limit", "56", "timeout 112.5"]  # of the 90 that are left, 50 of 80
    assert (ended[2].status, ended[2].told) == (None, "no time was left")


def test_ctrl_c_ends_all_and_the_table_tells(tmp_path: Path) -> None:
    ended, interrupted = all_of(tmp_path, Suites(denoise=(KeyboardInterrupt, 3.0)), None)
    assert interrupted
    assert [(one.job.label, one.status, one.told) for one in ended[1:]] == [("denoise", 130, "no result")]


def test_file_of_a_suite_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert everything.told_by(path) == "no result"
    path.write_text("{")
    assert everything.told_by(path) == "a result that is no JSON"
    path.write_text(json.dumps({"rows": [1], "checks": [], "partial": "interrupted", "missing": {"a": "b"}}))
    assert everything.told_by(path) == "0 checks, 1 rows, 1 missing, partial: interrupted"


def test_command_that_is_not_in_this_tree_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.BENCHMARKS, "memory", ("suites.nowhere.memory", "nothing"))
    [ended], _ = all_of(tmp_path, Suites(), None, "--only", "memory")
    assert ended == Ended(Job("memory", "memory", ended.job.arguments, ended.job.out), None, 0.0, "not in this tree")
