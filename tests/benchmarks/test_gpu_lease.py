"""The scripts of a lease: all of them dry, without what the device machine lacks; cuts, deaths, and the result."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from skylapse.benchmarks import machine
from skylapse.benchmarks.gpu_lease import calls, drive, journal, tune
from skylapse.benchmarks.gpu_lease.__main__ import main as drive_all
from skylapse.benchmarks.gpu_lease.calls import CALLS
from skylapse.benchmarks.gpu_lease.lines import Absent, Launch, Line, Note, decode, encode, measured
from skylapse.benchmarks.gpu_lease.merge import launches_of, write_merged
from skylapse.benchmarks.gpu_lease.predictions import predicted_coding
from skylapse.benchmarks.gpu_lease.streams import overlap
from skylapse.benchmarks.gpu_lease.vae import NARROW_21
from skylapse.benchmarks.harness import spread_of
from skylapse.benchmarks.kernels.apart import Limits
from skylapse.benchmarks.record import Check, Comparison, Contestant, LeaseReport, Row, read, read_any
from skylapse.kernels import launches
from skylapse.kernels.toolchain import ARCHITECTURES, triton
from skylapse.kernels.tune import searches

PACKAGE = "skylapse.benchmarks.gpu_lease"
LACKING = ("pydantic", "av", "ftfy", "diffusers", "fastapi", "ray", "sqlalchemy")  # on the device machine
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All calls, as they run on the device machine but for the device."""
    out = tmp_path_factory.mktemp("dry")
    done = in_a_bare_process(out, "-m", PACKAGE, "--dry-run", "--out", str(out))
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return out


def in_a_bare_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    blocked = folder / "blocked"
    blocked.mkdir(exist_ok=True)
    (blocked / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, (str(blocked), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "SKYLAPSE_PROFILE_DIR": str(folder / "p")}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_call_runs_where_packages_are_missing_and_all_give_one_result(dry: Path) -> None:
    (path,) = dry.glob("gpu_lease-*.json")
    report = read(path, LeaseReport)
    assert (report.partial, report.failures) == (None, {})
    assert set(report.settings["code"]) == {call.name for call in CALLS}
    assert {check.status for check in report.checks} == {"ok"}
    checked = {check.op.removeprefix("captured=").partition("=")[0] for check in report.checks}
    assert {"attention", "attention_sparse", "linear", "upsample_conv2d", "conv3d", "solver_step"} <= checked
    compared = {row.op for row in report.rows}
    assert {"attention", "attention_ragged", "attention_biased", "linear_gelu", "qk_norm_rope"} <= compared
    bad = {it.reason for row in report.rows for it in row.contestants.values() if it.status == "failed"}
    assert bad == set()
    groups = {one.name.partition("/")[0] for one in report.measurements}
    assert {"blocks", "vae", "peaks", "engine"} <= groups
    assert report.settings["checks/doctor"]["gpu"] is None
    assert triton is None or any(name.startswith("tune/rms_norm") for name in report.settings)


@pytest.mark.slow
def test_a_call_by_its_name_runs_nothing_that_an_earlier_one_has(dry: Path, tmp_path: Path) -> None:
    asked = ("--dry-run", "--out", str(tmp_path / "out"), "--resume", str(dry))
    done = in_a_bare_process(tmp_path, "-m", f"{PACKAGE}.attention", *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "0 cases measured, 0 failed" in done.stdout
    (path,) = (tmp_path / "out").glob("*.json")
    assert read(path, LeaseReport).rows == read(next(iter(dry.glob("gpu_lease-*.json"))), LeaseReport).rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_a_call_that_is_not_dry_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive.main("checks", ["--out", str(tmp_path)]) == 1
    assert not list(tmp_path.glob("gpu_lease-*.json")) and "torch finds no CUDA device" in capsys.readouterr().out


def test_a_mistake_of_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert drive.main("checks", []) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- a worker that is not real ----------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
order = json.loads(sys.stdin.read())
def tell(**message):
    print("skylapse lease: " + json.dumps(message), flush=True)
tell(facts={"device": "made up", "threads": 1}, device="made up")
skipped = {tuple(pair) for pair in [*order["done"].get("made up", []), *order["tried"]]}
for name in CASES:
    if ("attention", name) in skipped:
        continue
    avoided = [contestant for _, case, contestant in order["avoid"] if case == name]
    tell(call="attention", begin=name, limit_s=1.0 if name == "hangs" else 60.0)
    if name == "peer dies" and not avoided:
        tell(at=["attention", name, "peer"])
        os._exit(11)
    if name == "peer loses" and not avoided:
        tell(avoid=["attention", name, "peer"])
        os._exit(70)
    if name == "dies":
        os._exit(7)
    if name in ("hangs", "long"):
        time.sleep(1000)
    if name == "loses":
        tell(lost=True)
        tell(end=name, how="failed", seconds=0.5)
        os._exit(70)
    print("a library says ", end="")
    tell(line={"kind": "Note", "name": name, "value": avoided})
    tell(end=name, how="ok", seconds=0.5)
tell(stop=None)
"""


def run(out: Path, *cases: str, resume: Path | None = None, again: bool = False, limit_s: float = 60.0) -> int:
    options = argparse.Namespace(
        out=out, resume=resume, again=again, limit_s=limit_s, seed=0, commit=None, dry_run=True
    )
    return drive.run(["attention"], options, [sys.executable, "-c", f"CASES = {cases!r}\n{WORKER}"])


def result(out: Path) -> LeaseReport:
    return read(out / "gpu_lease-made-up.json", LeaseReport)


def notes(out: Path) -> dict[str, Any]:
    return {name: value for name, value in result(out).settings.items() if name != "code"}


def test_a_case_that_dies_hangs_or_loses_the_device_costs_itself_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "first", "dies", "second", "hangs", "third", "loses", "last") == 1
    assert list(notes(tmp_path)) == [f"attention/{name}" for name in ("first", "second", "third", "last")]
    failures = result(tmp_path).failures
    assert failures["attention/dies"] == "its process ended with status 7"
    assert failures["attention/hangs"] == "its process hung"
    assert result(tmp_path).partial == f"not run: {', '.join(c.name for c in CALLS if c.name != 'attention')}"


def test_a_contestant_that_takes_the_process_with_it_is_left_out_of_its_case(tmp_path: Path) -> None:
    assert run(tmp_path, "peer dies", "peer loses", "next") == 0
    assert notes(tmp_path) == {"attention/peer dies": ["peer"], "attention/peer loses": ["peer"], "attention/next": []}


def test_what_a_cut_left_is_measured_by_the_next_run(tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert run(cut, "first", "long", "last", limit_s=3.0) == 1
    assert list(notes(cut)) == ["attention/first"]
    assert "out of time in attention: long" in (result(cut).partial or "")
    with (cut / "attention.jsonl").open("a") as file:
        file.write('{"code": "torn')
    assert run(whole, "first", "last", resume=cut) == 0
    assert list(notes(whole)) == ["attention/first", "attention/last"]
    assert "attention:" not in (result(whole).partial or "")


def test_what_failed_is_tried_again_only_if_asked(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    assert run(first, "dies") == 1
    assert run(second, "dies", resume=first) == 0
    assert result(second).failures == result(first).failures
    assert run(third, "dies", resume=first, again=True) == 1


def test_other_code_or_another_device_has_done_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    assert run(first, "first") == 0
    done = journal.Journal(second / "attention.jsonl", journal.fingerprint(), first / "attention.jsonl").done()
    assert done == {"made up": ["first"]}
    assert journal.Journal(second / "other.jsonl", "other code", first / "attention.jsonl").done() == {}


def test_fingerprint_is_of_the_code_that_figures_depend_on(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "adaln.py").write_text("x = 1\n")
    before = journal.fingerprint(tmp_path)
    (tmp_path / "docs.md").write_text("words")
    assert journal.fingerprint(tmp_path) == before
    (tmp_path / "kernels" / "adaln.json").write_text("{}")
    assert journal.fingerprint(tmp_path) != before


# --- lines, commands, launches ----------------------------------------------------------------------------------------


def lines() -> Iterator[Line]:
    spread = spread_of([1.0, 2.0, 3.0])
    yield measured("a", "s", [1.0, 2.0], labels={"tokens": 3})
    yield Comparison(name="a", of="x", to="y", spread=spread, samples=[1.0, 2.0, 3.0])
    yield Check(op="adaln", case="small", status="ok", worst=0.1, tolerance=0.2, runs=3)
    yield Limits(limits={"bytes_per_s": spread})
    contestants = {
        "triton": Contestant(status="ok", seconds=spread, roofline_share=0.5),
        "cudnn": Contestant(status="ok", seconds=spread, ratio=spread),
        "sage": Contestant(status="missing", reason="is not installed"),
    }
    yield Row(op="attention", case="4096", ours="triton", num_bytes=1, operations=2, contestants=contestants)
    yield Note(name="doctor", value={"gpu": None})
    yield Absent(name="x", reason="y")
    yield Launch(name="adaln", arch=90, row={"dtypes": ["bf16"]}, asked=("descriptors",))


@pytest.mark.parametrize("line", list(lines()), ids=lambda line: type(line).__name__)
def test_line_comes_back_from_a_journal_as_it_was(line: Line) -> None:
    assert decode(json.loads(json.dumps(encode(line)))) == line


def test_merged_result_has_every_kind_of_line_where_the_report_looks_for_it(tmp_path: Path) -> None:
    book = journal.Journal(tmp_path / "attention.jsonl", "code")
    book.add("NVIDIA H100", facts={"device": "NVIDIA H100", "capability": 90, "commit": "abc", "dirty": False})
    book.add("NVIDIA H100", case="all", begun=0)
    for line in lines():
        book.add("NVIDIA H100", case="all", line=encode(line))
    book.add("NVIDIA H100", case="all", ended="ok", seconds=2.0)
    book.add("NVIDIA H100", case="cut", begun=0)
    book.add("NVIDIA H100", case="cut", line=encode(Note(name="never", value=1)))
    (path,) = write_merged([tmp_path], tmp_path)
    report = read_any(path)
    assert path.name == "gpu_lease-nvidia-h100.json" and isinstance(report, LeaseReport)
    assert [len(x) for x in (report.rows, report.checks, report.measurements, report.comparisons)] == [1, 1, 1, 1]
    assert report.limits and report.missing == {"x": "y"} and report.elapsed_s == 2.0
    assert report.settings == {"code": {"attention": ["code"]}, "attention/doctor": {"gpu": None}}


def test_peaks_of_a_gpu_stand_beside_what_the_shape_model_says(tmp_path: Path) -> None:
    name = "peaks/14B 480p: 32760 tokens, one branch, bf16/step"
    book = journal.Journal(tmp_path / "blocks.jsonl", "code")
    book.add("a GPU", facts={"device": "a GPU", "capability": 90})
    book.add("a GPU", case="peak", line=encode(measured(name, "bytes", [3e9])))
    book.add("a GPU", case="peak", ended="ok", seconds=1.0)
    assert drive_all(["--merge", str(tmp_path), "--out", str(tmp_path)]) == 0
    report = read(tmp_path / "gpu_lease-a-gpu.json", LeaseReport)
    assert [one.name for one in report.measurements] == [name, f"{name}/predicted"]
    # The tokens' rows before and behind a block, and the widest part of the feed-forward, at the least.
    assert 5120 + 13824 < report.measurements[1].spread.median / (2 * 32760) < 8 * 5120 + 13824


def test_predicted_coding_grows_with_the_frame_and_the_chunk() -> None:
    small, wide, long = (
        predicted_coding(NARROW_21, "decode", torch.bfloat16, chunk, 16, width, 90)
        for chunk, width in ((1, 32), (1, 64), (4, 32))
    )
    assert 1.5 * small < wide < 2.5 * small and small < long


def test_commands_fit_the_device_tool_and_say_what_they_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_commit", lambda: " --commit 1234567")
    text = calls.listing()
    for call in CALLS:
        command = calls.device_command(call)
        assert command in text and len(command) < 2000 and f"{PACKAGE}.{call.name}" in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert text.count("# carry: .lease") == len(CALLS)


def test_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.describe()["commit"] == ""


@pytest.mark.skipif(triton is None, reason="Triton cannot be imported")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_searches_have_names_of_their_own(arch: int) -> None:
    names = [(search.op, tune.words(search)) for search in searches(arch)]
    assert len(names) == len(set(names)) > 50


def test_found_launches_are_written_into_the_files_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(launches.FOLDER / "rms_norm.json", tmp_path)
    row = json.loads((tmp_path / "rms_norm.json").read_text())["90"][0]
    row |= {"launch": {**row["launch"], "num_warps": 16}, "measured": "a device"}
    book = journal.Journal(tmp_path / "tune.jsonl", "code")
    book.add("a device", case="one", line=encode(Launch(name="rms_norm", arch=90, row=row, asked=())))
    book.add("a device", case="one", ended="ok", seconds=1.0)
    monkeypatch.setattr(launches, "FOLDER", tmp_path)
    assert tune.apply(launches_of([tmp_path])) == 0
    assert json.loads((tmp_path / "rms_norm.json").read_text())["90"][0] == row
    assert tune.apply([]) == 1


def test_overlap_of_streams_is_when_both_ran() -> None:
    found = overlap({7: [(0, 10), (5, 20), (30, 40)], 20: [(15, 35)], 3: [(0, 1)]})
    assert found.busy_s == {"7": 3e-8, "20": 2e-8, "3": 1e-9}
    assert (found.both_s, found.less_busy_s) == (1e-8, 2e-8)
