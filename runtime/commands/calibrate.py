"""`skylapse models calibrate`: run a checkpoint uncached on a few prompts, and keep what cache policies need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.budget import Budget, budgeted_steps, warm_mask
from ..cache.calibration import Calibration, write_calibration
from ..cache.policy import Run, relative_l1
from ..cache.residual import ResidualReuse
from ..cache.spec import policy_spec
from ..core.request import VideoRequest
from ..engine.denoise import evaluate, take
from ..engine.engine import Engine
from ..engine.pack_cache import Layouts
from ..vae.preview import fit, store

PROMPTS = (
    "a red circle moving right at sunset",
    "a small blue star moving up over a meadow",
    "a large green square moving left at night",
    "a yellow ring falling",
)
SHARES = (0.7, 0.6, 0.56, 0.5, 0.43, 0.4, 0.36, 0.33, 0.3, 0.26)  # budgets that get a mask
WARMUPS = (1, 2, 3, 4, 5, 6)
ORDER = 1  # of the forecasts that masks are chosen for


@dataclass(frozen=True)
class Recording(ResidualReuse):
    """Computes every step and keeps its residual, as a policy, so that the engine's own step is what is measured."""

    name: ClassVar[str] = "recording"

    def plan(self, run: Run) -> tuple[bool, ...]:
        return (True,) * run.num_steps


@dataclass(frozen=True)
class Measured:
    """One prompt's uncached trajectory."""

    frames: NDArray[np.float32]  # [F, H, W, 3] from 0 to 255
    magnitudes: list[float]  # mean over tokens of |r_i| / |r_{i-1}|, branches averaged; the first is 1
    distances: list[float]  # relative L1 distance of residuals; the first is 0


def calibrate(
    engine: Engine, request: VideoRequest, prompts: Sequence[str] = PROMPTS, report: Callable[[str], None] = print
) -> Path:
    """Measure for the request's solver, steps, shift, guidance and size, and write cache.json beside the checkpoint.

    Also fits the preview's map and writes that. Raises ValueError or OSError as the engine and the folder do.
    """
    requests = [replace(request, prompt=prompt, seed=request.seed + k) for k, prompt in enumerate(prompts)]
    runs = []
    for asked in requests:
        report(f"measuring {asked.prompt!r}")
        runs.append(measure(engine, asked))
    t = engine.prepare(request)
    assert t.request.guidance_scale is not None
    distances = list(t.embedding_distances())
    entry = Calibration(
        solver=t.schedule.config.solver,
        num_inference_steps=t.num_steps,
        shift=t.schedule.config.shift,
        guidance_scale=t.request.guidance_scale,
        magnitudes=tuple(np.mean([run.magnitudes for run in runs], axis=0).round(6).tolist()),
        coefficients=fit_coefficients(distances, runs),
        masks=choose_masks(engine, requests, runs, report),
        quantize=engine.quantize,
    )
    store(fit(engine.model.codec), engine.model.folder.path)
    return write_calibration(engine.model.folder.path, entry)


@torch.inference_mode()
def measure(engine: Engine, request: VideoRequest) -> Measured:
    """One uncached trajectory, with what its blocks added at every step."""
    t = engine.prepare(replace(request, cache="none"))
    t.cache.policy, layouts = Recording(), Layouts(engine.model)
    while t.stage == "encode":
        t.work()
    magnitudes, distances = [1.0], [0.0]
    before: tuple[Tensor, ...] = ()
    while t.stage == "denoise":
        (outcome,) = evaluate(engine.model, [t], layouts)
        residuals: tuple[Tensor, ...] = outcome.state
        if t.steps_done:
            pairs = list(zip(residuals, before, strict=False))  # fewer branches where guidance has an interval
            ratios = [(now.float().norm(dim=1) / old.float().norm(dim=1)).mean().item() for now, old in pairs]
            magnitudes.append(sum(ratios) / len(ratios))
            distances.append(sum(relative_l1(now, old).item() for now, old in pairs) / len(pairs))
        before = residuals
        take(t, outcome)
    return Measured(decoded(engine, t.final_latents()), magnitudes, distances)


def decoded(engine: Engine, latents: Tensor) -> NDArray[np.float32]:
    return np.concatenate(list(engine.decode(latents))).astype(np.float32)


def fit_coefficients(distances: list[float], runs: Sequence[Measured]) -> tuple[float, ...]:
    """TeaCache's polynomial of degree 4 (less where there are few steps) from embeddings' to residuals' distances."""
    x = np.tile(distances[1:], len(runs))
    y = np.concatenate([run.distances[1:] for run in runs])
    degree = min(4, len(distances) - 2)
    return tuple(np.polyfit(x, y, degree).tolist()) if degree > 0 else ()


def choose_masks(
    engine: Engine, requests: Sequence[VideoRequest], runs: Sequence[Measured], report: Callable[[str], None]
) -> dict[str, str]:
    """For each budget the warm-up whose clips come nearest to the uncached ones, by PSNR in dB, on average."""
    num_steps = engine.prepare(requests[0]).num_steps
    masks: dict[str, str] = {}
    for num_computed, share in {budgeted_steps(share, num_steps): share for share in SHARES}.items():
        nearness_db = {}
        for warmup in (w for w in WARMUPS if w <= num_computed):
            cache = policy_spec(Budget(share, ORDER, warmup))
            clips = [decoded(engine, engine.generate_latents(replace(asked, cache=cache))) for asked in requests]
            errors = [float(np.mean((clip - run.frames) ** 2)) for clip, run in zip(clips, runs, strict=True)]
            nearness_db[warmup] = float(np.mean([10 * np.log10(255**2 / max(error, 1e-6)) for error in errors]))
        best = max(nearness_db, key=nearness_db.__getitem__)
        mask = warm_mask(num_steps, num_computed, best)
        text = masks[f"{ORDER},{num_computed}"] = "".join("1" if computed else "0" for computed in mask)
        report(f"{num_computed} of {num_steps} steps: {text}, {nearness_db[best]:.1f} dB from uncached")
    return masks
