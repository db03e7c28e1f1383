"""`bench compare`, `gate` and `history`: verdicts on samples that are made up, and trees of packages that are."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_up
import pytest
from made_up import around, comparison, measurement, report

from skylapse.benchmarks.record import Report, read_history, write
from skylapse.benchmarks.track import gate, history
from skylapse.benchmarks.track.rule import Block, decide
from skylapse.benchmarks.track.statistics import Change, change, change_of_pairs, judge
from skylapse.benchmarks.track.trees import Broken, Tree, merge_base, processes, trees
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


# --- the gate's decision ----------------------------------------------------------------------------------------------


class Machine:
    """Slower for a while by up to 2, each pair of processes off by 1 %, single runs by 4 % and now and then by half."""

    def __init__(self, seed: int, slower: float = 0.0, biases: list[float] | None = None) -> None:
        self.rng, self.slower, self.drift = random.Random(seed), slower, 1.0
        self.biases, self.opened_times, self.blocks = biases or [], 0, 0

    @contextmanager
    def opened(self) -> Iterator[Block]:
        self.opened_times += 1
        bias = self.biases.pop(0) if self.biases else self.rng.gauss(0, 0.01)

        def run(cost: float) -> float:
            self.drift = min(2.0, max(1.0, self.drift * self.rng.uniform(0.97, 1.03)))
            spike = 1.5 if self.rng.random() < 0.03 else 1.0
            return cost * self.drift * spike * self.rng.gauss(1, 0.04)

        def block(name: str, backwards: bool) -> tuple[float, float]:
            self.blocks += 1
            costs = (1.0, (1 + self.slower) * (1 + bias))
            spent = [0.0, 0.0]
            for side in (1, 0, 0, 1) if backwards else (0, 1, 1, 0):
                spent[side] += run(costs[side])
            return spent[0], spent[1]

        yield block


def verdict(machine: Machine, **asked: Any) -> str:
    return decide(machine.opened, lambda: ["work"], **({"rounds": 8, "threshold": 0.05} | asked))["work"].verdict


def test_gate_catches_a_slowdown_of_a_tenth_and_flags_no_change_in_neither_of_20_runs() -> None:
    """On trial with the real thing: `python -m skylapse.benchmarks.track.prove`."""
    assert sum(verdict(Machine(seed, 0.10)) == "worse" for seed in range(20)) >= 19
    assert sum(verdict(Machine(seed)) == "worse" for seed in range(20)) <= 1


def test_what_fresh_processes_take_back_is_no_regression() -> None:
    lucky = Machine(0, biases=[0.12, 0.0])
    found = decide(lucky.opened, lambda: ["work"], rounds=12, threshold=0.05)["work"]
    assert found.second is not None and found.verdict in ("same", "unclear") and lucky.opened_times == 2
    assert verdict(Machine(0, biases=[0.12, 0.12]), rounds=12) == "worse"


def test_unclear_workloads_get_more_rounds_and_clear_ones_do_not() -> None:
    between, equal = Machine(1, biases=[0.05]), Machine(1, biases=[0.0])
    found = decide(between.opened, lambda: ["work"], rounds=8, threshold=0.05)["work"]
    assert found.verdict == "unclear" and between.blocks == 24
    assert verdict(equal, rounds=40) == "same" and equal.blocks == 40


def test_gate_ends_with_the_fewest_rounds_when_the_time_is_up() -> None:
    ticks = iter(range(1000))
    machine = Machine(0, biases=[0.0])
    decide(machine.opened, lambda: ["work"], 30, 0.05, limit_s=2.0, now=lambda: float(next(ticks)))
    assert machine.blocks == 6


# --- the command ------------------------------------------------------------------------------------------------------


class FakePair:
    """Runs of 1 CPU second, of the new side of `factor`."""

    def __init__(self, factor: float, missing: dict[str, str], broken: Broken | None) -> None:
        self.factor, self.missing, self.broken = factor, missing, broken

    def ready(self) -> dict[str, str]:
        if self.broken:
            raise self.broken
        return self.missing

    def run(self, side: int, name: str, slower: float) -> float:
        return self.factor if side else 1.0


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    @contextmanager
    def pair(baseline: str, root: Path = tmp_path) -> Iterator[tuple[Tree, Tree]]:
        yield Tree("base", tmp_path), Tree("this tree", tmp_path)

    def run(
        factor: float = 1.0, missing: dict[str, str] | None = None, broken: Broken | None = None, *more: str
    ) -> int:
        @contextmanager
        def started(*_: object) -> Iterator[FakePair]:
            yield FakePair(factor, missing or {}, broken)

        monkeypatch.setattr(gate, "trees", pair)
        monkeypatch.setattr(gate, "processes", started)
        return main(["bench", "gate", "--baseline", "base", "--out", str(tmp_path / "gate.json"), *more])

    return run


def test_gate_fails_where_the_tree_is_slower(gated: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert gated(1.2) == 1
    assert "slower (a second look" in capsys.readouterr().out
    assert gated(1.0) == 0 and gated(0.5) == 0
    assert "faster" in capsys.readouterr().out


def test_workload_that_the_base_has_not_is_left_out_and_ours_is_a_failure(
    gated: Callable[..., int], tmp_path: Path
) -> None:
    assert gated(1.0, {"text/encode": "base: AttributeError: no such thing"}) == 0
    told = json.loads((tmp_path / "gate.json").read_text())
    assert told["missing"] == {"gate/text/encode": "base: AttributeError: no such thing"}
    assert len(told["comparisons"]) == 5
    assert gated(1.0, {"text/encode": "this tree: AttributeError: no such thing"}) == 1


def test_gate_without_a_base_that_runs_is_none(
    gated: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gated(1.0, None, Broken("base", "the process of base ended: ImportError")) == 3
    assert "not gated: the process of base ended: ImportError" in capsys.readouterr().err
    assert gated(1.0, None, Broken("this tree", "the process of this tree ended")) == 2
    monkeypatch.setattr(gate, "merge_base", lambda: None)
    assert main(["bench", "gate"]) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "decoding"], "--suite must be one of denoise, "),
        (["--rounds", "3"], "--rounds must be at least 6, got 3"),
        (["--threshold", "0%"], "must be a share such as 5% or 0.05, got '0%'"),
        (["--threshold", "nan"], "must be a share such as 5% or 0.05, got 'nan'"),
        (["--baseline", "no-such-thing"], "baseline must be a commit or a folder with a tree of skylapse"),
    ],
)
def test_gate_refuses_what_it_cannot_do(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gate", "--out", str(tmp_path / "gate.json"), *words]) == 2
    assert said in capsys.readouterr().err


# --- trees and processes ----------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    settings = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b.c",
        "-c",
        "init.defaultBranch=main",
        "-c",
        "commit.gpgsign=false",
    )
    return subprocess.run(
        ["git", *settings, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init")
    for version in ("first", "second"):
        (folder / "__init__.py").write_text(f'VERSION = "{version}"\n')
        git(folder, "add", ".")
        git(folder, "commit", "-m", version)
    return folder


def test_commit_is_unpacked_beside_the_working_tree_and_cleaned_up(repository: Path) -> None:
    (repository / "__init__.py").write_text('VERSION = "uncommitted"\n')
    with trees("HEAD^", repository) as (base, ours):
        assert '"first"' in (base.path / "skylapse" / "__init__.py").read_text()
        assert '"uncommitted"' in (ours.path / "skylapse" / "__init__.py").read_text()
        kept = base.path
    assert not kept.exists() and git(repository, "worktree", "list").count("\n") == 0
    assert (repository / "__init__.py").exists()


def test_base_is_where_the_branch_left_main_and_on_main_the_commit_before(repository: Path) -> None:
    head, before = git(repository, "rev-parse", "HEAD"), git(repository, "rev-parse", "HEAD^")
    assert merge_base(repository) == before
    git(repository, "checkout", "-b", "topic")
    git(repository, "commit", "--allow-empty", "-m", "third")
    assert merge_base(repository) == head


def test_history_that_is_too_shallow_has_no_base(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--depth", "1", repository.as_uri(), "shallow")
    assert merge_base(tmp_path / "shallow") is None
    assert merge_base(tmp_path) is None


FAKE = """
class VideoRequest:
    def __init__(self, **fields):
        self.fields = fields

class Engine:
    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def generate_latents(self, request):
        return sum(range(400_000))
"""


def test_both_trees_run_in_turns_and_what_one_has_not_is_said(tmp_path: Path) -> None:
    """The real processes, on packages of a few lines: CPU time, a slowdown put in, a workload missing, a death."""
    decoding = "\n    def decode(self, latents):\n        yield latents\n"
    pair = []
    for name, source in (("base", FAKE), ("this tree", FAKE + decoding)):
        package = tmp_path / name / "skylapse"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        pair.append(Tree(name, package.parent))
    names = ["denoise/exact", "decode/eager"]
    with processes((pair[0], pair[1]), "demo", names) as running:
        ((name, reason),) = running.ready().items()
        assert name == "decode/eager" and reason.startswith("base: AttributeError: ")
        ratios = [running.run(1, "denoise/exact", 0.5) / running.run(0, "denoise/exact") for _ in range(5)]
        assert 1.2 < sorted(ratios)[2] < 1.9
        with pytest.raises(Broken, match="the process of base ended in decode/eager: KeyError") as died:
            running.run(0, "decode/eager")
        assert died.value.tree == "base" and running.run(1, "denoise/exact") > 0


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
