"""`bench compare` and `history`: verdicts on samples that are made up, refusals, and lines over commits."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import pytest
from made_up import around, comparison, git, measurement, report

from skylapse.benchmarks.record import Report, read_history, write
from skylapse.benchmarks.track import history
from skylapse.benchmarks.track.statistics import Change, change, change_of_pairs, judge
from skylapse.cli import main

# --- statistics -------------------------------------------------------------------------------------------------------


def test_interval_holds_the_true_ratio_on_a_machine_that_drifts() -> None:
    """Speed drifts by 3, and the interval of pairs is right in 19 of 20 cases all the same."""
    rng, held = random.Random(0), 0
    for seed in range(60):
        speed = [1 + 2 * rng.random() for _ in range(15)]
        old = [s * rng.uniform(0.98, 1.02) for s in speed]
        new = [1.1 * s * rng.uniform(0.98, 1.02) for s in speed]
        found = change_of_pairs(old, new, seed)
        assert found.low is not None and found.high is not None and found.high - found.low < 0.06
        held += found.low <= 1.1 <= found.high
    assert held >= 55


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (1.06, 1.10, "lower", "worse"),
        (1.06, 1.10, "higher", "better"),
        (0.90, 0.94, "lower", "better"),
        (0.90, 0.94, "higher", "worse"),
        (1.06, 1.10, "neither", "changed"),
        (0.97, 1.04, "lower", "same"),
        (1.01, 1.08, "lower", "unclear"),
        (0.90, 1.20, "higher", "unclear"),
        (None, None, "lower", "unclear"),
    ],
)
def test_verdict_is_by_the_interval_and_the_threshold(low: Any, high: Any, better: Any, verdict: str) -> None:
    assert judge(Change(1.0, low, high, "pairs"), 0.05, better) == verdict


def test_runs_of_different_length_are_compared_by_their_medians() -> None:
    found = change(around(1.0, 30), around(1.2, 20))
    assert found is not None and found.how == "medians"
    assert found.low is not None and found.high is not None and found.low < 1.2 < found.high and found.low > 1.15


def test_figures_that_may_be_negative_are_compared_by_differences() -> None:
    found = change([-2.0, -2.1, -1.9, -2.0, -2.05, -2.0], [-3.0, -3.1, -2.9, -3.0, -3.05, -3.0])
    assert found is not None and found.how == "differences" and found.ratio == pytest.approx(0.5)
    assert judge(found, 0.05, "higher") == "worse"
    assert change([0.0] * 6, [1.0] * 6) is None


def test_few_samples_have_no_verdict_unless_they_are_equal() -> None:
    found = change([1.0], [2.0])
    assert found == Change(2.0, None, None, "pairs")
    assert change([7.0], [7.0]) == Change(1.0, 1.0, 1.0, "pairs")


def test_interval_is_the_same_each_time() -> None:
    assert change_of_pairs(around(1.0), around(1.1, seed=1)) == change_of_pairs(around(1.0), around(1.1, seed=1))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return made_up.repository(tmp_path / "checkout")


# --- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Report, Report], list[str]]:
    def written(old: Report, new: Report) -> list[str]:
        write(old, tmp_path / "old.json")
        write(new, tmp_path / "new.json")
        return ["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]

    return written


Files = Callable[[Report, Report], list[str]]


def suite(seconds: float = 1.0, rate: float = 10.0, seed: int = 0, **fields: Any) -> Report:
    found = [
        measurement("denoise/exact", around(seconds, seed=seed)),
        measurement("denoise/rate", around(rate, seed=seed), "req/s", "higher"),
    ]
    return report("denoise", found, [comparison("denoise/eager", around(2.0, seed=seed))], **fields)


def test_compare_says_what_is_slower_and_fails(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(suite(), suite(1.1, seed=1))) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("denoise/exact")]
    assert line.endswith("slower") and " 1.0" in line
    assert lines[-1] == "1 worse, 0 better, 2 same, 0 unclear of 3 figures"


def test_compare_knows_which_direction_is_better(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(suite(), suite(0.8, 12.0, seed=1))) == 0
    assert "0 worse, 2 better" in capsys.readouterr().out
    assert main(files(suite(), suite(1.0, 8.0, seed=1))) == 1


def test_threshold_decides_what_counts(files: Files) -> None:
    asked = files(suite(), suite(1.1, seed=1))
    assert main([*asked, "--threshold", "20%"]) == 0


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"machine": {"device": "NVIDIA H100"}}, "the same device, got device 'cpu' and 'NVIDIA H100'"),
        ({"machine": {"threads": 8}}, "the same threads, got threads 1 and 8"),
        ({"model": "Wan"}, "the same model, got model 'demo' and 'Wan'"),
        ({"quick": True}, "the same quick, got quick False and True"),
        ({"settings": {"steps": 20}}, "the same setting steps, got setting steps None and 20"),
    ],
)
def test_runs_that_are_no_pair_are_refused_unless_by_force(
    files: Files, other: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = files(suite(), suite(**other))
    assert main(asked) == 2
    assert said in capsys.readouterr().err
    assert main([*asked, "--force"]) == 0
    assert "note: different, and compared by force: " in capsys.readouterr().out


def test_other_benchmarks_schemas_and_units_are_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = files(suite(), report("decode", [measurement("denoise/exact", around(1.0))]))
    assert main([*asked, "--force"]) == 2
    assert "both files must be of one benchmark, got 'denoise' and 'decode'" in capsys.readouterr().err
    asked = files(suite(), report("denoise", [measurement("denoise/exact", around(1.0), "ms")]))
    assert main(asked) == 2
    assert "denoise/exact must have one unit in both files, got 's' and 'ms'" in capsys.readouterr().err
    for text, said in (
        ('{"benchmark": "traffic"}', "must have schema"),
        ("{", "must be JSON"),
        ("[" * 5000, "be JSON"),
    ):
        (tmp_path / "new.json").write_text(text)
        assert main(asked) == 2
        assert said in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "old.json"), str(tmp_path / "none.json")]) == 2


def test_partial_files_lost_figures_and_failures_are_told(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    new = report(
        "denoise",
        [measurement("denoise/exact", around(1.0)), measurement("denoise/new", [1.0])],
        partial="interrupted",
        failures={"denoise/rate": "ValueError: no"},
    )
    assert main(files(suite(), new)) == 1
    out = capsys.readouterr().out
    assert "note: the new run is partial: interrupted" in out
    assert "denoise/rate: failed in the new run: ValueError: no" in out
    assert "denoise/eager: exact / ours: in the old file alone" in out and "denoise/new: in the new file alone" in out


def test_files_of_kernels_are_compared_by_their_intervals(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(files(made_up.kernels(), made_up.kernels(1.2e-3))) == 1
    assert "attention, small/skylapse" in capsys.readouterr().out
    assert main(files(made_up.kernels(), made_up.kernels())) == 0


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_has_a_line_a_run(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "denoise.jsonl"
    for revision in ("HEAD^", "HEAD"):
        commit = git(repository, "rev-parse", "--short", revision)
        line = history.line_of(suite(machine={"commit": commit}), "denoise.json", root=repository)
        history.append(path, line)
        with pytest.raises(ValueError, match=f"twice, got one of {commit} again"):
            history.append(path, line)
    lines = read_history(path)
    assert [line.commit for line in lines] == [
        git(repository, "rev-parse", "--short", one) for one in ("HEAD^", "HEAD")
    ]
    assert lines[0].date.startswith("20") and lines[0].unpublishable is None
    assert lines[0].figures["denoise/exact"].median == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"machine": {"dirty": True}}, "a tree with changes that no commit has"),
        ({"machine": {"commit": ""}}, "no commit"),
        ({"machine": {"commit": "abc1234"}}, "commit abc1234, which this repository has not"),
        ({"partial": "interrupted"}, "a partial run (interrupted)"),
    ],
)
def test_history_takes_what_is_not_publishable_only_when_told_and_marks_it(
    fields: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(suite(**fields), tmp_path / "denoise.json")
    asked = ["bench", "history", str(tmp_path / "denoise.json"), "--results", str(tmp_path / "results")]
    assert main(asked) == 2
    assert f"got {said} (--anyway takes it, marked)" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert main([*asked, "--anyway"]) == 0
    (line,) = read_history(tmp_path / "results" / "cpu" / "denoise.jsonl")
    assert line.unpublishable == said


def test_broken_history_is_named_with_its_line_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "denoise.jsonl"
    path.write_text('{"schema": "skylapse.history/0"}\n')
    with pytest.raises(ValueError, match=r"denoise\.jsonl is no history: line 1: "):
        history.append(path, history.line_of(suite(machine={"dirty": True}), "x", anyway=True))
    assert path.read_text() == '{"schema": "skylapse.history/0"}\n'


def test_device_becomes_a_folder() -> None:
    assert history.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3" and history.slug("cpu") == "cpu"
