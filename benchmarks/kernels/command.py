"""`kernels --suite gpu|cpu`: the checks, then the comparisons, and one result file of both."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...runtime.commands.options import Parser
from ..ending import ended_by_signals
from ..gpu import watch
from ..harness import Budget, reason_of
from ..machine import describe
from ..record import SCHEMA, Check, KernelReport, Row, Spread, from_json, to_json, write
from .apart import LINE, Begin, Limits, Line, run_apart
from .suite import OPS, cases, check, clock_of, lost, measure, measure_limits, suite_of

CASE_S = {("gpu", True): 1.0, ("gpu", False): 4.0, ("cpu", True): 0.3, ("cpu", False): 2.0}  # of a comparison, or quick
LIMIT_S = {("gpu", True): 400.0, ("gpu", False): 3600.0, ("cpu", True): 55.0, ("cpu", False): 900.0}  # of all


def kernels(arguments: Sequence[str]) -> int:
    """0 where all is right and whole; 1 where a check or one of ours failed, or time was short; 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    ops = list(dict.fromkeys(options.op or OPS))
    options.seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    if options.lines:  # we are the process apart
        return _tell(options, ops)
    torch.set_num_threads(options.threads)
    found = Found(options.suite, options.quick, options.seed, options.out)
    with ended_by_signals():
        try:
            for line in _apart(options, ops) if options.suite == "gpu" else _work(options, ops):
                found.add(line)
            found.partial = None
        except KeyboardInterrupt:
            found.partial = "interrupted"
        except TimeoutError as error:
            found.partial = str(error)
        found.save()
    print(f"\n{found.summary()}" + (f", in {options.out}" if options.out else ""))
    return 130 if found.partial == "interrupted" else int(not found.is_good)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse bench kernels", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument("--suite", choices=("gpu", "cpu"), required=True)
    parser.add_argument("--op", action="append", choices=tuple(OPS), help="some of them; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, wider intervals")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result, JSON")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the checks' shapes; default: a new one")
    parser.add_argument("--limit", type=float, default=None, metavar="S", help="seconds, behind which no case begins")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch on the CPU; default: 1")
    parser.add_argument("--lines", action="store_true", help=argparse.SUPPRESS)
    return parser


# --- the work ---------------------------------------------------------------------------------------------------------


def _work(options: argparse.Namespace, ops: list[str]) -> Iterator[Line]:
    """An operation at a time: it is checked, then measured."""
    suite, began = suite_of(options.suite, options.quick), time.monotonic()
    limit_s = options.limit or LIMIT_S[options.suite, options.quick]
    budget = Budget(seconds=CASE_S[options.suite, options.quick], width=0.03 if options.quick else 0.01)
    _, reading = watch(suite.device)
    clock = clock_of(suite)
    limits = measure_limits(suite, clock)
    yield Limits(limits=limits)
    for op in ops:
        yield Begin(begin=op)
        yield from check(suite, [op], options.seed)
        try:
            found = list(cases(suite, [op]))
        except Exception as error:  # not even named: a file of the operation that does not import
            yield Check(op=op, case="its comparisons", status="failed", reason=reason_of(error))
            continue
        for case in found:
            if time.monotonic() - began > limit_s:
                raise TimeoutError(f"out of time ({limit_s:g} s) before {op}, {case.name}")
            yield measure(case, suite, clock, budget, limits, reading)


def _tell(options: argparse.Namespace, ops: list[str]) -> int:
    """As lines of JSON on stdout, for the process that waits for them; gives up when the device is lost."""
    try:
        for line in _work(options, ops):
            print(to_json(line), flush=True)
            if lost(line):
                return 70
    except TimeoutError as error:
        print(to_json(Begin(begin=str(error), ended=True)), flush=True)
    return 0


def _apart(options: argparse.Namespace, ops: list[str]) -> Iterator[Line]:
    suite_of(options.suite, options.quick)  # refused here where there is no GPU
    limit_s = options.limit or LIMIT_S[options.suite, options.quick]
    command = [sys.executable, "-m", "skylapse.benchmarks", "kernels", "--lines", "--suite", options.suite]
    command += ["--quick"] if options.quick else []
    command += ["--seed", str(options.seed)]
    for text in run_apart(command, ops, limit_s):
        try:
            yield from_json(LINE, text) if isinstance(text, str) else text
        except ValueError:  # what a library prints
            print(text, end="", file=sys.stderr)


# --- what came of it --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Everything so far; saved after each line, so that a run that is killed leaves what it had."""

    suite: str
    quick: bool
    seed: int
    out: Path | None
    limits: dict[str, Spread] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    partial: str | None = "still running, or killed"

    def __post_init__(self) -> None:
        self._machine, self._began = describe(), time.monotonic()
        if self.suite == "gpu":
            facts, reading = watch(suite_of(self.suite, self.quick).device)
            self._machine |= facts | {"gpu_before": reading()}

    def add(self, line: Line) -> None:
        if isinstance(line, Limits):
            self.limits = line.limits
        elif isinstance(line, Check):
            self.checks.append(line)
            if line.status != "ok":
                print(f"{line.op}: {line.case}: {line.status}: {line.reason or f'off by {line.worst:.2g}'}", flush=True)
        elif isinstance(line, Row):
            self.rows.append(line)
            print(table(line), flush=True)
        else:
            print(f"--- {line.begin}", flush=True)
        self.save()

    def save(self) -> None:
        if self.out is not None:
            write(self.report(), self.out)

    def report(self) -> KernelReport:
        return KernelReport(
            schema=SCHEMA,
            suite=self.suite,
            quick=self.quick,
            machine=self._machine,
            elapsed_s=round(time.monotonic() - self._began, 1),
            partial=self.partial,
            seed=self.seed,
            limits=self.limits,
            checks=self.checks,
            rows=self.rows,
        )

    @property
    def is_good(self) -> bool:
        ours = [row.contestants[row.ours].status for row in self.rows]
        return self.partial is None and {*ours, *(line.status for line in self.checks)} <= {"ok"}

    def summary(self) -> str:
        right = sum(line.status == "ok" for line in self.checks)
        words = f"{right} of {len(self.checks)} checks right, {len(self.rows)} comparisons"
        return words + (f"; partial: {self.partial}" if self.partial else "")


def table(row: Row) -> str:
    """A comparison for people: how long, how many times ours, and the share of the roofline."""
    lines = [f"{row.op}, {row.case}"]
    for name, it in row.contestants.items():
        if it.seconds is None:
            lines.append(f"  {name:<26}{it.status}: {it.reason}")
            continue
        ratio = "" if it.ratio is None else f"{it.ratio.median:8.3f}x ({it.ratio.q1:.3f} to {it.ratio.q3:.3f})"
        share = "" if it.roofline_share is None else f"{100 * it.roofline_share:5.0f} % of the roofline"
        lines.append(f"  {name:<26}{1e3 * it.seconds.median:10.4f} ms{share:>24}{ratio}")
    return "\n".join(lines)
