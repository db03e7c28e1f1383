"""`bench gate`: its decision on a machine that is made up, its command, and trees of packages that are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_up
import pytest
from made_up import git

from skylapse.benchmarks.track import gate
from skylapse.benchmarks.track.rule import Block, decide
from skylapse.benchmarks.track.trees import Broken, Tree, merge_base, processes, trees
from skylapse.cli import main


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return made_up.repository(tmp_path / "checkout")


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
    def from_pretrained(cls, name, device):
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
