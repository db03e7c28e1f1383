"""Commands and Python of README and docs/ run as they stand: in this process, each page in a folder of its own.

Commands that take minutes, a GPU, a cluster or the network are named below with the reason. tests/walk runs the lines
of README and the first pages once more as a stranger types them, with nothing left out that this machine has.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_blocks import PAGES, ROOT, Block, blocks
from our_commands import VARIABLE, calls

if TYPE_CHECKING:
    from serve.service import Service

NOT_HERE = {  # what a line says -> why it is not run here
    r"skylapse serve(?!.*(--check|--print-config))": "stays until it is stopped: tests/walk, tests/faults",
    r"skylapse compile (?!.*--status)": "half a minute of compiling: tests/walk, tests/compile",
    r"skylapse models inspect .*--device-memory": "ten seconds: tests/walk, tests/runtime/checkpoints",
    r"skylapse bench (all|goodput|gate|decode)": "minutes",
    r"skylapse bench denoise --profile": "a minute: tests/benchmarks/test_profile.py",
    r"skylapse bench serve": "minutes of load on a service: test_plan_of_the_page_is_accepted, tests/benchmarks/load",
    r"skylapse bench simulate": "minutes: tests/benchmarks/simulate",
    r"skylapse bench report": "every plot: tests/benchmarks/test_report.py",
    r"skylapse bench history": "writes into the package's own results",
    r"benchmarks.report.document": "writes into the repository: tests/benchmarks/test_documents.py",
    r"kernels inspect|kernels\.inspect|kernels\.tune": "minutes: tests/kernels/test_inspect.py, test_tune.py",
    r"skylapse\.benchmarks (kernels|pick)": "minutes, or a GPU: tests/benchmarks/test_kernel_suite.py, test_pick.py",
    r"gpu_lease(\.| --dry-run| --merge| --apply)": "minutes, or a GPU: tests/benchmarks/test_gpu_lease.py",
    r"SKYLAPSE_KERNELS=": "a GPU's kernels",
    r"skylapse models (download|calibrate)": "the network, or minutes",
    r"skylapse keys (revoke|rotate) key_": "the id of a key that is not there",
    r"skylapse (jobs|usage|store) ": "a store with jobs: tests/serve",
}
SHORT = {"generate": ("--steps", "2")}  # options that make a command quick, and change nothing that a page says


def reason(command: str) -> str | None:
    return next((why for said, why in NOT_HERE.items() if re.search(said, command)), None)


def commands(page: Path) -> list[str]:
    return [command for block in blocks(page) if block.is_shell for command in block.commands]


def runs(page: Path) -> bool:
    return any(reason(command) is None and any(calls(command)) for command in commands(page))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder that a reader of the pages has: a store, two results, and files of settings."""
    from skylapse.serve.core.config import ServeConfig
    from skylapse.serve.jobs.services import open_context

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SKYLAPSE_DATA")]:
        monkeypatch.delenv(name)
    open_context(ServeConfig(data=str(tmp_path / "skylapse-data"))).database.close()
    for name in ("settings.json", "settings.yaml"):
        (tmp_path / name).write_text("{}")
    for name in ("old.json", "new.json"):
        shutil.copy(ROOT / "benchmarks" / "results" / "cpu" / "denoise.json", name)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=lambda page: page.name)
def test_commands_of_a_page_run_one_after_the_other(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in commands(page):
        if command.startswith("export ") and "$(" not in command:
            for word in shlex.split(command)[1:]:
                if VARIABLE.match(word) and "..." not in word:
                    monkeypatch.setenv(*word.split("=", 1))
        for call in calls(command) if reason(command) is None else ():
            short = SHORT.get(call.words[1], ()) if call.words[0] == "skylapse" else ()
            try:
                status = type(call)((*call.words, *short), call.variables).run()
            except SystemExit as ended:  # --help
                status = int(ended.code or 0)
            told = capsys.readouterr()
            assert status == 0, f"{command}\n{told.out[-1000:]}{told.err[-1000:]}"
            assert [name for name in written(call.words) if not (folder / name).is_file()] == [], command


def written(words: tuple[str, ...]) -> Iterator[str]:
    for at, word in enumerate(words[:-1]):
        if word in ("-o", "--output", "--sheet") and words[1] == "generate":
            yield words[at + 1]


def test_plan_of_the_page_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`bench serve`'s lines up to their first request."""

    class Accepted(BaseException):
        pass

    def accepted(*_: object) -> None:
        raise Accepted

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("skylapse.benchmarks.load.command._target", accepted)
    lines = [command for page in PAGES for command in commands(page) if "bench serve" in command]
    assert lines
    for command in lines:
        for call in calls(command):
            with pytest.raises(Accepted):
                call.run()


def python_of(name: str) -> list[Block]:
    return [block for block in blocks(ROOT / name) if block.language == "python"]


@pytest.mark.parametrize(
    "block", [*python_of("docs/start.md")[:1], *python_of("docs/engine.md")], ids=lambda one: one.place
)
def test_python_that_makes_clips_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.place, "exec"), {})
    assert (tmp_path / "out.mp4").is_file() or "Finished" in capsys.readouterr().out


def test_python_of_a_client_runs(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of first steps, on a service in this process; its four seconds of video are as they are."""
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", service.key())
    (block,) = (block for block in python_of("docs/start.md") if "OpenAI()" in block.text)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Sora API is scheduled", DeprecationWarning)
        warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)  # a script's, which ends with it
        exec(compile(block.text, block.place, "exec"), names)
        assert (tmp_path / "circle.mp4").read_bytes()[4:8] == b"ftyp"
        client = names["client"]
        longer = client.videos.poll(names["longer"].id, poll_interval_ms=50)  # type: ignore[attr-defined]
        assert longer.status == "completed", longer
        client.close()  # type: ignore[attr-defined]


def test_every_reason_is_of_a_line_that_there_is() -> None:
    lines = [command for page in PAGES for command in commands(page)]
    later = {r"skylapse models (download|calibrate)", r"skylapse (jobs|usage|store) "}
    assert [said for said in NOT_HERE if said not in later and not any(re.search(said, line) for line in lines)] == []
