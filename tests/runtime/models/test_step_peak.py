"""What a step of the published models holds at its peak on CUDA, by fake tensors: what lives too long is seen here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.live_bytes import LiveBytes
from skylapse.kernels.patch_embed import Grid
from skylapse.kernels.weight_formats import FORMATS
from skylapse.runtime.models import wan
from skylapse.runtime.models.linear import Linear
from skylapse.runtime.models.wan import WanConfig, WanDenoiser
from skylapse.runtime.pack import Context, Pack

CUDA = torch.device("cuda", 0)
TEXT_ROWS = 101
CONFIGS = {
    "14B": dict(num_attention_heads=40, ffn_dim=13824),
    "5B": dict(num_attention_heads=24, ffn_dim=14336, in_channels=48, out_channels=48),
    "1.3B": dict(num_attention_heads=12, ffn_dim=8960),
}


def denoiser_of(model: str, quantize: str | None) -> WanDenoiser:
    """Two layers in bf16, whose peak is that of forty: what a block holds it gives back."""
    with torch.device("meta"):
        denoiser = WanDenoiser(WanConfig(num_layers=2, **CONFIGS[model]))  # type: ignore[arg-type]
    for name, parameter in list(denoiser.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        keep = any(part in name for part in denoiser.fp32_parameters)
        real = torch.empty(parameter.shape, device=CUDA, dtype=torch.float32 if keep else torch.bfloat16)
        setattr(denoiser.get_submodule(owner), leaf, nn.Parameter(real, requires_grad=False))
    if quantize is not None:
        for layer in denoiser.blocks.modules():
            if isinstance(layer, Linear):
                layer.keep_in(FORMATS[quantize], CUDA)
    return denoiser


def pack_of(denoiser: WanDenoiser, grid: Grid, num_sequences: int) -> tuple[Pack, list[Tensor]]:
    """Sequences of one grid of tokens, and their latents."""
    frames, height, width = grid
    n, heads = frames * height * width, denoiser.config.num_attention_heads
    num_tokens, num_rows = n * num_sequences, TEXT_ROWS * num_sequences

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    text = Context(
        empty(2, 2, num_rows, heads, 128),
        tuple(TEXT_ROWS * index for index in range(num_sequences + 1)),
        empty(num_rows, dtype=torch.float32),
    )
    pack = Pack(
        [grid] * num_sequences,
        tuple(n * index for index in range(num_sequences + 1)),
        empty(num_tokens, dtype=torch.int64),
        empty(num_tokens, 64, dtype=torch.complex64),
        text,
        None,
    )
    channels = denoiser.config.in_channels
    return pack, [empty(channels, frames, 2 * height, 2 * width, dtype=torch.float32) for _ in range(num_sequences)]


def peak_of(model: str, grid: Grid, quantize: str | None = None) -> float:
    """KB (1000 bytes) a token of a step of two sequences, beside weights and inputs."""
    with torch.inference_mode(), fake_cuda(90):
        denoiser = denoiser_of(model, quantize)
        pack, latents = pack_of(denoiser, grid, 2)
        timesteps = torch.empty(1, device=CUDA)
        with LiveBytes() as live:
            denoiser(pack, latents, timesteps)
    return live.peak_bytes / pack.num_tokens / 1000


NATIVE = {"480p": (21, 30, 52), "704p": (31, 22, 40), "720p": (21, 45, 80)}


@pytest.mark.parametrize(
    ("model", "size", "quantize", "kilobytes"),
    [
        # In bf16: 107.1, 107.1, 88.7, 51.8 before GELU was fused, dead tensors dropped and the feed-forward split.
        ("14B", "720p", None, 81.9),
        ("14B", "480p", None, 81.9),
        ("5B", "704p", None, 49.2),
        ("1.3B", "480p", None, 25.9),
        ("14B", "720p", "fp8", 81.9),
        ("5B", "704p", "fp8", 55.3),  # a byte an element of what the second product reads, beside its bf16
    ],
)
def test_a_step_holds_so_much_a_token(model: str, size: str, quantize: str | None, kilobytes: float) -> None:
    assert peak_of(model, NATIVE[size], quantize) == pytest.approx(kilobytes, rel=0.03)


@pytest.mark.parametrize("num_rows", [8, 9, 16, 20])
def test_a_feed_forward_in_parts_computes_what_the_whole_does(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn = wan.FeedForward(32, 64).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in ffn.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    x = torch.randn(num_rows, 32, generator=draw)
    whole, kept, seen = ffn(x), x.clone(), []
    monkeypatch.setattr(wan, "FFN_ROWS", 8)
    ffn.up.register_forward_hook(lambda layer, given, result: seen.append(len(given[0])))
    torch.testing.assert_close(ffn(x), whole, rtol=1e-5, atol=1e-4)
    assert seen == {8: [8], 9: [5, 4], 16: [8, 8], 20: [7, 7, 6]}[num_rows] and torch.equal(x, kept)
