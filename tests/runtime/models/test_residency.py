"""Parts of a model that move: who leaves for whom, within which bytes, and what a reader sees meanwhile."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from movers import CountingMover
from torch import nn

from skylapse.runtime.models.residency import Residency

BYTES = 400  # of a part of size 1


def linear(size: int) -> nn.Linear:
    """A module of size x BYTES bytes."""
    return nn.Linear(BYTES // 4, size, bias=False).requires_grad_(False)


def residency(budget: int, sizes: str = "1111") -> tuple[Residency, CountingMover]:
    """Parts "a", "b", ... of these sizes, and room for so many units."""
    mover = CountingMover()
    found = Residency("auto", mover, budget * BYTES)
    for name, size in zip("abcdefgh", sizes, strict=False):
        found.add(name, linear(int(size)))
    return found, mover


def there(found: Residency) -> str:
    return "".join(found.report.on_device)


def test_the_least_recently_used_part_leaves_first() -> None:
    found, mover = residency(2)
    steps = [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc"), ("b", "bc")]
    for name, expected in steps:
        found.require(name)
        assert there(found) == expected
    assert (mover.num_copies, mover.num_settled) == (4, 2)
    assert (found.report.num_moves, found.report.moved_bytes) == (4, 4 * BYTES)


def test_a_part_leaves_alone_where_that_is_enough_and_several_do_where_it_is_not() -> None:
    found, _ = residency(4, "1113")
    for name in "abc":
        found.require(name)
    found.require("d")
    assert there(found) == "cd"


def test_what_is_required_together_is_there_together_even_beyond_the_budget() -> None:
    found, _ = residency(1)
    found.require("a", "b")
    assert there(found) == "ab"
    found.require("b", "c")
    assert there(found) == "bc"


def test_a_name_of_a_part_that_stays_costs_nothing() -> None:
    found, mover = residency(2)
    found.require("decoder")
    assert found.is_on_device("decoder") and found.prefetch("decoder") and mover.num_copies == 0


def test_parts_leave_when_what_is_reserved_grows_though_nothing_is_brought() -> None:
    """A prompt was encoded while little was reserved; the step after it must not find the text encoder beside it."""
    found, _ = residency(3)
    found.require("a")
    found.require("b")
    found.reserve(2 * BYTES)
    found.require("a")
    assert there(found) == "a"
    found.reserve(3 * BYTES)
    found.require("decoder")
    assert there(found) == ""


def test_a_prefetch_takes_free_room_alone() -> None:
    found, mover = residency(3)
    found.require("a")
    found.reserve(BYTES)
    assert found.prefetch("b") and there(found) == "ab"
    assert not found.prefetch("c") and there(found) == "ab"
    found.reserve(0)
    assert found.prefetch("c") and there(found) == "abc"
    assert found.prefetch("c") and mover.num_copies == 3


def test_a_prefetched_part_does_not_leave_before_an_older_one() -> None:
    found, _ = residency(2)
    found.require("a")
    found.prefetch("b")
    found.require("c")
    assert there(found) == "bc"


def test_weights_are_what_they_were_wherever_they_have_been() -> None:
    module = nn.Sequential(linear(1), nn.BatchNorm1d(1)).eval().requires_grad_(False)
    module.get_buffer("1.running_mean").fill_(0.25)
    x = torch.ones(2, BYTES // 4)
    expected = module(x)
    found = Residency("auto", CountingMover(), 1000 * BYTES)
    found.add("a", module)
    found.add("b", linear(1))
    assert module(x).isnan().all()
    for _ in range(2):
        found.require("a")
        assert torch.equal(module(x), expected)
        found.budget_bytes = BYTES
        found.require("b")
        assert module(x).isnan().all() and there(found) == "b"


def test_a_shared_parameter_is_moved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Embedding(4, 25).requires_grad_(False)
            self.embed_tokens = self.shared
            self.head = linear(1)
            self.other = linear(1)
            self.other.weight = self.head.weight

    module = Tied()
    found = Residency("auto", CountingMover(), 10 * BYTES)
    found.add("a", module)
    found.require("a")
    assert found.on_device_bytes == module.shared.weight.nbytes + module.head.weight.nbytes == 2 * BYTES
    assert module.head.weight.data_ptr() == module.other.weight.data_ptr()
    assert module.embed_tokens.weight is module.shared.weight and not module.shared.weight.isnan().any()


def test_who_looks_on_sees_weights_that_have_arrived_and_that_stay() -> None:
    found, _ = residency(1)
    module = linear(1)
    found.add("x", module)
    found.prefetch("x")
    assert module.weight.isnan().all()  # on its way
    moved = threading.Event()

    def step() -> None:
        found.require("a")
        moved.set()

    with found.still():
        assert not module.weight.isnan().any()
        thread = threading.Thread(target=step)
        thread.start()
        assert not moved.wait(0.05) and found.is_on_device("x")
    thread.join()
    assert moved.is_set() and there(found) == "a"


@pytest.mark.parametrize("seed", range(8))
def test_no_more_than_the_budget_is_there_at_any_moment(seed: int) -> None:
    draw = random.Random(seed)
    sizes = "".join(str(draw.randint(1, 4)) for _ in range(6))
    found, mover = residency(9, sizes)
    for _ in range(200):
        reserved = draw.randint(0, 5)
        found.reserve(reserved * BYTES)
        mover.most_bytes = 0
        name = draw.choice("abcdef")
        if draw.random() < 0.3:
            before = there(found)
            found.prefetch(name)
            assert set(before) <= set(there(found))
        else:
            found.require(name)
            assert found.is_on_device(name) and mover.live_bytes + reserved * BYTES <= 9 * BYTES
        assert mover.most_bytes + (reserved * BYTES if mover.most_bytes else 0) <= 9 * BYTES
        assert mover.live_bytes == found.on_device_bytes


def test_the_report_counts_moves_and_bytes() -> None:
    found, _ = residency(4, "123")
    for name in "abcab":
        found.require(name)
    assert found.report.facts == {
        "offload": "auto",
        "moved": ["a", "b", "c"],
        "on_device": ["a", "b"],
        "num_moves": 5,
        "moved_bytes": sum([1, 2, 3, 1, 2]) * BYTES,
    }
