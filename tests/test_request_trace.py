"""One request enters few files of the package: a reader who follows it opens no more than these."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FILES = {"post": 29, "tick": 29, "clip": 23, "content": 13, "whole": 102}  # at most, by the part of a request's way
TICK_CHANGES = 378  # from one file to another, in a steady tick


@pytest.fixture(scope="module")
def trace(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("fastapi")
    command = [sys.executable, str(root / "tests" / "request_trace.py"), str(tmp_path_factory.mktemp("trace"))]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("part", FILES)
def test_part_of_a_request_enters_at_most_so_many_files(part: str, trace: dict[str, Any]) -> None:
    entered = trace[part]["files"]
    assert entered and len(entered) <= FILES[part], entered


def test_steady_tick_goes_from_file_to_file_at_most_so_often(trace: dict[str, Any]) -> None:
    assert 0 < trace["tick"]["changes"] <= TICK_CHANGES
