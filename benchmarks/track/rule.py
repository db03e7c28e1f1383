"""The gate's decision: rounds until each workload is clear, and a second look before anything fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from .statistics import LEAST, Change, Verdict, change_of_pairs, judge

Block = Callable[
    [str, bool], tuple[float, float]
]  # (workload, backwards) -> (old, new) CPU seconds of A B B A, or B A A B
Opened = Callable[[], AbstractContextManager[Block]]  # fresh processes of both trees, as long as it is open
BATCHES = 3  # of rounds, for what stays unclear


def is_slower(found: Change, threshold: float) -> bool:
    """Surely slower, and probably by the threshold: what has to be said twice can be said sooner than `judge` does."""
    return found.low is not None and found.low > 1 and found.ratio > 1 + threshold


@dataclass
class Samples:
    """One workload's CPU seconds, round by round."""

    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)

    def change(self) -> Change:
        return change_of_pairs(self.old, self.new)


@dataclass
class Finding:
    """What came of a workload: the second look's samples where the first one found it worse."""

    first: Samples
    second: Samples | None
    threshold: float

    @property
    def decisive(self) -> Samples:
        return self.second or self.first

    @property
    def verdict(self) -> Verdict:
        """Worse only where both looks find it slower; the second one's word otherwise."""
        if self.second is not None and is_slower(self.second.change(), self.threshold):
            return "worse"
        found = judge(self.decisive.change(), self.threshold, "lower")
        return "unclear" if found == "worse" else found


def decide(
    opened: Opened,
    able: Callable[[], Sequence[str]],
    rounds: int,
    threshold: float,
    limit_s: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Finding]:
    """able: the workloads, asked once the processes are there.

    limit_s: behind which no round begins but the fewest that an interval takes; a look has half of it.
    """
    if rounds < LEAST:
        raise ValueError(f"rounds must be at least {LEAST}, got {rounds}")
    until = None if limit_s is None else now() + limit_s / 2
    with opened() as block:
        names = able()
        first = look(block, names, rounds, threshold, until, now)
    suspects = [name for name in names if is_slower(first[name].change(), threshold)]
    second: dict[str, Samples] = {}
    if suspects:
        until = None if limit_s is None else now() + limit_s / 2
        with opened() as block:
            second = look(block, suspects, rounds, threshold, until, now)
    return {name: Finding(first[name], second.get(name), threshold) for name in names}


def look(
    block: Block,
    names: Sequence[str],
    rounds: int,
    threshold: float,
    until: float | None,
    now: Callable[[], float],
) -> dict[str, Samples]:
    """Rounds through all workloads, then again through those that are unclear."""
    found = {name: Samples() for name in names}
    unclear = list(names)
    for batch in range(BATCHES):
        for turn in range(rounds):
            if until is not None and now() > until and (batch > 0 or turn >= LEAST):
                return found
            for name in unclear:
                old, new = block(name, turn % 2 == 1)
                found[name].old.append(old)
                found[name].new.append(new)
        unclear = [name for name in unclear if judge(found[name].change(), threshold, "lower") == "unclear"]
    return found
