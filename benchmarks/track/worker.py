"""Both sides of a gate: two trees' packages in two processes, that run a workload each time they are told to.

This file is run by its path, so it imports nothing of the tree it stands in; of a tree under test it uses what is
stable: Engine and VideoRequest, and an operation of `kernels`. What a tree cannot do it says once. It runs on the CPU,
also where there is a GPU: CPU time is what is counted.

Both processes are forks of one that has loaded everything but skylapse, and take turns on the same core, so that
neither libraries' addresses nor a neighbour of one core make a difference between them.

    worker.py MODEL FOLDER FOLDER WORKLOAD...

Lines of JSON: first a list of two {"package", "workloads": {name: null | why it cannot run}}, then to each {"side",
"run", "slower"} a {"cpu_s", "wall_s"}; null in place of what a side says that has died. `slower` 0.1 burns another 10 %
of CPU time inside the measured part, for who tests the gate. A side's folder has its tree as `skylapse`, and its log.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NoReturn

Run = Callable[[], object]
PROMPT = "a red circle moving right at sunset"
CLIP: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 17}
SHORT: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5}
LIBRARIES = (
    "torch",
    "numpy",
    "transformers",
    "transformers.models.umt5.modeling_umt5",
    "safetensors.torch",
    "av",
    "PIL",
)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    model, first, second, *names = sys.argv[1:]
    for library in LIBRARIES:
        with suppress(ImportError):
            import_module(library)
    import_module("torch").set_num_threads(1)
    both = [begin(Path(folder), model, names) for folder in (first, second)]
    print(json.dumps([heard(side[1]) for side in both]), file=answers)
    for line in sys.stdin:
        told, hears = both[json.loads(line)["side"]]
        with suppress(BrokenPipeError):
            print(line, end="", file=told, flush=True)
        print(json.dumps(heard(hears)), file=answers)
    return 0


def begin(folder: Path, model: str, names: Sequence[str]) -> tuple[IO[str], IO[str]]:
    """A fork that serves one tree: (what it is told by, what it answers by)."""
    (reads, told), (hears, writes) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(told)
        os.close(hears)
        serve(folder, model, names, os.fdopen(reads), os.fdopen(writes, "w", buffering=1))
    os.close(reads)
    os.close(writes)
    return os.fdopen(told, "w"), os.fdopen(hears)


def heard(side: IO[str]) -> Any:
    line = side.readline()
    return json.loads(line) if line else None


def serve(folder: Path, model: str, names: Sequence[str], asked: IO[str], answers: IO[str]) -> NoReturn:
    """Until nobody asks any more."""
    status = 1
    try:
        log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        skylapse = import_module("skylapse")
        package = str(Path(skylapse.__path__[0]).resolve())
        runs, reasons = made(skylapse.Engine.from_pretrained(model, device="cpu"), names)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps({"package": package, "workloads": reasons}), file=answers)
        gc.collect()
        gc.freeze()
        gc.disable()  # or whoever happens to allocate most pays for everyone
        for line in asked:
            it = json.loads(line)
            print(json.dumps(timed(runs[it["run"]], it["slower"])), file=answers)
        status = 0
    except BaseException as error:  # nothing of the process that was forked may go on here
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def made(engine: Any, names: Sequence[str]) -> tuple[dict[str, Run], dict[str, str | None]]:
    """The workloads that this tree can do, warm, and of each the reason why it cannot."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str | None] = {}
    for name in names:
        try:
            run = WORKLOADS[name](engine)
            for _ in range(2):
                run()
        except Exception as error:  # whatever a tree raises is its own answer
            reasons[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
        else:
            runs[name], reasons[name] = run, None
    return runs, reasons


def timed(run: Run, slower: float) -> dict[str, float]:
    """Of this process: what others take from the machine is in its wall time alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    used = time.process_time() - cpu
    if slower:
        burn(cpu + used * (1 + slower))
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def burn(until: float) -> None:
    while time.process_time() < until:
        sum(range(1000))


# --- what is run: each makes a function of no arguments that takes about a tenth of a second --------------------------


def asked(prompt: str = PROMPT, **fields: Any) -> Any:
    """A request of the tree under test."""
    return import_module("skylapse").VideoRequest(prompt=prompt, **fields)


def exact(engine: Any) -> Run:
    """Denoising steps, every one computed."""
    request = asked(num_inference_steps=3, cache="none", **CLIP)
    return lambda: engine.generate_latents(request)


def high(engine: Any) -> Run:
    """A trajectory under a cache's preset: its decisions, its skipped steps and its computed ones."""
    request = asked(num_inference_steps=9, cache="high", **SHORT)
    return lambda: engine.generate_latents(request)


def mixed(engine: Any) -> Run:
    """Requests of three shapes at once through submit and step, decoded and all."""
    requests = [
        asked(width=64, height=64, num_frames=1, num_inference_steps=2),
        asked(width=96, height=64, num_frames=1, num_inference_steps=1),
        asked(num_inference_steps=1, **SHORT),
    ]

    def run() -> None:
        for request in requests:
            engine.submit(request)
        left = len(requests)
        while engine.has_work():
            for event in engine.step():
                kind = type(event).__name__
                left -= kind == "Finished"
                if kind == "Failed":
                    raise event.error
        if left:
            raise RuntimeError(f"{left} of {len(requests)} requests did not finish")

    return run


def decode(engine: Any) -> Run:
    """A clip out of its latents, by eager."""
    latents = engine.generate_latents(asked(num_inference_steps=1, **CLIP))
    return lambda: list(engine.decode(latents))


def text(engine: Any) -> Run:
    """Prompts that nobody has asked for before, and a step of one frame behind each."""
    calls = [0]

    def run() -> None:
        for _ in range(4):
            calls[0] += 1
            text = f"{PROMPT}, number {calls[0]}"
            engine.generate_latents(asked(text, width=64, height=64, num_frames=1, num_inference_steps=1))

    return run


def attention(engine: Any) -> Run:
    """Attention over a pack of three lengths."""
    import torch

    run = import_module("skylapse.kernels.attention").attention
    ends = (0, 64, 320, 640)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ends[-1], 4, 32, generator=rng, device="cpu").to(engine.device) for _ in range(3))
    return lambda: [run(q, k, v, ends) for _ in range(30)]


WORKLOADS: dict[str, Callable[[Any], Run]] = {
    "denoise/exact": exact,
    "denoise/high": high,
    "engine/mixed": mixed,
    "decode/eager": decode,
    "text/encode": text,
    "kernels/attention": attention,
}

if __name__ == "__main__":
    sys.exit(main())
