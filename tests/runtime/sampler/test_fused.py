"""Steps by the fused kernel: the same clips, states and previews as by torch's lines, one call a request and step.

The CPU's implementation of the operation stands for the kernel, which has the same arguments and results.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import Recorder, draw_request, engine_of, small_request
from compare import relative_l2
from torch import Tensor

from skylapse import VideoRequest
from skylapse.kernels.solver_step import solver_step
from skylapse.runtime.core.events import Finished, Preview
from skylapse.runtime.sampler import fused


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The kernel's calls, once `by_kernel` lets it serve."""
    made: list[tuple[Any, ...]] = []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return solver_step(*arguments)

    monkeypatch.setattr(fused, "solver_step", counted)
    return made


def run(folder: Path, requests: list[VideoRequest], **terms: Any) -> tuple[dict[int, Tensor], list[Preview]]:
    """Final latents by ticket, and all previews."""
    together = Recorder(engine_of(folder))
    tickets = [together.engine.submit(request, **terms) for request in requests]
    together.run()
    assert sum(isinstance(event, Finished) for event in together.events) == len(requests)
    latents = {ticket: together.trajectories[ticket].current for ticket in tickets}
    return latents, [event for event in together.events if isinstance(event, Preview)]


def both(
    monkeypatch: pytest.MonkeyPatch, *arguments: Any, **terms: Any
) -> list[tuple[dict[int, Tensor], list[Preview]]]:
    """Return the results of torch's lines, then of the kernel."""
    results = [run(*arguments, **terms)]
    with monkeypatch.context() as patch:
        patch.setattr(fused, "launches", lambda latents: True)
        return [*results, run(*arguments, **terms)]


@pytest.mark.parametrize("seed", range(3))
def test_clips_are_the_same_to_the_bit_with_any_cache_guidance_and_source(
    seed: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: list[tuple[Any, ...]]
) -> None:
    rng = random.Random(seed)
    requests = [draw_request(rng) for _ in range(6)]
    (plain, _), (kernel, _) = both(monkeypatch, folders["wan2.1-t2v"], requests)
    for request, one, other in zip(requests, plain.values(), kernel.values(), strict=True):
        if request.solver == "euler":  # written as weighted sums, another order of the same terms
            assert relative_l2(other, one) < 1e-4
        else:
            assert torch.equal(other, one)
    assert {len(arguments) for arguments in calls} == {10}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", ["unipc", "dpmpp", "euler"])
def test_step_is_one_call_that_takes_the_branches_as_the_model_made_them(
    solver: str, guidance_scale: float, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    monkeypatch.setattr(fused, "launches", lambda latents: True)
    request = small_request(solver=solver, guidance_scale=guidance_scale, num_inference_steps=5)
    engine = engine_of(folders["wan2.1-t2v"])
    engine.generate_latents(request)
    assert len(calls) == 5
    for latents, cond, uncond, scale, *_ in calls:
        assert cond.shape == latents.shape and (uncond is None) == (guidance_scale == 1.0) and scale == guidance_scale
        assert cond.is_contiguous() and latents.is_contiguous()


def test_previews_are_made_in_the_same_call_without_given_frames_and_equal(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    given = np.full((1, 64, 64, 3), 200, dtype=np.uint8)
    requests = [small_request(), small_request(image=given[0])]
    (_, plain), (_, kernel) = both(monkeypatch, folders["wan2.2-ti2v-5b"], requests, preview_every=3)
    assert [(p.ticket, p.step) for p in plain] == [(p.ticket, p.step) for p in kernel] and len(plain) == 8
    assert all((one.frames == other.frames).all() for one, other in zip(plain, kernel, strict=True))
    projected = [arguments[-1] is not None for arguments in calls]
    assert sum(projected) == 4  # of the request without a given frame: its own is in its place before it is shown


def test_noise_of_any_memory_order_is_taken(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = engine_of(folders["wan2.1-t2v"]), small_request(num_inference_steps=3)
    shape = engine.prepare(request).shape
    noise = torch.randn(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    assert not noise.is_contiguous()
    expected = engine.generate_latents(request, latents=noise.contiguous())
    monkeypatch.setattr(fused, "launches", lambda latents: True)
    assert torch.equal(engine.generate_latents(request, latents=noise), expected)
