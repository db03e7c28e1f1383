"""`bench memory`: the most bytes that a request holds, by size and length, beside what admission predicts of it.

Each case has processes of its own. On a CPU two things are counted, in one process each: `tensors`, what operations
allocate (as the memory profile counts), and `resident`, how far the process grows, which the allocator rounds up and
keeps. On a GPU `tensors` are the allocator's. Weights and cached texts are in neither, nor in the prediction.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ..harness import reason_of
from ..peak import held_bytes, peak_while
from ..sheet import Labels, Sheet, suite_parser
from .apart import Died, run_apart
from .clips import Size, clip_request, size_of, words_of
from .real_width import CASES, GIVES_BACK, real_width

SIZES: tuple[Size, ...] = ((64, 64, 1), (64, 64, 17), (64, 64, 65), (96, 64, 17), (128, 96, 29), (128, 128, 17))
QUICK_SIZES: tuple[Size, ...] = ((64, 64, 17), (128, 96, 29))
SMALLEST: Size = (32, 32, 1)  # warms up: what a process holds for ever after its first request is no request's
STEPS = 2  # peaks do not grow with the number of steps: solvers keep no more than two


def memory(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {options.rounds}")
    rounds = options.rounds or (1 if options.quick else 3)
    if options.real_width:
        if options.size or options.model != "demo":
            raise ValueError("--real-width must stand without --size and --model: its cases are published checkpoints'")
        options.model = "random weights"
        sheet = Sheet("memory_real_width", options, {"rounds": rounds, "threads": 1, "malloc": GIVES_BACK})
        real_width(sheet, rounds)
        return sheet.status
    if options.case:
        raise ValueError("--case must stand with --real-width")
    sizes: Sequence[Size] = options.size or (QUICK_SIZES if options.quick else SIZES)
    kinds = ("tensors",) if torch.cuda.is_available() else ("tensors", "resident")
    sheet = Sheet("memory", options, {"rounds": rounds, "steps": STEPS})
    with sheet.running(cases=len(sizes) * len(kinds)):
        for size in sizes:
            for kind in kinds:
                _case(sheet, size, kind, rounds)
    return sheet.status


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("memory", "Peak bytes of a request by size and length, beside the predicted figure.")
    option = parser.add_argument
    option("--size", type=size_of, action="append", metavar="WxHxF", help="pixels and frames; may be given again")
    option("--rounds", type=int, metavar="N", help="of fresh processes; default: 3, quick 1")
    option("--real-width", action="store_true", help="parts of published checkpoints with random weights, on the CPU")
    names = [case.name for case in CASES]
    option("--case", choices=names, action="append", help="one of --real-width; may be given again; default: all")
    return parser


def _case(sheet: Sheet, size: Size, kind: str, rounds: int) -> None:
    name = f"memory/{words_of(size)}/{kind}"
    sheet.check_time(name)
    options = sheet.options
    asked = {"model": options.model, "threads": options.threads, "size": size, "seed": options.seed, "kind": kind}
    try:
        found = [run_apart(peak_of_a_request, asked) for _ in range(rounds)]
    except Died as error:
        sheet.failed(name, reason_of(error))
        return
    if found[0]["measured"] is None:
        sheet.missing(name, "this system does not count the memory of a process")
        return
    width, height, num_frames = size
    labels: Labels = {"width": width, "height": height, "num_frames": num_frames, "tokens": found[0]["tokens"]}
    measured, predicted = ([float(one[key]) for one in found] for key in ("measured", "predicted"))
    sheet.measured(name, "bytes", measured, labels=labels)
    sheet.measured(f"{name}/predicted", "bytes", predicted, "neither", labels)
    over = [p / max(1.0, m) for p, m in zip(predicted, measured, strict=True)]
    sheet.compared(f"{name}/predicted", "predicted", "measured", over, labels)


def peak_of_a_request(model: str, threads: int | None, size: list[int], seed: int, kind: str) -> dict[str, Any]:
    """Bytes that one request takes above what its engine holds, in this process alone."""
    from ...kernels.live_bytes import LiveBytes
    from ...runtime.engine.engine import Engine

    if threads:
        torch.set_num_threads(threads)
    engine = Engine.from_pretrained(model)

    request = clip_request(size, STEPS, seed)
    prepared = engine.prepare(request)
    tokens = prepared.num_tokens * prepared.num_branches
    predicted = engine.memory.work_bytes([engine.memory.fit(prepared.needs)]) + prepared.resident_bytes
    del prepared
    try:
        engine.generate(clip_request(SMALLEST, STEPS, seed))
    except ValueError:  # no size of this model
        engine.generate(clip_request((*size[:2], 1), STEPS, seed))
    measured: int | None
    if kind == "tensors" and engine.device.type != "cuda":
        with LiveBytes() as live:
            engine.generate(request)
        measured = live.peak_bytes
    else:
        held = held_bytes(engine.device)
        peak = peak_while(lambda: engine.generate(request), engine.device)
        measured = None if held is None or peak is None else max(0, peak - held)
    return {"measured": measured, "predicted": predicted, "tokens": tokens}
