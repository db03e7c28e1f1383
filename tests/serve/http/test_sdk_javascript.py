"""OpenAI's JavaScript SDK works unmodified, on Node."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ..sdk import run_program

HERE = Path(__file__).parents[1] / "javascript"
PROGRAM = HERE / "sdk.cjs"
LOCK = json.loads((HERE / "package-lock.json").read_text())
MODULES = Path(sys.prefix) / "javascript" / "node_modules"  # `make clients` installs them there
NAMES = re.findall(r"^scenarios\.(\w+) = ", PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def results(sdk_facts: dict[str, Any]) -> dict[str, str | None]:
    """Run every scenario and return its result: None, or the error."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node on this machine")
    if not (MODULES / "openai").exists():
        pytest.skip("npm's openai is not installed: `make clients`")
    printed = run_program([node, "--throw-deprecation", str(PROGRAM)], sdk_facts, {"NODE_PATH": str(MODULES)})
    assert printed["version"] == LOCK["packages"]["node_modules/openai"]["version"]
    results: dict[str, str | None] = printed["results"]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_sdk(results: dict[str, str | None], name: str) -> None:
    if (problem := results[name]) is not None:
        pytest.fail(problem, pytrace=False)


def test_the_lock_file_names_no_registry() -> None:
    assert "resolved" not in json.dumps(LOCK) and all("integrity" in p for name, p in LOCK["packages"].items() if name)
