"""Packs: rotations put together from their axes are the reference's to the bit, and next to nothing is sent."""

from __future__ import annotations

import pytest
import torch
from host_waits import waits_of
from torch._subclasses.fake_tensor import FakeTensor

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.runtime.layers.pack import Grid, Sequence, TextContext, build_pack, build_rotation

CPU = torch.device("cpu")


def reference(head_dim: int, grid: Grid) -> torch.Tensor:
    """Return each token's angles in float64, as Wan has them."""
    side = 2 * (head_dim // 6)
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in grid)).view(-1, 3)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * side, side, side)):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(places[:, axis], frequencies))
    together = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(together), together).to(torch.complex64)


def sequence(grid: Grid, modulations: tuple[int, ...], device: torch.device = CPU) -> Sequence:
    keys_values, key_bias = torch.zeros(2, 2, 3, 2, 24, device=device), torch.zeros(3, device=device)
    return Sequence(grid, modulations, TextContext(keys_values, key_bias))


@pytest.mark.parametrize("head_dim", [12, 24, 64, 128])
def test_rotations_of_grids_behind_each_other(head_dim: int) -> None:
    grids = [(1, 2, 3), (5, 4, 4), (5, 4, 4), (1, 2, 3), (21, 30, 52), (1, 1, 1)]
    expected = torch.cat([reference(head_dim, grid) for grid in grids])
    assert torch.equal(build_rotation(head_dim, grids, CPU), expected)


def test_each_token_is_at_its_frames_timestep() -> None:
    pack = build_pack([sequence((2, 1, 2), (1, 0)), sequence((1, 3, 1), (2,))], 24, CPU)
    assert pack.modulation_ids.dtype == torch.int64 and pack.modulation_ids.tolist() == [1, 1, 0, 0, 2, 2, 2]


def test_a_pack_of_a_720p_clip_is_sent_by_the_kilobyte(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    with torch.no_grad(), fake_cuda(90):
        pin_memory = FakeTensor.pin_memory

        def noted(x: torch.Tensor) -> torch.Tensor:
            sent.append(x.nbytes)
            return pin_memory(x)

        monkeypatch.setattr(FakeTensor, "pin_memory", noted)
        device = torch.device("cuda")
        clips = [sequence((21, 45, 80), (0,) * 21, device)] * 2
        assert waits_of(lambda: build_pack(clips, 128, device)).waits == []
        assert build_pack(clips, 128, device).rotation.nbytes == 2 * 75_600 * 64 * 8
    assert sum(sent) / 2 < 64 * 1024
