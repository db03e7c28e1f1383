"""Commands that need more than the core: who runs them, with what, and what is said where that is missing."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from command import Command, command_in

from skylapse.cli import ELSEWHERE
from skylapse.runtime.core.config import Settings


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return command_in(tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_all_that_follows_the_name_is_handed_over(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Sequence[str], Settings]] = []

    def run(arguments: Sequence[str], settings: Settings) -> int:
        given.append((arguments, settings))
        return 3

    module = ModuleType(f"skylapse.{ELSEWHERE[name][0]}")
    module.__dict__[name] = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("SKYLAPSE_MAX_QUEUED", "7")
    assert command(name, "--help", "--model", "demo", "-x").status == 3
    ((arguments, settings),) = given
    assert (list(arguments), settings.max_queued) == (["--help", "--model", "demo", "-x"], 7)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_its_own_help_is_reached(name: str, command: Command) -> None:
    pytest.importorskip("ray")
    result = command(name, "--help")
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: skylapse {name} ")


@pytest.mark.parametrize(
    ("missing", "status", "line"),
    [
        ("ray", 2, "skylapse: error: serve needs ray: pip install 'skylapse[serve]'"),
        ("ray.serve", 2, "skylapse: error: serve needs ray.serve: pip install 'skylapse[serve]'"),
        (
            "skylapse.serve.jobs.services",
            1,
            "skylapse: failed: ModuleNotFoundError: No module named 'skylapse.serve.jobs.services'",
        ),
    ],
    ids=["dependency", "part of it", "our own"],
)
def test_a_missing_module_is_one_line(
    missing: str, status: int, line: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(arguments: Sequence[str], settings: Settings) -> int:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    module = ModuleType("skylapse.serve.commands.serve")
    module.__dict__["serve"] = serve
    monkeypatch.setitem(sys.modules, module.__name__, module)
    result = command("serve")
    assert (result.status, result.stdout, result.stderr.count("\n")) == (status, "", 1)
    assert result.stderr.startswith(line)


def test_the_extra_that_a_command_needs_is_one_of_ours(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for _, extra, _ in ELSEWHERE.values()} <= {*extras}


def test_they_are_listed_among_the_commands(command: Command) -> None:
    listed = command("--help").stdout
    for name, (_, _, what) in ELSEWHERE.items():
        assert f"    {name} " in listed and what in listed
