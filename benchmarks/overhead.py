"""What a tick costs beside the model: scheduling, packing, caches, guidance, solvers, events."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime import batch
from ..runtime.denoise import take
from ..runtime.engine import Engine
from ..runtime.events import Progress
from ..runtime.request import VideoRequest
from .machine import describe


class Stopwatch:
    """Seconds spent inside the functions that it has wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--caches", nargs="+", default=["none", "easy:0.05"])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "overhead", "machine": describe(), "model": args.model, "rows": []}
    for cache in args.caches:
        for count in args.requests:
            row = measure(args.model, count, cache)
            result["rows"].append(row)
            print(
                f"{cache:<12}{count:>3} requests: step {row['step_ms']:.2f} ms, beside the model "
                f"{100 * row['share']:.2f} % ({100 * row['spread'][0]:.2f} to {100 * row['spread'][1]:.2f} %), "
                f"of it solver and guidance {100 * row['solver_share']:.2f} %"
            )
    result["preview"] = preview = measure_preview(args.model)
    print(f"a preview: {preview['preview_ms']:.3f} ms, {100 * preview['share_of_step']:.2f} % of a step")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: str, count: int, cache: str) -> dict[str, Any]:
    """Share of the denoising ticks' time that is not the denoiser's, the median over ticks."""
    engine = Engine.from_pretrained(model)
    watch, solver = Stopwatch(), Stopwatch()
    for expert in engine.model.experts:
        for name in ("embed", "trunk", "head"):
            object.__setattr__(expert, name, watch.wrap(getattr(expert, name)))
        embedder = expert.condition_embedder
        object.__setattr__(embedder, "embed_time", watch.wrap(embedder.embed_time))
    setattr(batch, "take", solver.wrap(take))  # noqa: B010  a name that batch.py imports
    try:
        for seed in range(count):
            engine.submit(VideoRequest(prompt="a red circle moving right", seed=seed, cache=cache))
        ticks: list[tuple[float, float, float]] = []
        steps = 0
        while engine.has_work():
            stages = [t.stage for t in engine._batch.active.values()]
            watch.seconds = solver.seconds = 0.0
            began = time.perf_counter()
            events = engine.step()
            seconds = time.perf_counter() - began
            after = [t.stage for t in engine._batch.active.values()]
            if watch.seconds and stages == after and set(stages) == {"denoise"}:
                ticks.append((seconds, watch.seconds, solver.seconds))
                steps += sum(isinstance(event, Progress) for event in events)
    finally:
        setattr(batch, "take", take)  # noqa: B010
    shares = [1 - model_s / seconds for seconds, model_s, _ in ticks]
    low, high = (sorted(shares)[round(q * (len(shares) - 1))] for q in (0.05, 0.95))
    return {
        "requests": count,
        "cache": cache,
        "ticks": len(ticks),
        "steps_a_request_and_tick": round(steps / count / len(ticks), 3),  # above 1: caches carried it over several
        "step_ms": round(1000 * statistics.median(tick[0] for tick in ticks), 3),
        "share": round(statistics.median(shares), 5),
        "spread": [round(low, 5), round(high, 5)],
        "solver_share": round(statistics.median(s / seconds for seconds, _, s in ticks), 5),
    }


def measure_preview(model: str, repeats: int = 50) -> dict[str, float]:
    """One preview against one step of the default request alone, in turns."""
    engine = Engine.from_pretrained(model)
    engine.submit(VideoRequest(prompt="a red circle moving right", num_inference_steps=repeats))
    previews: list[float] = []
    steps: list[float] = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - began)
        for t in engine._batch.active.values():
            if t.stage == "denoise":
                began = time.perf_counter()
                engine.previewer(t.current)
                previews.append(time.perf_counter() - began)
    preview_s, step_s = statistics.median(previews[1:]), statistics.median(steps)
    return {"preview_ms": round(1000 * preview_s, 4), "share_of_step": round(preview_s / step_s, 5)}


if __name__ == "__main__":
    main()
