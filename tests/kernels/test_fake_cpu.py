"""CPU tensors without memory: what an operation returns is laid out as real ones are, and as much lives at once."""

from __future__ import annotations

import pytest
import torch

from skylapse.kernels.conv3d import conv3d
from skylapse.kernels.fake_cpu import fake_cpu
from skylapse.runtime.memory.peaks import chunk_shapes, coding_bytes
from skylapse.runtime.vae.coders import WanDecoder, WanEncoder
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

CONFIG = WanVAEConfig(base_dim=8, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)


@pytest.mark.parametrize("channels_last", [True, False])
def test_onednns_convolution_keeps_the_memory_order(channels_last: bool) -> None:
    strides = []
    for mode in (torch.no_grad, fake_cpu):
        with mode(), torch.no_grad():
            x = torch.zeros(1, 3, 5, 4, 8).movedim(-1, 1) if channels_last else torch.zeros(1, 8, 3, 5, 4)
            y = conv3d(x, torch.zeros(6, 8, 3, 3, 3), torch.zeros(6), padding=(0, 1, 1))
            strides.append((*y.shape, *y.stride()))
    assert strides[0] == strides[1]


@pytest.mark.parametrize("half", [WanDecoder, WanEncoder])
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_vae_without_memory_holds_what_a_real_one_holds(half: type[WanDecoder | WanEncoder], chunk: int) -> None:
    shapes = chunk_shapes(CONFIG, half is WanDecoder, 4, 6, chunk)
    peaks = []
    for mode in (torch.no_grad, fake_cpu):
        with mode(), torch.no_grad():
            module = half(WanVAE(CONFIG)).requires_grad_(False)
            peaks.append(coding_bytes(module, shapes, torch.zeros(1)))
    assert peaks[0] == peaks[1] > 0
