"""Requests beside busy neighbours: the chosen number of threads is near the best fixed one, on this very machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skylapse.benchmarks.suites.apart import run_apart
from skylapse.benchmarks.suites.neighbours import CONTESTANTS, busy, neighbours, seconds_of_requests

ENOUGH, TRIES = 2.0, 3  # times of the better fixed number; whoever else is here takes part, so more than once
CORES = 2


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("number", "fixed"), [(0, "all"), (CORES, "one")], ids=["quiet", "busy"])
def test_the_chosen_number_takes_at_most_twice_as_long_as_the_better_fixed_one(number: int, fixed: str) -> None:
    found = []
    for _ in range(TRIES):
        took_s = {}
        for name in (fixed, "chosen"):
            threads, chooses, _ = CONTESTANTS[name]
            asked = {"model": "demo", "threads": threads or CORES, "chooses": chooses, "seed": 0, "requests": 1}
            with busy(number):
                took_s[name] = run_apart(seconds_of_requests, asked, {"OMP_NUM_THREADS": str(CORES)})["seconds"]
        found.append(took_s["chosen"] / took_s[fixed])
        if found[-1] <= ENOUGH:
            return
    pytest.fail(f"{', '.join(f'{ratio:.2f}' for ratio in found)} times the better fixed number")


def test_a_run_has_every_contestant_beside_the_chosen_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def instead(function: object, arguments: dict[str, object], changed: object, timeout_s: float) -> dict[str, float]:
        asked.append(arguments)
        return {"seconds": 1.0 if arguments["chooses"] else 2.0, "cpu_s": 1.0}

    monkeypatch.setattr("skylapse.benchmarks.suites.neighbours.run_apart", instead)
    assert neighbours(["--quick", "--out", str(tmp_path / "found.json")]) == 0
    report = json.loads((tmp_path / "found.json").read_text())
    ratios = {one["name"]: one["spread"]["median"] for one in report["comparisons"] if not one["name"].endswith("/cpu")}
    assert len(asked) == 2 * len(CONTESTANTS)
    assert len(ratios) == 2 * (len(CONTESTANTS) - 1) and {*ratios.values()} == {2.0}
