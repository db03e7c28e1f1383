"""`bench neighbours`: time requests on a CPU that others use too, with a fixed and with a chosen number of threads.

Each contestant has a process of its own a round, since OpenMP reads its settings once. A neighbour is a process that
keeps a core busy; there is one for each core.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...runtime.core.threads import usable_cores
from ..harness import Turns, reason_of
from ..sheet import Sheet, suite_parser
from .apart import Died, run_apart
from .clips import prompt_of

TIMEOUT_S = 600.0
BUSY = [sys.executable, "-c", "while True: pass"]
# Name -> (threads, None: all that there are; whether they are chosen; OpenMP's variables). libgomp's own count of turns
# before a thread sleeps is 300,000, and it says so when it is asked (OMP_DISPLAY_ENV).
CONTESTANTS: dict[str, tuple[int | None, bool, dict[str, str]]] = {
    "chosen": (None, True, {}),
    "one": (1, False, {}),
    "all": (None, False, {}),
    "all-spinning": (None, False, {"GOMP_SPINCOUNT": "300000"}),
    "all-passive": (None, False, {"OMP_WAIT_POLICY": "passive"}),
}


def neighbours(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {options.rounds}")
    rounds = options.rounds or (1 if options.quick else 5)
    cores = options.threads or usable_cores()
    sheet = Sheet("neighbours", options, {"rounds": rounds, "requests": options.requests, "cores": cores})
    with sheet.running(cases=2 * rounds):
        for number in (0, cores):
            _case(sheet, "busy" if number else "quiet", number, cores, rounds)
    return sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("neighbours", "Requests on a CPU that others use too, by number of threads.")
    parser.add_argument("--rounds", type=int, metavar="N", help="of fresh processes; default: 5, quick 1")
    parser.add_argument("--requests", type=int, default=3, metavar="N", help="of a process, one by one; default: 3")
    return parser


def _case(sheet: Sheet, state: str, number: int, cores: int, rounds: int) -> None:
    turns, options = Turns(), sheet.options
    for turn in range(rounds):
        sheet.check_time(f"neighbours/{state}, round {turn + 1}")
        order = [*CONTESTANTS] if turn % 2 == 0 else [*reversed(CONTESTANTS)]
        for name in order:
            threads, chooses, changed = CONTESTANTS[name]
            asked = {"model": options.model, "threads": threads or cores, "chooses": chooses, "seed": options.seed}
            try:
                with busy(number):
                    found = run_apart(seconds_of_requests, asked | {"requests": options.requests}, changed, TIMEOUT_S)
            except Died as error:
                sheet.failed(f"neighbours/{state}/{name}", reason_of(error))
                return
            turns.samples.setdefault(name, []).append(found["seconds"])
            turns.cpu_s.setdefault(name, []).append(found["cpu_s"])
    sheet.turns(f"neighbours/{state}", turns, "chosen", {"neighbours": number, "threads": cores})


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run so many processes, each of which keeps a core busy, inside the block."""
    processes = [subprocess.Popen(BUSY) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_of_requests(model: str, threads: int, chooses: bool, seed: int, requests: int) -> dict[str, float]:
    """Return the seconds of requests one after another, from prompt to latents, after one that warms up."""
    from ...runtime.core.request import VideoRequest
    from ...runtime.engine.engine import Engine

    torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model, "cpu")
    if not chooses:
        engine.threads = engine._batch.threads = None
    engine.generate_latents(VideoRequest(prompt=prompt_of(seed), num_inference_steps=2))
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for number in range(requests):
        engine.generate_latents(VideoRequest(prompt=prompt_of(seed + number), seed=seed + number))
    return {"seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - began_cpu_s}
