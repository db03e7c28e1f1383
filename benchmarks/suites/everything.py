"""`bench all`: every suite that needs no server, one after another, each in a process of its own, into one folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ...runtime.commands.options import Parser
from ..command import BENCHMARKS
from ..ending import ended_by_signals
from ..sheet import RESULTS, note

QUICK_S = 540.0  # of all together, on two cores
GRACE_S = (10.0, 60.0)  # beyond its share, as long again within these: in which a suite ends the case that it is in
ENDING_S = 20.0  # in which an interrupted one writes down what it has
# How much of the time each may take: its own measure of work. What one leaves over is there for those after it.
SHARES = {
    "kernels": 55.0,
    "denoise": 50.0,
    "decode": 95.0,  # 41 s of CPU are ONNX Runtime's build
    "engine": 80.0,
    "quality": 100.0,
    "startup": 50.0,
    "memory": 30.0,
    "peers": 80.0,
    "kernels-gpu": 400.0,
}


@dataclass(frozen=True)
class Job:
    """A suite to run: `bench name arguments`, into out."""

    label: str
    name: str
    arguments: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class Ended:
    """status: the suite's exit code; told: what its file says, or why there is none."""

    job: Job
    status: int | None
    seconds: float
    told: str


Run = Callable[[Sequence[str], float], int]


def everything(arguments: Sequence[str]) -> int:
    """0 where every suite ended whole, 130 after Ctrl-C, 1 otherwise."""
    options = _parser().parse_args(arguments)
    if options.limit is not None and options.limit <= 0:
        raise ValueError(f"--limit must be above 0 s, got {options.limit:g}")
    if options.results.exists() and not options.results.is_dir():
        raise ValueError(f"--results must be a folder, got the file {str(options.results)!r}")
    unknown = sorted(set(options.only or ()) - SHARES.keys())
    if unknown:
        raise ValueError(f"--only must be {', '.join(SHARES)}, got {', '.join(unknown)}")
    options.results.mkdir(parents=True, exist_ok=True)
    limit_s = options.limit or (QUICK_S if options.quick else None)
    ended, interrupted = run_all(jobs(options), limit_s, run_suite)
    print(f"\n{table(ended)}")
    if interrupted:
        return 130
    return int(any(one.status != 0 for one in ended))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="skylapse bench all", description="Every suite that needs no server.", allow_abbrev=False)
    option = parser.add_argument
    option("--quick", action="store_true", help=f"fewer cases, wider intervals, {QUICK_S:g} s together")
    option("--results", type=Path, default=RESULTS, metavar="DIR", help=f"a file a suite; default: {RESULTS}")
    option("--limit", type=float, metavar="S", help="seconds of all together, shared among them")
    option("--only", action="append", metavar="SUITE", help=f"some of {', '.join(SHARES)}; may be given again")
    option("--model", default="demo", help="demo, a diffusers folder or a hub id; default: demo")
    option("--seed", type=int, default=0, metavar="N")
    option("--threads", type=int, metavar="N", help="of torch on the CPU")
    return parser


def jobs(options: argparse.Namespace) -> list[Job]:
    """In the order in which they run; `kernels-gpu` where there is a GPU."""
    found = []
    for label in SHARES:
        if (options.only and label not in options.only) or (label == "kernels-gpu" and not torch.cuda.is_available()):
            continue
        name = label.partition("-")[0]
        out = options.results / f"{label}.json"
        words = ["--out", str(out), "--seed", str(options.seed)]
        words += ["--quick"] if options.quick else []
        words += ["--threads", str(options.threads)] if options.threads else []
        if name == "kernels":
            words += ["--suite", "gpu" if label == "kernels-gpu" else "cpu"]
        elif name not in ("decode",):  # which knows one model
            words += ["--model", options.model]
        found.append(Job(label, name, tuple(words), out))
    return found


def run_all(
    wanted: Sequence[Job], limit_s: float | None, run: Run, now: Callable[[], float] = time.monotonic
) -> tuple[list[Ended], bool]:
    """(what each came to, whether Ctrl-C ended it). Each gets its share of the time that is left."""
    ended: list[Ended] = []
    began = now()
    for index, job in enumerate(wanted):
        if not _is_there(job.name):
            ended.append(Ended(job, None, 0.0, "not in this tree"))
            continue
        share_s: float | None = None
        if limit_s is not None:
            left_s = limit_s - (now() - began)
            if left_s <= 0:
                ended.append(Ended(job, None, 0.0, "no time was left"))
                continue
            share_s = left_s * SHARES[job.label] / sum(SHARES[other.label] for other in wanted[index:])
        words = ["--limit", f"{share_s:.0f}"] if share_s is not None else []
        note(f"--- {job.label}" + (f", {share_s:.0f} s" if share_s is not None else ""))
        job.out.unlink(missing_ok=True)  # or an earlier run's would be taken for this one's
        start = now()
        try:
            status = run([job.name, *job.arguments, *words], _timeout_of(share_s))
        except KeyboardInterrupt:
            ended.append(Ended(job, 130, now() - start, told_by(job.out)))
            return ended, True
        ended.append(Ended(job, status, now() - start, told_by(job.out)))
    return ended, False


def _timeout_of(share_s: float | None) -> float:
    return float("inf") if share_s is None else share_s + min(max(share_s, GRACE_S[0]), GRACE_S[1])


def run_suite(words: Sequence[str], timeout_s: float) -> int:
    """Exit code of `bench words` in a process of its own, which is interrupted when its time has passed."""
    package = __package__.removesuffix(".suites")
    process = subprocess.Popen([sys.executable, "-m", package, *words], stdin=subprocess.DEVNULL)
    with ended_by_signals():
        try:
            return process.wait(timeout=None if timeout_s == float("inf") else timeout_s)
        except subprocess.TimeoutExpired:
            return _end(process)
        except KeyboardInterrupt:
            with suppress(subprocess.TimeoutExpired):  # a terminal interrupts both
                process.wait(timeout=1.0)
            _end(process)
            raise


def _end(process: subprocess.Popen[bytes]) -> int:
    """Let it write down what it has; kill it if it does not end."""
    process.terminate()
    try:
        return process.wait(timeout=ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _is_there(name: str) -> bool:
    """Whether the command's file is, and all that stands above it."""
    module = f"{__package__.removesuffix('.suites')}.{BENCHMARKS[name][0]}"
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def told_by(path: Path) -> str:
    """What a result file says of its run, in a few words."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return "no result"
    except json.JSONDecodeError:
        return "a result that is no JSON"
    words = [
        f"{len(content[key])} {key}" for key in ("checks", "rows", "measurements", "comparisons") if key in content
    ]
    failures = content.get("failures") or {}
    words += [f"{len(failures)} failed ({', '.join(list(failures)[:2])})"] if failures else []
    words += [f"{len(content['missing'])} missing"] if content.get("missing") else []
    words += [f"partial: {content['partial']}"] if content.get("partial") else []
    return ", ".join(words)


def table(ended: Sequence[Ended]) -> str:
    lines = [f"{'suite':<14}{'exit':>6}{'seconds':>9}  "]
    for one in ended:
        status = "-" if one.status is None else str(one.status)
        lines.append(f"{one.job.label:<14}{status:>6}{one.seconds:>9.0f}  {one.told}")
    lines.append(f"{'together':<14}{'':>6}{sum(one.seconds for one in ended):>9.0f}")
    return "\n".join(lines)
