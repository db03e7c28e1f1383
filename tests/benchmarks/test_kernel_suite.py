"""`bench kernels`: what a run writes, also when it fails, hangs, dies or is interrupted."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skylapse.benchmarks.harness import Missing
from skylapse.benchmarks.kernels import apart, checks, command, suite
from skylapse.benchmarks.kernels.apart import Begin, run_apart
from skylapse.benchmarks.kernels.case import Case, Suite
from skylapse.benchmarks.kernels.checks import Claim, judge
from skylapse.benchmarks.record import SCHEMA, Check, KernelReport, Row, from_json, read, to_json, write
from skylapse.cli import main
from skylapse.kernels.roofline import Cost

CPU = Suite(torch.device("cpu"), torch.float32, quick=True)


def case(op: str = "adaln", **makes: Callable[[], Callable[[], object]]) -> Case:
    return Case(op, "a case", Cost(1000, 10), torch.float32, lambda: makes)


def raises(error: Exception) -> Callable[..., Any]:
    def run(*_: object) -> Any:
        raise error

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "kernels.json"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases and checks that take no time."""
    cases = [case("adaln", skylapse=lambda: int, torch=lambda: str), case("rms_norm", skylapse=lambda: int)]
    monkeypatch.setattr(command, "cases", lambda suite, ops: [c for c in cases if c.op in ops])
    monkeypatch.setattr(command, "check", lambda suite, ops, seed: [Check(op=ops[0], case="a", status="ok", worst=0.0)])
    monkeypatch.setitem(command.CASE_S, ("cpu", True), 0.01)


ASKED = ["bench", "kernels", "--suite", "cpu", "--quick", "--op", "adaln", "--op", "rms_norm", "--out"]


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_run_of_the_cpu_suite_is_a_whole_result(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing: formula, launcher, clock and file of one operation."""
    asked = ["bench", "kernels", "--suite", "cpu", "--quick", "--op", "unpatchify", "--seed", "3", "--out", str(out)]
    assert main(asked) == 0
    report = read(out, KernelReport)
    assert report.partial is None and {check.status for check in report.checks} == {"ok"} and len(report.checks) == 4
    assert {row.op for row in report.rows} == {"unpatchify"} and len(report.rows) == 2
    for row in report.rows:
        assert {name for name, it in row.contestants.items() if it.status == "ok"} >= {"skylapse", "torch", "copy"}
        ratio = row.contestants["torch"].ratio
        assert ratio is not None and ratio.n >= 6 and 0.2 < ratio.median < 5  # the same lines on a CPU
        assert row.contestants["skylapse"].ratio is None and row.contestants["copy"].roofline_share is None
    assert report.machine["device"] and report.seed == 3 and set(report.limits) == {"bytes_per_s", "operations_per_s"}
    assert "4 of 4 checks right, 2 comparisons" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_failing_and_missing_peers_are_recorded_and_the_run_goes_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = case(
        skylapse=lambda: int,
        absent=raises(Missing("it is not installed")),
        unmakable=raises(RuntimeError("no such architecture")),
        broken=lambda: raises(RuntimeError("out of shared memory")),
    )
    monkeypatch.setattr(command, "cases", lambda suite, ops: [peers])
    assert main([*ASKED, str(out)]) == 0
    for row in read(out, KernelReport).rows:
        told = {name: (it.status, it.reason) for name, it in row.contestants.items()}
        assert told == {
            "skylapse": ("ok", None),
            "absent": ("missing", "it is not installed"),
            "unmakable": ("failed", "RuntimeError: no such architecture"),
            "broken": ("failed", "RuntimeError: out of shared memory"),
        }
    assert "absent                    missing: it is not installed" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_failure_of_ours_or_of_its_inputs_is_the_commands_status(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = case(skylapse=lambda: raises(RuntimeError("launch failed")), torch=lambda: int)
    no_room = Case("adaln", "too large", Cost(1, 1), torch.float32, raises(MemoryError("of 80 GiB")))
    monkeypatch.setattr(command, "cases", lambda suite, ops: [broken, no_room])
    assert main([*ASKED, str(out)]) == 1
    rows = read(out, KernelReport).rows[:2]
    assert [row.contestants["skylapse"].reason for row in rows] == [
        "RuntimeError: launch failed",
        "MemoryError: of 80 GiB",
    ]
    assert rows[0].contestants["torch"].status == "ok" and rows[0].contestants["torch"].ratio is None


@pytest.mark.usefixtures("small")
def test_operation_that_cannot_be_imported_is_a_failed_check(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cases", raises(ImportError("no module of that name")))
    assert main([*ASKED, str(out)]) == 1
    failed = [line for line in read(out, KernelReport).checks if line.status == "failed"]
    assert [(line.op, line.reason) for line in failed] == [
        ("adaln", "ImportError: no module of that name"),
        ("rms_norm", "ImportError: no module of that name"),
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_keeps_what_it_had_and_is_marked_partial(
    by: signal.Signals, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = suite.measure

    def measure(case: Case, *rest: Any) -> Row:
        if case.op == "rms_norm":
            signal.raise_signal(by)
        return real(case, *rest)

    monkeypatch.setattr(command, "measure", measure)
    assert main([*ASKED, str(out)]) == 130
    report = read(out, KernelReport)
    assert (report.partial, [row.op for row in report.rows]) == ("interrupted", ["adaln"])
    assert not report.is_publishable


@pytest.mark.usefixtures("small")
def test_file_of_a_run_that_is_killed_is_whole_and_says_that_the_run_is_not(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measure(*_: Any) -> Row:
        seen.append(read(out, KernelReport).partial)  # what a kill here would leave
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", measure)
    main([*ASKED, str(out)])
    assert seen == ["still running, or killed"]


@pytest.mark.usefixtures("small")
def test_run_that_is_out_of_time_says_before_what(out: Path) -> None:
    assert main([*ASKED, str(out), "--limit", "1e-9"]) == 1
    report = read(out, KernelReport)
    assert report.partial == "out of time (1e-09 s) before adaln, a case" and report.rows == []


def test_gpu_suite_without_a_gpu_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--suite", "gpu"]) == 2
    assert "suite must be cpu where torch finds no CUDA device, got 'gpu'" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["bench", "nothing"], ["bench"], ["bench", "kernels", "--op", "conv"]])
def test_unknown_benchmark_or_operation_is_the_users_mistake(asked: list[str]) -> None:
    assert main(asked) == 2


# --- checks -----------------------------------------------------------------------------------------------------------


def claim(run: Callable[[], Any]) -> Claim:
    return Claim("adaln", "a case", run, lambda: torch.ones(4, dtype=torch.float64), tolerance=1e-3)


def racing() -> Callable[[], torch.Tensor]:
    calls = iter(range(100))
    return lambda: torch.ones(4) + 1e-6 * (next(calls) == 3)


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (lambda: torch.ones(4), "ok", None),
        (lambda: torch.ones(4) * 1.01, "wrong", None),
        (lambda: torch.ones(4).new_empty(4), "wrong", "not finite, or never written"),
        (racing(), "wrong", "not what the first run gave"),
        (lambda: torch.ones(5), "failed", "AssertionError: (torch.Size([5]), torch.Size([4]))"),
        (raises(RuntimeError("no driver")), "failed", "RuntimeError: no driver"),
    ],
    ids=["right", "off", "unwritten", "race", "shape", "raised"],
)
def test_check_tells_right_from_wrong(run: Callable[[], Any], status: str, reason: str | None) -> None:
    line = judge(claim(run), repeats=6)
    assert (line.status, line.reason) == (status, reason)


def test_poison_does_not_outlast_the_check() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    judge(claim(lambda: torch.ones(4)), repeats=1)
    assert torch.are_deterministic_algorithms_enabled() is before


def test_every_operation_is_claimed_and_shapes_follow_the_seed() -> None:
    ops = {claim.op for claim in checks.claims(CPU, 0)}
    assert ops >= {*suite.OPS} - {"attention_ragged", "block"}  # a block is compared with diffusers'
    first, again, other = ([c.case for c in checks.claims(CPU, seed)] for seed in (0, 0, 1))
    assert first == again != other


# --- a process apart --------------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
ops = [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--op"]
for op in ops:
    print(json.dumps({"begin": op}), flush=True)
    print(json.dumps({"op": op, "case": "first", "status": "ok"}), flush=True)
    if op == "dies":
        os._exit(70)
    if op == "hangs":
        time.sleep(1000)
"""


def told(lines: Iterator[Any]) -> list[tuple[str, str]]:
    found = [json.loads(line) if isinstance(line, str) else asdict(line) for line in lines]
    return [(line["op"], line.get("reason") or line["status"]) for line in found if "op" in line]


def test_operation_that_dies_or_hangs_costs_itself_alone() -> None:
    lines = run_apart([sys.executable, "-c", CHILD], ["a", "dies", "b", "hangs", "c"], limit_s=600, stall_s=2.0)
    assert told(lines) == [
        ("a", "ok"),
        ("dies", "ok"),
        ("dies", "its process ended with status 70"),
        ("b", "ok"),
        ("hangs", "ok"),
        ("hangs", "its process hung"),
        ("c", "ok"),
    ]


def test_process_apart_that_is_out_of_time_ends_the_run() -> None:
    code = f"print({to_json(Begin(begin='out of time before b', ended=True))!r})"
    with pytest.raises(TimeoutError, match="out of time before b"):
        list(run_apart([sys.executable, "-c", code], ["a", "b"], limit_s=60))


def test_gpu_suite_is_this_command_in_a_process_apart_and_what_libraries_print_is_no_result(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device alone is not real: the process apart is given the CPU's suite."""
    monkeypatch.setattr(command, "suite_of", lambda name, quick: CPU)

    def on_the_cpu(asked: list[str], ops: list[str], limit_s: float) -> Iterator[Any]:
        yield "Autotuning, please wait\n"
        yield from run_apart(["cpu" if word == "gpu" else word for word in asked], ops, limit_s)

    monkeypatch.setattr(command, "run_apart", on_the_cpu)
    asked = ["bench", "kernels", "--suite", "gpu", "--quick", "--op", "unpatchify", "--seed", "5", "--out", str(out)]
    assert main(asked) == 0
    report = read(out, KernelReport)
    assert (report.suite, report.seed, report.partial, len(report.rows)) == ("gpu", 5, None, 2)
    assert len(report.checks) == 4 and report.limits
    assert capsys.readouterr().err.startswith("Autotuning, please wait")


@pytest.mark.usefixtures("small")
def test_lines_for_the_process_that_waits_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "kernels", "--suite", "cpu", "--quick", "--op", "adaln", "--lines"]
    assert main(asked) == 0
    lines = [from_json(apart.LINE, line) for line in capsys.readouterr().out.splitlines()]
    assert [type(line) for line in lines] == [apart.Limits, Begin, Check, Row]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"kernels.json must be JSON"),
        ("[]", r"must have schema 'skylapse.benchmark/1', got None"),
        ('{"schema": "skylapse.benchmark/0"}', r"must have schema .*, got 'skylapse.benchmark/0'"),
        ('{"schema": "skylapse.benchmark/1"}', r"is no result of KernelReport: suite: Field required"),
    ],
)
def test_unreadable_result_is_named(text: str, message: str, out: Path) -> None:
    out.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(out, KernelReport)


def result() -> KernelReport:
    return KernelReport(
        **dict(schema=SCHEMA, suite="cpu", quick=True, machine={}, elapsed_s=1.0, partial=None),
        **dict(seed=0, limits={}, checks=[], rows=[]),
    )


def test_result_that_cannot_be_written_leaves_the_one_before(out: Path) -> None:
    write(result(), out)
    before = out.read_text()
    with pytest.raises(ValueError, match="must be of JSON, got an object of object"):
        write(replace(result(), machine={"load": object()}), out)
    assert out.read_text() == before and [path.name for path in out.parent.iterdir()] == ["kernels.json"]


def test_committed_result_of_the_cpu_is_of_this_schema(root: Path) -> None:
    report = read(root / "benchmarks" / "results" / "cpu" / "kernels.json", KernelReport)
    assert report.is_publishable and {row.op for row in report.rows} == set(suite.OPS)
    assert {check.status for check in report.checks} == {"ok"}
