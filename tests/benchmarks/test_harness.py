"""The harness of benchmarks: turns, ratios and their confidence, with a clock that is told what to say."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from skylapse.benchmarks import peak
from skylapse.benchmarks.harness import (
    Budget,
    Missing,
    Run,
    WallClock,
    confidence,
    ratios,
    reason_of,
    spread_of,
    take_turns,
)


class Fake:
    """Says how long each takes, on a machine that is up to 3 times slower for a while, and notes who ran."""

    def __init__(self, seed: int, noise: float = 0.02) -> None:
        self.rng, self.noise, self.drift, self.order = random.Random(seed), noise, 1.0, ""
        self.costs: dict[Run, tuple[str, float]] = {}

    def runs(self, **costs: float) -> dict[str, Run]:
        runs: dict[str, Run] = {name: partial(str, name) for name in costs}
        self.costs = {run: (name, costs[name]) for name, run in runs.items()}
        return runs

    def seconds(self, run: Run) -> float:
        name, cost = self.costs[run]
        self.order += name
        run()
        self.drift = min(3.0, max(1.0, self.drift * self.rng.uniform(0.97, 1.03)))
        return cost * self.drift * self.rng.uniform(1 - self.noise, 1 + self.noise)


def stopped() -> float:
    """A time that does not pass, so that rounds alone decide."""
    return 0.0


ROUNDS = Budget(seconds=1.0, least=6, most=60, width=0.0)


def verdict(seed: int, slowdown: float) -> str:
    clock = Fake(seed)
    ratio = take_turns(clock.runs(a=1.0, b=1.0 + slowdown), clock, ROUNDS, stopped).ratio("b", "a")
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    return "slower" if ratio.low > 1.03 else "faster" if ratio.high < 0.97 else "same"


def test_injected_slowdown_is_found_and_no_change_is_not() -> None:
    """10 % on a machine whose speed drifts by 3: in 20 of 20 runs; no change is flagged in none of 20."""
    assert [verdict(seed, 0.10) for seed in range(20)] == ["slower"] * 20
    assert [verdict(seed, 0.0) for seed in range(20)] == ["same"] * 20
    assert [verdict(seed, -0.10) for seed in range(20)] == ["faster"] * 20


def test_everyone_takes_turns_in_alternating_order() -> None:
    clock = Fake(0)
    turns = take_turns(clock.runs(a=1.0, b=1.0, c=2.0), clock, Budget(least=6, most=6), stopped)
    assert clock.order == "abc" * 2 + "abccba" * 3  # twice to warm up
    assert {name: len(samples) for name, samples in turns.samples.items()} == {"a": 6, "b": 6, "c": 6}


def test_rounds_end_when_the_interval_is_narrow_or_the_time_is_up() -> None:
    exact = Fake(0, noise=0.0)
    exact.rng = random.Random(0)
    runs = exact.runs(a=1.0, b=2.0)
    sure = take_turns(runs, exact, Budget(seconds=1e9, least=6, most=500, width=0.2), stopped)
    assert 6 <= len(sure.samples["a"]) < 20
    ticks = iter(range(10**6))
    late = take_turns(runs, exact, Budget(seconds=9, least=6, most=500, width=0.0), lambda: float(next(ticks)))
    assert len(late.samples["a"]) < 20


def broken_after(calls: int, error: Exception) -> Run:
    left = [calls]

    def run() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error

    return run


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_who_fails_is_out_with_the_reason_and_the_others_go_on(calls: int) -> None:
    clock, runs = (
        WallClock(1e-6),
        {"a": lambda: 0, "b": broken_after(calls, ValueError("no kernel for this")), "c": int},
    )
    turns = take_turns(runs, clock, Budget(least=6, most=8, width=0.0))
    assert turns.failed == {"b": "ValueError: no kernel for this"}
    assert {name: len(samples) for name, samples in turns.samples.items()} == {"a": 8, "c": 8}
    assert turns.ratio("c", "a") is not None and turns.ratio("b", "a") is None


def test_nobody_else_is_blamed_for_a_lost_device() -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    runs: dict[str, Run] = {"a": int, "b": broken_after(0, lost), "c": int}
    turns = take_turns(runs, WallClock(1e-6), Budget(least=6, most=6))
    assert turns.samples == {}
    assert turns.failed == {
        "a": "the device was lost to b",
        "b": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "c": "the device was lost to b",
    }


def test_interval_of_the_median_holds_it_in_95_of_100_cases() -> None:
    rng, held = random.Random(0), 0
    for _ in range(400):
        low, high = confidence(sorted(rng.expovariate(1.0) for _ in range(25))) or (0.0, 0.0)
        held += low <= 0.6931 <= high  # the median of that distribution
    assert held / 400 > 0.94


@pytest.mark.parametrize(("n", "expected"), [(5, None), (6, (1, 6)), (9, (2, 8)), (25, (8, 18))])
def test_interval_is_that_of_the_tables(n: int, expected: tuple[int, int] | None) -> None:
    assert confidence(range(1, n + 1)) == expected


def test_spread_names_quartiles() -> None:
    spread = spread_of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (spread.median, spread.q1, spread.q3, spread.low, spread.n) == (3.0, 2.0, 4.0, None, 5)


def test_short_call_is_repeated_until_it_can_be_timed() -> None:
    calls = [0]

    def run() -> None:
        calls[0] += 1

    clock = WallClock(least_s=1e-3)
    clock.seconds(run)
    assert calls == [1]
    clock.seconds(run)
    assert calls[0] > 100


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Missing("xformers is not installed"), "xformers is not installed"),
        (OSError("no /home/someone/.cache/triton/x.so here\nand more"), "OSError: no x.so here"),
        (RuntimeError(""), "RuntimeError: "),
    ],
)
def test_reason_is_one_line_without_folders(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


class Counting(Fake):
    """Says for CPU time how often it was asked, so that a sample shows when it was taken."""

    def __init__(self) -> None:
        super().__init__(0)
        self.cpu_s = 0.0

    def seconds(self, run: Run) -> float:
        self.cpu_s += 1
        return super().seconds(run)


def test_cpu_seconds_stand_in_the_order_of_the_rounds() -> None:
    clock = Counting()
    turns = take_turns(clock.runs(a=1.0, b=1.0), clock, Budget(least=3, most=3), stopped)
    assert clock.order == "abab" + "abbaab"
    assert turns.cpu_s == {"a": [5, 8, 9], "b": [6, 7, 10]}


def test_who_falls_out_takes_its_cpu_seconds_along() -> None:
    runs: dict[str, Run] = {"a": lambda: sum(range(1000)), "b": broken_after(4, ValueError("no more"))}
    turns = take_turns(runs, WallClock(1e-6), Budget(least=6, most=6))
    assert turns.cpu_s.keys() == {"a"} == turns.samples.keys()
    assert len(turns.cpu_s["a"]) == 6
    assert take_turns(Fake(0).runs(), Fake(0), Budget()).cpu_s == {}


def test_cpu_time_is_the_process_s_and_not_the_clock_s(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([0.0, 8.0]), iter([1.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(wall))
    monkeypatch.setattr("time.process_time", lambda: next(cpu))
    clock = WallClock()
    assert (clock.seconds(int), clock.cpu_s) == (8.0, 2.0)


def test_ratio_to_nothing_is_finite() -> None:
    assert ratios([2.0, 1.0], [1.0, 4.0]) == [2.0, 0.25]
    assert ratios([0.0], [0.0]) == [1.0]


CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux counts")
def test_peak_is_of_what_ran_and_not_of_what_ran_before() -> None:
    held = peak.held_bytes(CPU)
    high = peak.peak_while(lambda: b"x" * 2**27, CPU)
    low = peak.peak_while(lambda: b"x" * 2**10, CPU)
    assert held is not None
    assert high is not None
    assert low is not None
    assert high - held > 0.9 * 2**27
    assert high - low > 0.9 * 2**27


def test_peak_is_unknown_where_nobody_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    monkeypatch.setattr(peak, "PROCESS", tmp_path / "nowhere")
    assert peak.peak_while(lambda: ran.append(1), CPU) is None
    assert peak.held_bytes(CPU) is None
    (tmp_path / "clear_refs").mkdir()  # as where a container may not write it
    (tmp_path / "status").write_text("VmHWM:\t   12 kB\nVmRSS:\t   7 kB\n")
    monkeypatch.setattr(peak, "PROCESS", tmp_path)
    assert peak.peak_while(lambda: ran.append(2), CPU) is None
    assert (peak.held_bytes(CPU), ran) == (7 * 1024, [1, 2])
