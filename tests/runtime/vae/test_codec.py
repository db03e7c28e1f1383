"""A clip's own chunks and tiles, decoding in bf16, states that are handed over, and a clip begun anew."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tiny import VAE_21, VAE_22, draw_weights
from torch import Tensor, nn

import skylapse.runtime.vae.wan as wan
from skylapse.compile.stream import States
from skylapse.kernels.conv3d import conv3d
from skylapse.runtime.checkpoints.hub import resolve_folder
from skylapse.runtime.checkpoints.registry import read_folder
from skylapse.runtime.core.config import Settings
from skylapse.runtime.models.model import load_codec
from skylapse.runtime.vae.codec import VideoCodec, decoder_dtype
from skylapse.runtime.vae.coders import decoder_of
from skylapse.runtime.vae.tiling import Tiling
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

CPU = torch.device("cpu")
STATISTICS = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0])


def codec_of(config: dict[str, object] = VAE_21, dtype: torch.dtype | None = None) -> VideoCodec:
    vae = draw_weights(WanVAE(WanVAEConfig(**(config | STATISTICS))), 0).requires_grad_(False)
    return VideoCodec(vae, device=CPU, decoder_dtype=dtype)


def latents(num_channels: int = 4, num_frames: int = 6, side: int = 6) -> Tensor:
    return torch.randn(num_channels, num_frames, side, side, generator=torch.Generator().manual_seed(3))


def pixels(num_frames: int = 13, side: int = 48) -> Tensor:
    return torch.rand(3, num_frames, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1


def whole(pieces: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(pieces), dim=1)


@pytest.mark.parametrize("config", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_results_do_not_depend_on_a_clips_chunk(config: dict[str, object]) -> None:
    codec = codec_of(config)
    frames, clip = whole(codec.decode_float(latents())), pixels()
    means = codec.encode(clip)
    for chunk in (1, 2, 5):
        pieces = list(codec.decode_float(latents(), chunk=chunk))
        assert [piece.shape[1] for piece in pieces[:2]] == [1, 4 * chunk]
        torch.testing.assert_close(torch.cat(pieces, dim=1), frames, rtol=0, atol=2e-5)
        torch.testing.assert_close(codec.encode(clip, chunk=chunk), means, rtol=0, atol=2e-5)


def test_a_clips_own_tiling_is_used() -> None:
    codec = codec_of()
    tiling = Tiling(tile=32, overlap=16, threshold=0)
    frames = whole(codec.decode_float(latents(), tiling=tiling))
    sizes: list[tuple[int, int]] = []
    codec.choose_decoder = lambda height, width: sizes.append((height, width)) or codec.decoder  # type: ignore
    codec.tiling = tiling
    assert torch.equal(whole(codec.decode_float(latents())), frames) and sizes == [(4, 4)]
    assert not torch.equal(codec_of().encode(pixels(), tiling=tiling), codec_of().encode(pixels()))


def test_tiles_are_as_the_operator_says() -> None:
    assert Tiling.of("auto") == Tiling()
    assert Tiling.of("none").size(4000, 4000, 8) == (4000, 4000)
    for side in (64, 80, 512):
        tiling = Tiling.of(side)
        assert tiling.size(side // 16, side // 16, 16) == (side // 16, side // 16)  # whole
        assert tiling.size(300, 300, 16) == (side // 16, side // 16)
        assert tiling.overlap % 16 == 0 and 0 < tiling.overlap <= side / 4


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [VAE_21, VAE_22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("part", ["decoder", "encoder"])
@torch.inference_mode()
def test_states_own_their_bytes_in_the_order_in_which_they_are_read(config: dict[str, object], part: str) -> None:
    codec = codec_of(config)
    pieces = (
        [latents()[None, :, :1], latents()[None, :, 1:3], latents()[None, :, 3:]]
        if part == "decoder"
        else [pixels()[None, :, :1], pixels()[None, :, 1:9], pixels()[None, :, 9:]]
    )
    states: States | None = None
    for piece in pieces:
        before = states
        _, states = getattr(codec, part)(piece, states)
        assert before is None or before == []  # handed over
        assert states
        for state in states:
            assert state.untyped_storage().nbytes() == state.nbytes
            assert state.is_contiguous(memory_format=torch.channels_last_3d), state.stride()
        assert len({state.untyped_storage().data_ptr() for state in states}) == len(states)


@torch.inference_mode()
def test_a_state_is_freed_before_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of()
    _, states = codec.decoder(latents()[None, :, :1], None)
    old = [weakref.ref(state) for state in states]
    alive: list[int] = []

    def watched(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        alive.append(sum(reference() is not None for reference in old))
        return conv3d(x, *args, **kwargs)

    monkeypatch.setattr(wan, "conv3d", watched)
    codec.decoder(latents()[None, :, 1:2], states)
    falls = [before - after for before, after in itertools.pairwise(alive)]
    assert alive[-1] == 0 and set(falls) <= {0, 1} and sum(falls) >= len(old) - 2


@pytest.mark.parametrize("part", ["decoder", "encoder"])
@torch.inference_mode()
def test_no_layer_loses_the_channels_last_order(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    for name, order in (
        ("conv3d", torch.channels_last_3d),
        ("upsample_conv2d", torch.channels_last),
        ("downsample_conv2d", torch.channels_last),
    ):
        function = getattr(wan, name)

        def watched(
            x: Tensor,
            *args: object,
            function: Callable[..., Tensor] = function,
            order: torch.memory_format = order,
            **kwargs: object,
        ) -> Tensor:
            y = function(x, *args, **kwargs)
            seen.extend(tensor.is_contiguous(memory_format=order) for tensor in (x, y))
            return y

        monkeypatch.setattr(wan, name, watched)
    for config in (VAE_21, VAE_22):
        codec = codec_of(config)
        if part == "decoder":
            list(codec.decode_float(latents(), chunk=2))
        else:
            codec.encode(pixels(), chunk=2)
    assert len(seen) > 100 and all(seen)


# --- short of memory --------------------------------------------------------------------------------------------------


class Short(nn.Module):
    """A coder that runs out of memory at some of its calls, in the middle: its states are gone by then."""

    def __init__(self, inner: nn.Module, fails_at: set[int]) -> None:
        super().__init__()
        self.inner, self.fails_at, self.chunks = inner, fails_at, list[int]()

    def forward(self, x: Tensor, states: States | None) -> tuple[Tensor, States]:
        self.chunks.append(x.shape[2])
        if len(self.chunks) in self.fails_at:
            if states is not None:
                states.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        result: tuple[Tensor, States] = self.inner(x, states)
        return result


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_decoding_that_runs_out_of_memory_begins_anew_and_repeats_no_frame(fails_at: int) -> None:
    codec = codec_of()
    expected = whole(codec.decode_float(latents(num_frames=8)))
    short = Short(codec.decoder, {fails_at})
    codec.choose_decoder = lambda height, width: short
    pieces = list(codec.decode_float(latents(num_frames=8), chunk=3))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=2e-5)
    assert short.chunks == [1, 3, 3][:fails_at] + [1] * 8


def test_encoding_that_runs_out_of_memory_begins_anew() -> None:
    codec = codec_of()
    expected = codec.encode(pixels())
    short = Short(codec.encoder, {2})
    codec.choose_encoder = lambda height, width: short
    torch.testing.assert_close(codec.encode(pixels()), expected, rtol=0, atol=2e-5)
    assert short.chunks == [1, 12, 1, 4, 4, 4]


def test_clip_that_fails_twice_or_otherwise_fails() -> None:
    codec = codec_of()
    short = Short(codec.decoder, {2, 4})
    codec.choose_decoder = lambda height, width: short
    with pytest.raises(torch.OutOfMemoryError):
        list(codec.decode_float(latents()))
    assert short.chunks == [1, 4, 1, 1]

    def broken(x: Tensor, states: States | None) -> tuple[Tensor, States]:
        raise RuntimeError("device-side assert")

    codec.choose_decoder = lambda height, width: broken
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(codec.decode_float(latents()))


# --- decoding in bf16 -------------------------------------------------------------------------------------------------


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Return (greatest difference in levels of 255, PSNR in dB) of frames in [-1, 1]."""
    error = ours.float().clamp(-1, 1) - theirs.float().clamp(-1, 1)
    return error.abs().max().item() * 127.5, 10 * math.log10(4 / error.square().mean().item())


def test_demo_decoded_in_bf16_is_within_five_levels_of_fp32() -> None:
    """Measured: 4.8 levels at the worst pixel, 56.4 dB."""
    folder = read_folder(resolve_folder("demo", None))
    exact, rounded = (load_codec(folder, CPU, replace(Settings(), decoder_dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert exact.decoder_dtype == torch.float32 and load_codec(folder, CPU, Settings()).decoder_dtype == torch.float32
    noise = torch.rand(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    clip = nn.functional.interpolate(noise, size=(17, 64, 64), mode="trilinear")[0] * 2 - 1
    z = exact.encode(clip)
    assert torch.equal(rounded.encode(clip), z)  # in fp32 as ever
    frames = whole(rounded.decode_float(z))
    assert frames.dtype == torch.bfloat16
    worst, psnr = difference(frames, whole(exact.decode_float(z)))
    assert worst < 7 and psnr > 54


def test_published_structure_decoded_in_bf16_is_within_five_levels_of_fp32() -> None:
    """Wan2.1's, with torch's initial weights. Measured: 3.5 levels at the worst pixel, 50.5 dB."""
    torch.manual_seed(0)
    config = WanVAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    vae = WanVAE(config).eval().requires_grad_(False)
    exact, rounded = (VideoCodec(vae, device=CPU, decoder_dtype=dtype) for dtype in (None, torch.bfloat16))
    z = latents(16, num_frames=2, side=4)
    expected = whole(exact.decode_float(z))
    worst, psnr = difference(whole(rounded.decode_float(z)), expected)
    assert expected.std() > 0.1 and worst < 7 and psnr > 47


@torch.inference_mode()
def test_norm_accumulates_in_fp32() -> None:
    """In bf16 a sum of 384 squares would stop to grow at 256 of them."""
    norm = wan.RMSNorm(384, 3).to(torch.bfloat16)
    x = (1 + torch.rand(1, 384, 1, 4, 4, generator=torch.Generator().manual_seed(5))).to(torch.bfloat16)
    exact = x.double() / x.double().square().mean(dim=1, keepdim=True).sqrt()
    assert ((norm(x).double() - exact) / exact).abs().max() < 2**-8  # the result's own rounding


def test_decoder_in_another_dtype_leaves_the_fp32_one_to_those_who_judge() -> None:
    exact, rounded = codec_of(), codec_of(dtype=torch.bfloat16)
    assert decoder_of(exact.vae).digest == decoder_of(rounded.vae).digest
    assert {p.dtype for p in rounded.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.decoder.parameters()} == {torch.bfloat16}
    ours = {p.data_ptr() for p in rounded.decoder.parameters()}
    assert not ours & {p.data_ptr() for p in rounded.vae.parameters()}
    assert {p.data_ptr() for p in exact.decoder.parameters()} < {p.data_ptr() for p in exact.vae.parameters()}


def test_auto_decodes_in_bf16_on_cuda_alone() -> None:
    assert decoder_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert decoder_dtype("auto", CPU) == torch.float32
    assert decoder_dtype("fp16", CPU) == torch.float16


def test_weights_that_are_moved_are_what_coding_reads() -> None:
    """A part is moved by its parameters' data: nothing may keep what a parameter held before."""
    codec = codec_of()
    frames, means = whole(codec.decode_float(latents())), codec.encode(pixels())
    works: dict[str, Callable[[], Tensor]] = {
        "decoder": lambda: whole(codec.decode_float(latents())),
        "encoder": lambda: codec.encode(pixels()),
    }
    for part, work in works.items():
        module: nn.Module = getattr(codec, part)
        kept = [parameter.data for parameter in module.parameters()]
        for parameter in module.parameters():
            parameter.data = torch.full_like(parameter.data, math.nan)
        assert work().isnan().all()
        for parameter, data in zip(module.parameters(), kept, strict=True):
            parameter.data = data.clone()
    assert torch.equal(whole(codec.decode_float(latents())), frames) and torch.equal(codec.encode(pixels()), means)
