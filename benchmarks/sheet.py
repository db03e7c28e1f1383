"""What a run of a suite writes down: each figure as it comes, in the terminal and in one file that is always whole.

A run that is interrupted, killed or out of time leaves what it had, marked as partial with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..runtime.commands.options import Parser
from .ending import ended_by_signals
from .gpu import watch
from .harness import Turns, spread_of
from .harness import ratios as paired
from .machine import describe
from .progress import Bar
from .record import SCHEMA, Better, Comparison, Curve, Label, Measurement, Spread, SuiteReport, write

RESULTS = Path("bench-results")  # where runs are put that are told nothing else
Labels = dict[str, Label]


class OutOfTime(Exception):
    """The run's own limit; its words say before what."""


def suite_parser(name: str, what: str, **defaults: Any) -> Parser:
    """With the options that every suite has; `defaults` overrides theirs."""
    parser = Parser(prog=f"skylapse bench {name}", description=what, allow_abbrev=False)
    option = parser.add_argument
    option("--model", default="demo", help="demo, a diffusers folder or a hub id; default: demo")
    option("--quick", action="store_true", help="fewer cases, wider intervals")
    option("--out", type=Path, metavar="FILE", help=f"the result, JSON; default: {RESULTS / name}.json")
    option("--seed", type=int, default=0, metavar="N", help="of prompts, noise and arrivals; default: 0")
    option("--limit", type=float, metavar="S", help="seconds, behind which nothing new begins")
    option("--threads", type=int, metavar="N", help="of torch on the CPU")
    parser.set_defaults(**defaults)
    return parser


class Sheet:
    """One run's figures. Names are unique: `compare` and `gate` match two runs by them."""

    def __init__(self, benchmark: str, options: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.benchmark, self.options, self.settings = benchmark, options, dict(settings or {})
        self.out: Path = options.out or RESULTS / f"{benchmark}.json"
        self.measurements: list[Measurement] = []
        self.comparisons: list[Comparison] = []
        self.curves: list[Curve] = []
        self.failures: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self.partial: str | None = "still running, or killed"
        self._bar = Bar(benchmark, None)
        self._machine, self._began = describe(), time.monotonic()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts, self.reading = watch(device)
        self._machine |= facts

    # --- figures ------------------------------------------------------------------------------------------------------

    def measured(
        self,
        name: str,
        unit: str,
        samples: Sequence[float],
        better: Better = "lower",
        labels: Labels | None = None,
        shown: bool = True,
    ) -> Measurement:
        """Samples in the order in which they were taken. shown: whether the terminal has a line of it too."""
        values = [float(value) for value in samples]
        found = Measurement(
            name=name, unit=unit, better=better, spread=spread_of(values), samples=values, labels=labels or {}
        )
        assert name not in {one.name for one in self.measurements}, name
        self.measurements.append(found)
        if not shown:
            self._save()
            return found
        self._say(f"{name:<56}{_figure(found.spread, unit)}")
        return found

    def compared(
        self,
        name: str,
        of: str,
        to: str,
        ratios: Sequence[float],
        labels: Labels | None = None,
        shown: bool = True,
    ) -> Comparison:
        """`of` over `to`, round by round."""
        values = [float(value) for value in ratios]
        found = Comparison(name=name, of=of, to=to, spread=spread_of(values), samples=values, labels=labels or {})
        assert name not in {one.name for one in self.comparisons}, name
        self.comparisons.append(found)
        if not shown:
            self._save()
            return found
        self._say(f"{name:<56}{_figure(found.spread, 'x')}  {of} / {to}")
        return found

    def turns(self, group: str, turns: Turns, ours: str, labels: Labels | None = None) -> None:
        """Seconds of everyone who took turns, and their ratios to `ours`; of CPU time too, under `.../cpu`."""
        for name, samples in turns.samples.items():
            self.measured(f"{group}/{name}", "s", samples, labels=labels)
            if name in turns.cpu_s:
                self.measured(f"{group}/{name}/cpu", "cpu_s", turns.cpu_s[name], labels=labels, shown=False)
        for name in turns.samples:
            if name != ours and ours in turns.samples:
                of_both = paired(turns.samples[name], turns.samples[ours])
                self.compared(f"{group}/{name}", name, ours, of_both, labels)
                if name in turns.cpu_s:
                    of_cpu = paired(turns.cpu_s[name], turns.cpu_s[ours])
                    self.compared(f"{group}/{name}/cpu", name, ours, of_cpu, labels, shown=False)
        for name, reason in turns.failed.items():
            self.failed(f"{group}/{name}", reason)

    def drawn(self, curve: Curve) -> None:
        self.curves.append(curve)
        self._save()

    def failed(self, name: str, reason: str) -> None:
        """What could not be measured, and why; a run in which something failed does not exit with 0."""
        self.failures[name] = reason
        self._say(f"{name:<56}failed: {reason}")

    def missing(self, name: str, reason: str) -> None:
        """What cannot be had on this machine, and why; nothing has failed."""
        self.absent[name] = reason
        self._say(f"{name:<56}missing: {reason}")

    # --- the run ------------------------------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def check_time(self, before: str) -> None:
        """OutOfTime where the limit has passed; else the bar moves on to this."""
        self._bar.goes_on_to(before)
        if self.options.limit is not None and self.elapsed_s > self.options.limit:
            raise OutOfTime(f"out of time ({self.options.limit:g} s) before {before}")

    @contextmanager
    def running(self, cases: int | None = None) -> Iterator[None]:
        """Around the whole run: what ends it early is written down, and a signal ends it as Ctrl-C does.

        cases: how often `check_time` will be called, for the bar; None where that is not known.
        """
        try:
            self._save()
            with ended_by_signals(), Bar(self.benchmark, cases) as self._bar:
                yield
            self.partial = None
        except (KeyboardInterrupt, OutOfTime) as end:
            self.partial = str(end) or "interrupted"
        except BaseException as error:
            self.partial = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._machine["load_after"] = [round(value, 2) for value in os.getloadavg()]
            if readings := self.reading():  # a GPU's clocks, power and temperature
                self._machine["gpu_after"] = readings
            self._save()
            words = f"{len(self.measurements)} measurements, {len(self.comparisons)} comparisons"
            self._say(f"\n{words}{f'; partial: {self.partial}' if self.partial else ''}, in {self.out}")

    @property
    def status(self) -> int:
        """Of the process: 0 whole and nothing failed, 130 interrupted, 1 otherwise."""
        if self.partial == "interrupted":
            return 130
        return int(self.partial is not None or bool(self.failures))

    def report(self) -> SuiteReport:
        return SuiteReport(
            schema=SCHEMA,
            benchmark=self.benchmark,
            suite=self._machine["device"],
            quick=self.options.quick,
            machine=self._machine,
            elapsed_s=round(self.elapsed_s, 1),
            partial=self.partial,
            seed=self.options.seed,
            model=self.options.model,
            settings=self.settings,
            measurements=self.measurements,
            comparisons=self.comparisons,
            curves=self.curves,
            failures=self.failures,
            missing=self.absent,
        )

    def _save(self) -> None:
        write(self.report(), self.out)

    def _say(self, line: str) -> None:
        self._save()
        print(line, flush=True)


def note(line: str) -> None:
    """Progress, which is no result."""
    print(line, file=sys.stderr, flush=True)


def _figure(spread: Spread, unit: str) -> str:
    around = f"({spread.q1:.4g} to {spread.q3:.4g}, n {spread.n})" if spread.n > 1 else ""
    return f"{spread.median:>10.4g} {unit:<10}{around}"
