"""Run calls of a lease: a worker measures; this process keeps the journal, the time, and a list of what to avoid."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ...runtime.commands.options import Parser
from ...runtime.core.config import environment
from ..ending import ended_by_signals
from .calls import LIMIT_S, PACKAGE, call_named
from .journal import Journal, fingerprint
from .lines import Failed, encode
from .merge import write_merged

MARK = "skylapse lease: "
START_S = 120.0  # without a word from a worker that loads its libraries, or names its cases
SETTINGS = {"SKYLAPSE_DECODER": "eager", "SKYLAPSE_ENCODER": "eager"}  # nothing is built beside what is measured
WORKER = (sys.executable, "-m", f"{PACKAGE}.worker")


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run one call: `python -m skylapse.benchmarks.gpu_lease.NAME`."""
    call = call_named(name)
    try:
        return run([name], parser(f"python -m {PACKAGE}.{name}", f"{call.what}.").parse_args(arguments))
    except ValueError as mistake:  # the user's, as the command line has it
        print(f"skylapse: error: {mistake}", file=sys.stderr)
        return 2


def parser(program: str, what: str) -> Parser:
    found = Parser(prog=program, description=what, allow_abbrev=False)
    option = found.add_argument
    option("--out", type=Path, metavar="FOLDER", help="journals, and one result file of all there is")
    option("--resume", type=Path, metavar="FOLDER", help="journals of earlier calls; what they have is not run again")
    option("--again", action="store_true", help="run again what failed")
    option("--limit-s", type=float, default=LIMIT_S, metavar="S", help=f"for everything; default: {LIMIT_S}")
    option("--seed", type=int, default=0, metavar="N", help="of shapes and numbers; default: 0")
    option("--commit", metavar="NAME", help="of the code, where its copy has come without git")
    option("--dry-run", action="store_true", help="every line on a CPU, with tiny shapes; the figures mean nothing")
    return found


def run(names: Sequence[str], options: argparse.Namespace, worker: Sequence[str] = WORKER) -> int:
    """Return 0 where every case came to a good end; 1 where one failed or time was short; 130 after Ctrl-C."""
    if options.out is None:
        raise ValueError("--out must be given: the folder of the journals and of the result")
    code = fingerprint()
    earlier = {name: None if options.resume is None else options.resume / f"{name}.jsonl" for name in names}
    journals = {name: Journal(options.out / f"{name}.jsonl", code, earlier[name], options.again) for name in names}
    lease = Lease(journals, options, time.monotonic() + options.limit_s, list(worker))
    with ended_by_signals():
        try:
            lease.run()
        except KeyboardInterrupt:
            lease.cut = "interrupted"
        lease.close()
        places = [options.out] if options.resume is None else [options.resume, options.out]
        written = write_merged(places, options.out)
        print(f"{', '.join(map(str, written)) or 'no result'}: {lease.told()}", flush=True)
    return 130 if lease.cut == "interrupted" else int(lease.cut is not None or bool(lease.num_failed))


@dataclass
class Lease:
    """Runs workers, one after the other, until all cases are through or the time is up."""

    journals: dict[str, Journal]
    options: argparse.Namespace
    deadline: float  # by time.monotonic
    worker: list[str]
    cut: str | None = None
    device: str | None = None
    num_ok: int = 0
    num_failed: int = 0
    tried: list[list[str]] = field(default_factory=list)
    avoid: list[list[str]] = field(default_factory=list)  # operation, case and contestant
    # The case under way: its call and name, the time when it hangs, and the contestant about to run for the first time.
    at: tuple[str, str] | None = None
    hangs_at: float = 0.0
    runner: list[str] | None = None
    lost: bool = False

    def run(self) -> None:
        while self.cut is None:
            self.at, self.runner, self.hangs_at = None, None, time.monotonic() + START_S
            self.lost, avoided = False, len(self.avoid)
            with messages(self.worker, json.dumps(self._order())) as (process, found):
                if self._listen(found):
                    return
                status = self._ended(process)
            if self.cut is None and not self.lost and len(self.avoid) == avoided:
                self._died(status)

    def _order(self) -> dict[str, Any]:
        done: dict[str, list[list[str]]] = {}
        for name, journal in self.journals.items():
            for device, cases in journal.done().items():
                done.setdefault(device, []).extend([name, case] for case in cases)
        return {
            "calls": list(self.journals),
            "done": done,
            "tried": self.tried,
            "avoid": self.avoid,
            "dry": self.options.dry_run,
            "seed": self.options.seed,
            "out": str(self.options.out),
            "left_s": self.deadline - time.monotonic(),
            "commit": self.options.commit,
        }

    def _listen(self, found: SimpleQueue[dict[str, Any] | None]) -> bool:
        """Return True when the worker has come to its end; False where it died, hangs, or the time is up."""
        while True:
            now = time.monotonic()
            if now > self.deadline:
                self.cut = "out of time" + (f" in {self.at[0]}: {self.at[1]}" if self.at else "")
                return False
            try:
                message = found.get(timeout=max(0.01, min(self.hangs_at, self.deadline) - now))
            except Empty:
                if time.monotonic() < min(self.hangs_at, self.deadline):
                    continue
                if time.monotonic() <= self.deadline:
                    return False
                continue
            if message is None:
                return False
            if "stop" in message:
                self.cut = message["stop"]
                return True
            self._take(message)

    def _ended(self, process: subprocess.Popen[str]) -> int:
        """Return the exit status of a worker that has ended, or kill it."""
        try:
            return process.wait(timeout=5.0 if self.cut is None else 0.0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _take(self, message: dict[str, Any]) -> None:
        if "facts" in message:
            self.device = message["device"]
            for journal in self.journals.values():
                journal.add(self.device, facts=message["facts"])
        elif "begin" in message:
            self.at, self.runner = (message["call"], message["begin"]), None
            self.hangs_at = time.monotonic() + message["limit_s"]
            self._add(begun=round(time.time(), 1))
        elif "at" in message:
            self.runner = message["at"]
        elif "lost" in message:
            self.lost = True
        elif "avoid" in message:
            self.avoid.append(message["avoid"])
        elif "line" in message:
            self._add(line=message["line"])
        elif "end" in message:
            self._end(message["how"], message["seconds"])
            self.hangs_at = time.monotonic() + START_S

    def _add(self, **entry: Any) -> None:
        assert self.at is not None and self.device is not None
        self.journals[self.at[0]].add(self.device, case=self.at[1], **entry)

    def _end(self, how: str, seconds: float) -> None:
        assert self.at is not None
        self._add(ended=how, seconds=seconds)
        self.tried.append([*self.at])
        self.num_ok, self.num_failed = self.num_ok + (how == "ok"), self.num_failed + (how != "ok")
        print(f"{self.at[0]}: {self.at[1]}: {how}, {seconds:.1f} s", flush=True)
        self.at = None

    def _died(self, status: int) -> None:
        """Fail the case under way, or only its contestant, which is left out when the case is run again."""
        if self.at is None:  # between cases: nothing would come of another try
            self.cut = f"the worker ended with status {status} outside of a case"
            return
        if self.runner is not None and self.runner not in self.avoid:
            self.avoid.append(self.runner)
            print(f"{self.at[0]}: {self.at[1]}: again without {self.runner[-1]}", flush=True)
            return
        how = "hung" if time.monotonic() >= self.hangs_at else f"ended with status {status}"
        self._add(line=encode(Failed(name="/".join(self.at), reason=f"its process {how}")))
        self._end("failed", 0.0)

    def close(self) -> None:
        """Write down why the run stopped before its end."""
        if self.cut is not None and self.device is not None:
            for journal in self.journals.values():
                journal.add(self.device, cut=self.cut)

    def told(self) -> str:
        words = f"{self.num_ok} cases measured, {self.num_failed} failed"
        return words + (f"; {self.cut}" if self.cut else "")


@contextmanager
def messages(
    command: Sequence[str], order: str
) -> Iterator[tuple[subprocess.Popen[str], SimpleQueue[dict[str, Any] | None]]]:
    """Start a worker: (process, its messages, None at its end). It ends with the block; other output is passed on."""
    found: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read(stdout: Iterable[str]) -> None:
        for line in stdout:
            printed, _, text = line.partition(MARK)
            print(printed, end="", file=sys.stderr, flush=True)
            if text:
                message, end = json.JSONDecoder().raw_decode(text)
                found.put(message)
                print(text[end:].removeprefix("\n"), end="", file=sys.stderr, flush=True)
        found.put(None)

    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(SETTINGS),
        start_new_session=True,  # a group of its own: what it starts ends with it
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError):  # it died at once, and says so by its end
                process.stdin.write(order)
                process.stdin.close()
            yield process, found
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join()
