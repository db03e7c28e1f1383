"""Peak memory of the published VAEs at their native sizes: tensors alone, on a fake CUDA device, over many chunks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import skylapse.runtime.vae.codec as codec_module
from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.live_bytes import LiveBytes
from skylapse.runtime.checkpoints.configs import parse_config
from skylapse.runtime.checkpoints.published import component
from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

GIB = 2**30
WAN_21, WAN_22 = (parse_config(WanVAEConfig, component(name), "vae") for name in ("wan2.1-vae", "wan2.2-vae"))
CUDA = torch.device("cuda")


def codec(config: WanVAEConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> VideoCodec:
    """As a GPU would have it, loaded on the host where it does not decode in fp32."""
    monkeypatch.setattr(codec_module, "CudaLane", lambda device: None)  # a stream is the one thing that is not faked
    with torch.device("cpu" if dtype != torch.float32 else CUDA):
        vae = WanVAE(config).requires_grad_(False)
    return VideoCodec(vae, device=CUDA, decoder_dtype=dtype)


def peak_of(pieces: Iterator[Tensor], num_chunks: int) -> float:
    """GiB beside the weights; who asks keeps each piece until the next one is there, as a caller's loop does."""
    with LiveBytes() as live:
        for _ in range(num_chunks):
            next(pieces)
    return live.peak_bytes / GIB


# GiB. The goals: 8.8, 3.9, 7.3 in bf16; encoding, which is of fp32, 12.8, 5.6, 6.0.
@pytest.mark.parametrize(
    ("config", "size", "decoding", "encoding"),
    [(WAN_21, (720, 1280), 6.5, 9.6), (WAN_21, (480, 832), 2.85, 4.2), (WAN_22, (704, 1280), 6.1, 4.75)],
    ids=["2.1 at 720p", "2.1 at 480p", "2.2 at 704p"],
)
@torch.no_grad()
def test_native_sizes_take_no_more_than_told(
    config: WanVAEConfig, size: tuple[int, int], decoding: float, encoding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cuda(90):
        for dtype, factor in ((torch.bfloat16, 1), (torch.float32, 2)):
            made = codec(config, dtype, monkeypatch)
            latents = torch.empty(made.latent_shape(17, *size), device=CUDA)
            peak = peak_of(made.decode_float(latents, chunk=1), 4)
            assert 0.95 < peak / (decoding * factor) < 1
        frames = torch.empty(3, 17, *size, device=CUDA)
        peak = peak_of(made.encode_chunks(frames, chunk=1), 4)
        assert 0.95 < peak / encoding < 1


@torch.no_grad()
def test_nothing_but_what_encodes_and_decodes_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(90):
        made = codec(WAN_21, torch.bfloat16, monkeypatch)
        kinds = {
            name: {(p.device.type, p.dtype) for p in module.parameters()}
            for name, module in (("encoder", made.encoder), ("decoder", made.decoder), ("judge", made.vae.decoder))
        }
    assert kinds == {
        "encoder": {("cuda", torch.float32)},
        "decoder": {("cuda", torch.bfloat16)},
        "judge": {("cpu", torch.float32)},
    }
