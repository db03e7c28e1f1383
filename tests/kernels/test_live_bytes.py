"""The counter of live bytes on lifetimes made by hand, on the CPU, without memory, and on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.live_bytes import LiveBytes


@pytest.fixture(params=["cpu", "meta", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if request.param == "cuda":
            stack.enter_context(fake_cuda(90))
        yield request.param


def test_a_storage_counts_from_its_making_to_the_end_of_its_last_view(device: str) -> None:
    with LiveBytes() as live:
        a = torch.empty(1000, device=device)
        view = a[:10]
        assert live.live_bytes == 4000
        del a
        assert live.live_bytes == 4000  # the view keeps all of it
        own = view.clone()
        assert live.live_bytes == 4040
        del view
        assert (live.live_bytes, live.peak_bytes) == (40, 4040)
        del own
        assert live.live_bytes == 0


def test_writing_in_place_and_views_of_what_was_there_before_count_nothing(device: str) -> None:
    weight = torch.empty(1000, device=device)
    with LiveBytes() as live:
        weight.add_(1)
        parts = weight.view(10, 100).split(5)
        assert parts[0].shape == (5, 100) and live.peak_bytes == 0


def test_every_result_of_an_operation_counts(device: str) -> None:
    x = torch.empty(8, 16, device=device)
    with LiveBytes() as live:
        values, indices = x.max(dim=1)
        assert live.live_bytes == 8 * 4 + 8 * 8
        del indices
        assert live.live_bytes == values.nbytes


def test_the_peak_is_of_what_lives_at_once_and_not_of_all(device: str) -> None:
    with LiveBytes() as live:
        for _ in range(5):
            x = torch.empty(100, device=device)
            x = x * 2  # two at once
        assert (live.live_bytes, live.peak_bytes) == (400, 800)
        del x
