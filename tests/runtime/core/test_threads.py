"""The choice of CPU threads: on machines that are made up, and on this one beside busy neighbours."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from skylapse.runtime.core.threads import CpuThreads, choose_threads, keep_bits, usable_cores

STEP_S = 0.03  # of 160 tokens with one thread on a quiet machine
Busy = Callable[[float], int]  # neighbours that keep a core busy each, at a time


class Machine:
    """A clock that steps move on, as long as they take with so many threads beside so many neighbours."""

    def __init__(self, cores: int, busy: Busy, noise: float = 0.1) -> None:
        self.cores, self.busy, self.noise = cores, busy, noise
        self.now_s = self.cpu_s = 0.0
        self.threads = cores
        self.random = random.Random(0)

    def use(self, threads: int) -> None:
        self.threads = threads

    def work(self, tokens: int) -> None:
        """A tenth of a step is serial. A thread too many waits for a core, and all the others for it."""
        n, busy = self.threads, self.busy(self.now_s)
        ideal_s = tokens / 160 * STEP_S * (0.1 + 0.9 / n)
        crowd = max(1.0, (n + busy) / self.cores)
        takes_s = ideal_s * (crowd if n == 1 else crowd**3) * self.random.lognormvariate(0, self.noise)
        self.now_s += takes_s
        self.cpu_s += takes_s / crowd


def seconds(machine: Machine, threads: CpuThreads, tokens: Iterator[int]) -> float:
    began_s = machine.now_s
    for count in tokens:
        with threads.step(count):
            machine.work(count)
    return machine.now_s - began_s


def chooser(machine: Machine, most: int | None = None, **options: bool) -> CpuThreads:
    clocks = dict(clock=lambda: machine.now_s, cpu_clock=lambda: machine.cpu_s, set_threads=machine.use)
    return CpuThreads(most or machine.cores, **clocks, **options)  # type: ignore[arg-type]


def best_fixed(cores: int, busy: Busy, tokens: Callable[[], Iterator[int]]) -> float:
    totals = []
    for n in (1, 2, 4, 8, 16):
        if n <= cores:
            machine = Machine(cores, busy)
            machine.use(n)
            for count in tokens():
                machine.work(count)
            totals.append(machine.now_s)
    return min(totals)


def quiet(at_s: float) -> int:
    return 0


def always_two(at_s: float) -> int:
    return 2


def now_and_then(at_s: float) -> int:
    """Ten busy seconds of every twenty."""
    return 2 if at_s % 20 < 10 else 0


def alike(count: int) -> Callable[[], Iterator[int]]:
    return lambda: iter([160] * count)


def mixed() -> Iterator[int]:
    draw = random.Random(1)
    return iter([160 * draw.choice((1, 1, 2, 2, 3, 9)) for _ in range(1500)])


CASES = {
    "quiet": (2, quiet, alike(1000), 1.05),
    "one request, quiet": (2, quiet, alike(30), 1.2),
    "busy": (2, always_two, alike(1000), 1.25),
    "one request, busy": (2, always_two, alike(30), 2.0),
    "busy now and then": (2, now_and_then, alike(4000), 1.35),
    "mixed, quiet": (2, quiet, mixed, 1.1),
    "mixed, busy": (2, always_two, mixed, 1.5),
    "mixed, busy now and then": (2, now_and_then, mixed, 1.5),
    "many cores, quiet": (16, quiet, alike(1000), 1.15),
    "many cores, busy": (16, lambda at_s: 16, alike(1000), 1.5),
}


@pytest.mark.parametrize("case", CASES)
def test_the_choice_is_near_the_best_fixed_number(case: str) -> None:
    cores, busy, tokens, most = CASES[case]
    machine = Machine(cores, busy)
    assert seconds(machine, chooser(machine), tokens()) <= most * best_fixed(cores, busy, tokens)


def test_neighbours_bring_the_number_down_and_their_end_up_again() -> None:
    machine = Machine(2, lambda at_s: 2 if 3 < at_s < 13 else 0, noise=0.02)
    threads, seen = chooser(machine), {}
    while machine.now_s < 25:
        seconds(machine, threads, iter([160]))
        seen[round(machine.now_s)] = threads.number
    assert (seen[2], seen[8], seen[24]) == (2, 1, 2)


def test_bits_that_depend_on_the_number_keep_it_while_requests_are_under_way() -> None:
    machine = Machine(2, always_two)
    threads, numbers = chooser(machine, changes_midway=False), []
    for _ in range(6):  # requests
        for step in range(10):
            with threads.step(160, is_first=step == 0):
                machine.work(160)
            numbers.append(threads.number)
    assert all(len({*numbers[10 * k : 10 * k + 10]}) == 1 for k in range(6))
    assert numbers[0] == 2 and numbers[-1] == 1


def test_a_step_that_fails_is_not_counted() -> None:
    machine = Machine(2, quiet)
    threads = chooser(machine)
    with pytest.raises(RuntimeError), threads.step(160):
        raise RuntimeError
    seconds(machine, threads, iter([160, 160]))
    assert threads.number == 2


def test_one_core_leaves_nothing_to_choose() -> None:
    machine = Machine(1, always_two)
    threads = chooser(machine)
    seconds(machine, threads, iter([160] * 100))
    assert threads.number == 1


def test_torch_has_the_number_back_afterwards() -> None:
    @contextmanager
    def two_threads() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    with two_threads():
        threads = CpuThreads(1)
        with threads.in_use():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2


def test_gpus_need_no_choice() -> None:
    assert choose_threads(torch.device("cuda"), torch.bfloat16, None) is None
    in_8_bits = choose_threads(torch.device("cpu"), torch.float32, "int8")
    assert in_8_bits is not None and not in_8_bits.changes_midway
    assert not keep_bits(torch.bfloat16)
    assert usable_cores() >= 1


BITS = """
import skylapse, torch
from skylapse.runtime.core.threads import keep_bits
if not keep_bits(torch.float32):
    print("skipped")
else:
    for rows, columns, width in ((1, 768, 64), (7, 192, 576), (160, 192, 768), (1280, 256, 1536), (33, 5120, 320)):
        inputs, weight, outputs = torch.randn(rows, columns), torch.randn(width, columns), []
        for number in (1, 2, 3, 4, 8):
            torch.set_num_threads(number)
            outputs.append(torch.nn.functional.linear(inputs, weight))
        assert all(torch.equal(outputs[0], output) for output in outputs), (rows, columns, width)
"""


def test_products_are_the_same_to_the_bit_with_any_number_of_threads() -> None:
    done = subprocess.run([sys.executable, "-c", BITS], capture_output=True, text=True, check=True)
    if "skipped" in done.stdout:
        pytest.skip("MKL has no strict mode on this processor")
