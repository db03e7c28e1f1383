"""A sheet: what it writes down of a run that ends, is interrupted, killed, out of time or breaks."""

from __future__ import annotations

import argparse
import io
import signal
from pathlib import Path

import pytest
from rich.console import Console

from skylapse.benchmarks.harness import Turns
from skylapse.benchmarks.progress import Bar
from skylapse.benchmarks.record import SuiteReport, read
from skylapse.benchmarks.sheet import Sheet, suite_parser


def options(out: Path, *words: str) -> argparse.Namespace:
    return suite_parser("denoise", "A test.").parse_args(["--out", str(out), *words])


@pytest.fixture
def sheet(tmp_path: Path) -> Sheet:
    return Sheet("denoise", options(tmp_path / "new" / "denoise.json"), {"steps": 3})


def written(sheet: Sheet) -> SuiteReport:
    return read(sheet.out, SuiteReport)


def test_whole_run_is_read_back_as_it_was(sheet: Sheet, capsys: pytest.CaptureFixture[str]) -> None:
    with sheet.running():
        sheet.measured("denoise/a", "s", [3, 1, 2], labels={"tokens": 8})
        assert written(sheet).partial == "still running, or killed"
    report = written(sheet)
    assert (sheet.status, report.partial, report.settings) == (0, None, {"steps": 3})
    assert len(report.machine["load_before"]) == len(report.machine["load_after"]) == 3
    assert (report.benchmark, report.model, report.seed, report.failures) == ("denoise", "demo", 0, {})
    [found] = report.measurements
    assert (found.samples, found.spread.median, found.labels) == ([3, 1, 2], 2, {"tokens": 8})
    assert "denoise/a" in capsys.readouterr().out


def test_turns_give_seconds_cpu_seconds_and_ratios_to_ours(sheet: Sheet) -> None:
    turns = Turns({"ours": [1.0, 2.0], "peer": [3.0, 4.0]}, {"other": "it broke"}, {"ours": [0.5, 0.5], "peer": [1, 2]})
    with sheet.running():
        sheet.turns("denoise/a", turns, "ours")
    report = written(sheet)
    assert {m.name: (m.unit, m.samples) for m in report.measurements} == {
        "denoise/a/ours": ("s", [1, 2]),
        "denoise/a/ours/cpu": ("cpu_s", [0.5, 0.5]),
        "denoise/a/peer": ("s", [3, 4]),
        "denoise/a/peer/cpu": ("cpu_s", [1, 2]),
    }
    assert {c.name: (c.of, c.to, c.samples) for c in report.comparisons} == {
        "denoise/a/peer": ("peer", "ours", [3, 2]),
        "denoise/a/peer/cpu": ("peer", "ours", [2, 4]),
    }
    assert report.failures == {"denoise/a/other": "it broke"}
    assert sheet.status == 1


def test_turns_on_a_gpu_have_no_cpu_seconds(sheet: Sheet) -> None:
    with sheet.running():
        sheet.turns("denoise/a", Turns({"ours": [1.0], "peer": [2.0]}), "ours")
    assert [m.name for m in written(sheet).measurements] == ["denoise/a/ours", "denoise/a/peer"]


def test_what_is_missing_does_not_fail_the_run(sheet: Sheet) -> None:
    with sheet.running():
        sheet.missing("denoise/a/compiled", "no compiler")
    assert (sheet.status, written(sheet).missing) == (0, {"denoise/a/compiled": "no compiler"})


def test_run_out_of_time_keeps_what_it_had(tmp_path: Path) -> None:
    sheet = Sheet("denoise", options(tmp_path / "a.json", "--limit", "1e-9"))
    with sheet.running():
        sheet.measured("denoise/a", "s", [1])
        sheet.check_time("denoise/b")
        sheet.measured("denoise/b", "s", [1])
    report = written(sheet)
    assert report.partial == "out of time (1e-09 s) before denoise/b"
    assert ([m.name for m in report.measurements], sheet.status) == (["denoise/a"], 1)
    assert not report.is_publishable


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm"])
def test_interrupted_run_keeps_what_it_had(sheet: Sheet, way: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sheet.running():
        sheet.measured("denoise/a", "s", [1])
        if way == "ctrl-c":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)
    assert (written(sheet).partial, sheet.status) == ("interrupted", 130)
    assert len(written(sheet).measurements) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_broken_run_says_how_and_raises(sheet: Sheet) -> None:
    with pytest.raises(RuntimeError, match="no more memory"), sheet.running():
        sheet.measured("denoise/a", "s", [1])
        raise RuntimeError("no more memory")
    assert (written(sheet).partial, sheet.status) == ("RuntimeError: no more memory", 1)


def test_one_name_is_measured_once(sheet: Sheet) -> None:
    sheet.measured("denoise/a", "s", [1])
    with pytest.raises(AssertionError, match="denoise/a"):
        sheet.measured("denoise/a", "s", [1])


def test_bar_names_the_case_on_a_terminal_alone() -> None:
    shown, hidden = io.StringIO(), io.StringIO()
    for file, terminal in ((shown, True), (hidden, False)):
        with Bar("denoise", 3, Console(file=file, force_terminal=terminal, width=100)) as bar:
            bar.goes_on_to("first")
            bar.goes_on_to("second")
    assert "denoise: second" in shown.getvalue()
    assert "1/3" in shown.getvalue()
    assert hidden.getvalue() == ""
