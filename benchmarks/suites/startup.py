"""`bench startup`: import, --help, loading a model and its first denoising step, in fresh processes, cold and warm.

Cold: a new folder for memory profiles, compiled decoders and inductor's code, as on a machine that has never run
skylapse; warm: a folder that an earlier process has filled. Files may lie in the system's page cache either way:
nobody may drop that here. Cold and warm processes take turns.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..harness import Turns, reason_of
from ..sheet import Sheet, suite_parser
from .apart import Died, run_apart, seconds_until_main
from .clips import prompt_of

TIMEOUT_S = 300.0
COMMANDS = {
    "nothing": [sys.executable, "-c", ""],  # what Python itself takes
    "import": [sys.executable, "-c", "import skylapse"],
    "import-engine": [sys.executable, "-c", "from skylapse import Engine"],
    "help": [sys.executable, "-m", "skylapse", "--help"],
}
MARKS = ("loaded", "first-step", "first-frame", "ended")


def startup(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {options.rounds}")
    options.rounds = options.rounds or (2 if options.quick else 6)
    sheet = Sheet("startup", options, {"rounds": options.rounds, "page_cache": "as it was found"})
    compiled = {"eager": False} | ({} if options.quick else {"compiled": True})
    with sheet.running(cases=len(COMMANDS) + len(compiled) * options.rounds):
        for name, command in COMMANDS.items():
            sheet.check_time(f"startup/{name}")
            sheet.measured(f"startup/{name}", "s", [_seconds(command) for _ in range(options.rounds)])
        for name, compiles in compiled.items():
            if compiles and not (shutil.which("g++") or shutil.which("clang++")):
                sheet.missing(f"startup/{name}", "torch.compile needs a C++ compiler: install g++")
            else:
                _first_steps(sheet, name, compiles)
    return sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("startup", "From a cold process to the first step.")
    parser.add_argument("--rounds", type=int, metavar="N", help="of fresh processes; default: 6, quick 2")
    return parser


def _first_steps(sheet: Sheet, name: str, compiles: bool) -> None:
    """A cold process and a warm one a round."""
    found: dict[str, list[dict[str, list[float]]]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as filled:
        try:
            _first_step(sheet.options, Path(filled), compiles)
            for turn in range(sheet.options.rounds):
                sheet.check_time(f"startup/{name}, round {turn + 1}")
                for state in ("cold", "warm") if turn % 2 == 0 else ("warm", "cold"):
                    with tempfile.TemporaryDirectory() as fresh:
                        folder = Path(fresh if state == "cold" else filled)
                        found[state].append(_first_step(sheet.options, folder, compiles))
        except Died as error:
            sheet.failed(f"startup/{name}", reason_of(error))
            return
    for mark in MARKS:
        turns = Turns()
        for state, runs in found.items():
            turns.samples[state] = [run[mark][0] for run in runs]
            turns.cpu_s[state] = [run[mark][1] for run in runs]
        sheet.turns(f"startup/{name}/{mark}", turns, "warm")


def _first_step(options: argparse.Namespace, folder: Path, compiles: bool) -> dict[str, list[float]]:
    environment = {
        "SKYLAPSE_PROFILE_DIR": str(folder / "profiles"),
        "SKYLAPSE_COMPILED_DIR": str(folder / "compiled"),
        "SKYLAPSE_COMPILE": "1" if compiles else "0",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    asked = {"model": options.model, "threads": options.threads, "prompt": prompt_of(options.seed)}
    found: dict[str, list[float]] = run_apart(marks_of_a_start, asked, environment, TIMEOUT_S)
    return found


def marks_of_a_start(model: str, threads: int | None, prompt: str) -> dict[str, tuple[float, float]]:
    """Seconds since this process was born, and its CPU seconds without those of compilers that it starts."""
    born = time.perf_counter() - seconds_until_main()

    def now() -> tuple[float, float]:
        return time.perf_counter() - born, time.process_time()

    import torch

    from ...runtime.core.events import Failed, Finished, Progress
    from ...runtime.core.request import VideoRequest
    from ...runtime.engine.engine import Engine

    if threads:
        torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model)
    marks = {"loaded": now()}
    engine.submit(VideoRequest(prompt=prompt))
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Progress):
                marks.setdefault("first-step", now())
            if isinstance(event, Finished):
                marks["ended"] = now()
        if any(t._frames for t in engine._batch.active.values()):
            marks.setdefault("first-frame", now())
    marks.setdefault("first-frame", marks["ended"])
    return marks


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    return time.perf_counter() - began
