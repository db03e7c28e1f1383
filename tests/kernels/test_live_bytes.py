"""The counter of live bytes on lifetimes made by hand, on the CPU, without memory, and on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from random import Random

import pytest
import torch
import torch.nn.functional as F

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


def test_random_lifetimes_add_up_as_by_hand(device: str) -> None:
    """Tensors, views on them and copies, made and dropped in any order: a storage lives as long as any name for it."""
    pick = Random(0)
    names: list[tuple[torch.Tensor, int]] = []  # a tensor, and which storage it lies in
    sizes: list[int] = []
    peak = 0

    def alive() -> int:
        return sum(sizes[storage] for storage in {storage for _, storage in names})

    with LiveBytes() as live:
        for _ in range(400):
            what = pick.choice(("make", "view", "copy", "drop", "drop")) if names else "make"
            if what == "drop":
                names.pop(pick.randrange(len(names)))
            elif what == "view":
                tensor, storage = pick.choice(names)
                names.append((tensor[pick.randrange(len(tensor)) :], storage))
            else:
                made = torch.empty(pick.randrange(1, 1000), device=device) if what == "make" else names[-1][0].clone()
                sizes.append(made.nbytes)
                names.append((made, len(sizes) - 1))
                del made
            peak = max(peak, alive())
            assert live.live_bytes == alive()
            tensor = None  # type: ignore[assignment]
        assert live.peak_bytes == peak > 0


def test_what_an_operation_makes_on_the_way_counts_without_gradients_alone() -> None:
    """Inference mode runs what is put together of several operations as one, and nobody sees between them."""
    x, weight = torch.randn(64, 32), torch.ones(32)
    peaks = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), LiveBytes() as live:
            F.rms_norm(x, (32,), weight, 1e-6)
        peaks.append(live.peak_bytes)
    assert peaks[0] >= 2 * x.nbytes  # its square, or its product with the scale, beside the result
    assert peaks[1] <= peaks[0]


def test_what_was_there_before_and_is_dropped_inside_takes_nothing_off(device: str) -> None:
    before = torch.empty(1000, device=device)
    with LiveBytes() as live:
        own = torch.empty(10, device=device)
        del before
        assert live.live_bytes == own.nbytes


def test_what_lives_on_behind_the_count_is_taken_off_when_it_ends(device: str) -> None:
    with LiveBytes() as live:
        kept = torch.empty(1000, device=device)
    more = kept * 2  # made outside
    assert (live.live_bytes, live.peak_bytes) == (4000, 4000)
    del kept, more
    assert (live.live_bytes, live.peak_bytes) == (0, 4000)
