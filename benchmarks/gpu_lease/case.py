"""A case of a lease, and the context that all cases share: device, clock, measured limits, contestants left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ..gpu import Reading, watch
from ..harness import Budget, Clock, Missing, Run, Turns, take_turns
from ..kernels import case as kernels_case
from ..kernels.apart import Limits
from ..kernels.case import Make, Suite
from ..kernels.suite import clock_of, measure, measure_limits
from ..record import Row, Spread
from .lines import Line

Contest = tuple[str, str, str]  # operation, case, contestant
CASE_S = 240.0  # behind which a case hangs: compiling its kernels included


@dataclass(frozen=True)
class Case:
    """A case: its name, unique in its call, and the function that gives its lines; an exception fails this case alone.

    light: it holds so little memory that none need be given back behind it, which takes a third of a second.
    """

    name: str
    run: Callable[[], Iterable[Line]]
    limit_s: float = CASE_S
    light: bool = False


@dataclass
class Context:
    """The context of one worker process. dry: on a CPU with tiny shapes, to see that every line runs.

    at: tells the waiting process which contestant is about to run for the first time; avoid: (operation, case,
    contestant) of those that lost the device or hung.
    """

    suite: Suite
    dry: bool
    seed: int
    out: Path
    avoid: frozenset[Contest]
    at: Callable[[Contest], None]
    without: tuple[str, ...] = ()  # contestants that nobody waits for: compiling them is not what the lease is for
    _reading: list[Reading] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.suite.device

    @cached_property
    def clock(self) -> Clock:
        return clock_of(self.suite)

    @cached_property
    def limits(self) -> dict[str, Spread]:
        """Return the bytes copied and the operations of a product a second, as this device reaches them now."""
        return measure_limits(self.suite, self.clock)

    def limits_case(self) -> Case:
        return Case("limits", lambda: [Limits(limits=self.limits)])

    @property
    def budget(self) -> Budget:
        """Return the budget of a comparison: one round in a dry run."""
        return Budget(seconds=0.0, least=1, most=1) if self.dry else Budget(seconds=2.5, width=0.01)

    def reading(self) -> dict[str, float]:
        """Read the device's clocks, power and temperature."""
        if not self._reading:
            self._reading.append(watch(self.device)[1])
        return self._reading[0]()

    def compare(self, case: kernels_case.Case, without: Sequence[str] = ()) -> Row:
        """Run a case of `bench kernels`, without the contestants that are left out or to be avoided."""
        out = {*without, *self.without}

        def build() -> Mapping[str, Make]:
            made = case.build().items()
            return {name: self._watched((case.op, case.name, name), make) for name, make in made if name not in out}

        return measure(replace(case, build=build), self.suite, self.clock, self.budget, self.limits, self.reading)

    def turns(self, group: str, runs: Mapping[str, Run]) -> Turns:
        """Do as `take_turns`, in inference mode, with every contestant that is not to be avoided."""
        contests = {name: (group, "", name) for name in runs}
        watched = {name: self._told(contests[name], run) for name, run in runs.items() if self._may(contests[name])}
        with torch.inference_mode():
            turns = take_turns(watched, self.clock, self.budget)
        turns.failed |= dict.fromkeys(runs.keys() - watched.keys(), AVOIDED)
        return turns

    def _may(self, contest: Contest) -> bool:
        """Return whether a contestant did no harm in this case before, and in at most one case of the operation."""
        op, case, name = contest
        harmed = [other for other in self.avoid if (other[0], other[2]) == (op, name)]
        return len(harmed) < 2 and all(other[1] != case for other in harmed)

    def _watched(self, contest: Contest, make: Make) -> Make:
        def made() -> Run:
            if not self._may(contest):
                raise Missing(AVOIDED)
            self.at(contest)
            return self._told(contest, make())

        return made

    def _told(self, contest: Contest, run: Run) -> Run:
        calls = 0

        def told() -> object:
            nonlocal calls
            calls += 1
            if calls <= 2:  # the rounds that warm up, which are not timed
                self.at(contest)
            return run()

        return told


AVOIDED = "it lost the device or hung in an earlier case of this lease"
