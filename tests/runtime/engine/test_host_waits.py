"""A request on CUDA, without a GPU: the host waits for the device where a cache asks it, and nowhere else.

Each wait that there was once is put back, and found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import CALIBRATED_STEPS, engine_of, small_request
from host_waits import Found, on_fake_cuda, waits_of
from torch import Tensor

from skylapse.kernels import resample_conv
from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.runtime.conditioning import latents as conditioning
from skylapse.runtime.core.request import VideoRequest
from skylapse.runtime.engine import denoise
from skylapse.runtime.engine.denoise import evaluate, skip_ahead, take
from skylapse.runtime.engine.nan_watch import FiniteWatch
from skylapse.runtime.engine.pack_cache import Layouts
from skylapse.runtime.engine.trajectory import Trajectory
from skylapse.runtime.layers import pack
from skylapse.runtime.layers.time_embedding import TimeEmbeddings
from skylapse.runtime.models.model import Model
from skylapse.runtime.models.text_cache import TextCache
from skylapse.runtime.vae import overlap

IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: engine_of(folder).model for name, folder in folders.items()}


def trajectory(model: Model, request: VideoRequest, ticket: int = 1) -> Trajectory:
    return Trajectory(ticket, model, request.resolved(model.defaults, model.limits), TextCache(2**20))


def requests(*caches: str, **changes: Any) -> list[VideoRequest]:
    return [small_request(cache, guidance_scale=3.0, num_frames=9, **changes) for cache in caches]


def steps(model: Model, members: list[Trajectory], num_steps: int = 3) -> None:
    """As the batch takes them, with previews left out: those are read."""
    layouts, finite = Layouts(model), FiniteWatch(model.device)
    for _ in range(num_steps):
        stepped, failed = skip_ahead(members)
        assert not failed
        left = [t for t in members if t.ticket not in {taken.trajectory.ticket for taken in stepped}]
        if left:
            stepped += [take(t, outcome) for t, outcome in zip(left, evaluate(model, left, layouts), strict=True)]
        finite.watch(stepped)
        assert finite.poll() == []


def whole(model: Model, asked: list[VideoRequest]) -> None:
    """Encode, three steps of all, then the first and the next chunks of frames of the first."""
    members = [trajectory(model, request, ticket) for ticket, request in enumerate(asked)]
    for t in members:
        while t.stage == "encode":
            t.work()
    steps(model, members)
    assert sum(len(frames) for frames in model.codec.decode(members[0].final_latents())) == 9


def found_on(model: Model, asked: list[VideoRequest], indicator: float = 0.0) -> Found:
    with on_fake_cuda(model) as on_device:
        on_device.codec.chunk = 1
        return waits_of(lambda: whole(on_device, asked), indicator)


@pytest.mark.parametrize("name", ["wan2.1-t2v", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
def test_a_guided_request_waits_for_nothing(models: dict[str, Model], name: str) -> None:
    image = dict(image=IMAGE) if "ti2v" in name else {}
    found = found_on(models[name], requests("none", "taylorseer:3", **image))
    assert (found.waits, found.reads) == ([], 0)


@pytest.mark.parametrize("cache", ["easy:threshold=2,warmup=1", "first_block:threshold=1.1,warmup=1"])
@pytest.mark.parametrize("indicator", [0.0, 9.0])
def test_a_decision_stage_is_one_read(
    models: dict[str, Model], cache: str, indicator: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, stages = denoise._ask, [0]

    def counted(asking: list[Trajectory], probes: Any) -> None:
        stages[0] += bool(asking)
        ask(asking, probes)

    monkeypatch.setattr(denoise, "_ask", counted)
    found = found_on(models["wan2.1-t2v"], requests(cache, cache), indicator)
    assert found.waits == [] and found.reads == stages[0] > 0


def test_teacache_reads_its_distances_at_once_at_submission_and_nothing_more(models: dict[str, Model]) -> None:
    found = found_on(models["wan2.1-t2v"], requests("teacache:0.3", num_inference_steps=CALIBRATED_STEPS))
    assert (found.waits, found.reads) == ([], 1)


# --- each wait of gpu.md section 3 put back, and some of their kin ----------------------------------------------------


def _timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(self: TimeEmbeddings, expert: int, timesteps: list[float]) -> tuple[Tensor, Tensor]:
        denoiser = self.model.experts[expert]
        sent = torch.tensor(timesteps, device=self.model.device)
        return denoiser.condition_embedder.embed_time(sent, denoiser.dtype)

    monkeypatch.setattr(TimeEmbeddings, "get", get)


def _upsampling_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(weight: Tensor) -> Tensor:
        taps = torch.tensor(resample_conv.TAPS, device=weight.device)
        both = (taps[:, None, :, None, :, None] * taps[None, :, None, :, None, :]).flatten(4)
        kernels = weight.float().flatten(2) @ both.flatten(0, 3).T
        return kernels.unflatten(-1, (2, 2, 2, 2)).permute(2, 3, 0, 1, 4, 5).to(weight.dtype)

    monkeypatch.setattr(resample_conv, "kernels_of", kernels)


def _layout_from_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "send", lambda host, device: host.to(device))


def _layout_pageable_though_not_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "send", lambda host, device: host.to(device, non_blocking=True))


def _layout_pinned_but_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "send", lambda host, device: host.pin_memory().to(device))


def _mask_of_given_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioning, "send", lambda host, device: torch.tensor([True, False, False], device=device))


def _frames_into_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: overlap.CudaLane, tensor: Tensor) -> Callable[[], np.ndarray]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return host.numpy

    monkeypatch.setattr(overlap.CudaLane, "fetch", fetch)


def _frames_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap.CudaLane, "fetch", lambda self, tensor: tensor.cpu().numpy)


def _finite_flags_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(self: FiniteWatch, stepped: list[denoise.Taken]) -> None:
        flags = torch.stack([taken.total for taken in stepped]).isfinite().to("cpu")
        self._pending.append(([(t.trajectory.ticket, t.step) for t in stepped], flags, None))

    monkeypatch.setattr(FiniteWatch, "watch", watch)


def _a_number_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Trajectory.advance

    def reading(self: Trajectory, *args: Any) -> None:
        advance(self, *args)
        assert self.current.sum().isfinite()

    monkeypatch.setattr(Trajectory, "advance", reading)


FAULTS = [
    _timesteps,
    _upsampling_kernels,
    _layout_from_pageable_memory,
    _layout_pageable_though_not_blocking,
    _layout_pinned_but_blocking,
    _mask_of_given_frames,
    _frames_into_pageable_memory,
    _frames_waited_for,
    _finite_flags_waited_for,
    _a_number_of_the_step,
]


@pytest.mark.parametrize("put_back", FAULTS)
def test_a_wait_that_is_put_back_is_found(
    models: dict[str, Model], put_back: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back(monkeypatch)
    assert found_on(models["wan2.2-ti2v-5b"], requests("none", image=IMAGE)).waits


# --- the watch itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def x() -> Iterator[Tensor]:
    with torch.no_grad(), fake_cuda(90):
        yield torch.empty(4, 4, device="cuda")


WAITING: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda x: torch.tensor([1.0], device="cuda"),
    "as_tensor": lambda x: torch.as_tensor([1.0], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "to": lambda x: torch.zeros(3).to("cuda"),
    "copy_": lambda x: x.copy_(torch.zeros(4, 4)),
    "list as index": lambda x: x[[0, 2]],
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "mask as index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.empty(4, dtype=torch.int64, device="cuda"), 0),
    "cpu": lambda x: x.cpu(),
    "into pageable memory": lambda x: torch.zeros(4, 4).copy_(x, non_blocking=True),
}
GOING_ON: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: torch.zeros(3).pin_memory().to("cuda", non_blocking=True),
    "pinned copy_": lambda x: x.copy_(torch.zeros(4, 4).pin_memory(), non_blocking=True),
    "number": lambda x: x * torch.tensor(2.0) + 1,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "into pinned memory": lambda x: torch.empty(4, 4, pin_memory=True).copy_(x, non_blocking=True),
    "fill": lambda x: (torch.full((3,), 2.0, device="cuda"), x[1:].zero_()),
}


@pytest.mark.parametrize("name", WAITING)
def test_watch_sees_what_waits(x: Tensor, name: str) -> None:
    assert waits_of(lambda: WAITING[name](x)).waits


@pytest.mark.parametrize("name", GOING_ON)
def test_watch_lets_pass_what_goes_on(x: Tensor, name: str) -> None:
    assert waits_of(lambda: GOING_ON[name](x)).waits == []
