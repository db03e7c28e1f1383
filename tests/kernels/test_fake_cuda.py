"""Fake CUDA tensors: what a CPU build of torch cannot do with them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from skylapse.kernels import toolchain
from skylapse.kernels.adaln import adaln
from skylapse.kernels.backends import Backends
from skylapse.kernels.fake_cuda import UNGUARDED, fake_cuda
from skylapse.kernels.live_bytes import LiveBytes


@pytest.fixture
def cuda() -> Iterator[None]:
    with torch.no_grad(), fake_cuda(90):
        yield


INDICES = [0, -1, slice(1, 3), (slice(None), 2), (..., slice(0, 2)), (None, 1), (0, ..., None)]


@pytest.mark.parametrize(
    "index",
    [*INDICES, ([0, 2],), (slice(None), [1])],
)
def test_indexing_gives_the_shape_that_torch_gives(index: Any) -> None:
    expected = torch.empty(4, 5, 6)[index]
    with torch.no_grad(), fake_cuda(90):
        found = torch.empty(4, 5, 6, device="cuda")[index]
    assert (found.shape, found.stride(), found.device.type) == (expected.shape, expected.stride(), "cuda")


@pytest.mark.usefixtures("cuda")
def test_slices_share_their_storage_and_can_be_written_to() -> None:
    x = torch.empty(4, 5, device="cuda")
    x[1:, ::2] = torch.zeros(3, 3, device="cuda")
    x[0] = 1.0
    assert x[1:].untyped_storage()._cdata == x.untyped_storage()._cdata


@pytest.mark.usefixtures("cuda")
def test_moving_tells_the_device_and_pinned_memory_is_known() -> None:
    x = torch.zeros(3)
    assert x.to("cuda").device.type == "cuda" and x.to("cuda", torch.float16).dtype == torch.float16
    assert x.pin_memory().is_pinned() and not x.is_pinned()
    assert x.to(torch.float32) is x


@pytest.mark.usefixtures("cuda")
def test_a_norm_is_one_kernel_whatever_its_dtype_and_makes_no_copies() -> None:
    x = torch.empty(2, 8, device="cuda", dtype=torch.bfloat16)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, LiveBytes() as live:
            assert F.rms_norm(x, (8,), x[0], 1e-6).dtype == torch.bfloat16
        assert live.peak_bytes == 2 * 8 * 2 + 2 * 4  # the result, and a scale a row in fp32


@pytest.mark.usefixtures("cuda")
def test_kernels_and_backends_are_those_of_the_capability_that_is_told() -> None:
    x = torch.empty(6, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.empty(2, 64, device="cuda")
    assert toolchain.launches(x) and toolchain.capability(x.device) == 90
    assert Backends().choose("attention", x.device).name == "cudnn"
    ids = torch.zeros(6, dtype=torch.int64, device="cuda")
    assert adaln(x, table, table, ids, 1e-6).shape == x.shape


@pytest.mark.usefixtures("cuda")
def test_streams_and_events_are_there_and_never_wait() -> None:
    side, event = torch.cuda.Stream(torch.device("cuda")), torch.cuda.Event()
    default = torch.cuda.current_stream()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream(torch.device("cuda")) is side
        event.record()
    assert torch.cuda.current_stream() is default != side
    default.wait_event(event)
    torch.empty(3, device="cuda").record_stream(side)
    assert event.query() and not torch.cuda.is_current_stream_capturing()


@pytest.mark.usefixtures("cuda")
def test_memory_that_is_allocated_pinned_is_known() -> None:
    host = torch.empty(2, 3, pin_memory=True)
    assert host.is_pinned() and host.shape == (2, 3) and not torch.empty(2, 3).is_pinned()


def test_nothing_of_it_stays_behind() -> None:
    before, stream = dict(FakeTensor.__dict__), torch.cuda.Stream
    with fake_cuda(90):
        assert FakeTensor.__dict__["contiguous"] is UNGUARDED["contiguous"]
        with fake_cuda(80):
            assert toolchain.capability(torch.device("cuda")) == 80
        assert toolchain.capability(torch.device("cuda")) == 90
    assert dict(FakeTensor.__dict__) == before and torch.cuda.Stream is stream and not toolchain.is_told()
