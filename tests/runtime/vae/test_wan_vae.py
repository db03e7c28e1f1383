"""The streaming VAE equals AutoencoderKLWan, in chunks of any length, tiled or not, in constant memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from compare import TOLERANCES, relative_l2
from diffusers import AutoencoderKLWan
from tiny import VAE_21, VAE_22, draw_weights

from skylapse.runtime.vae.codec import VideoCodec
from skylapse.runtime.vae.tiling import Tiling
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

CONFIGS = {
    "2.1": VAE_21,
    "2.2": VAE_22,
    "three levels": dict(base_dim=16, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=2, temperal_downsample=[True, True]),
}
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 0.7, 1.1, 2.0]


def build(name: str) -> tuple[AutoencoderKLWan, WanVAE]:
    config = CONFIGS[name] | dict(latents_mean=MEAN, latents_std=STD)
    if name == "three levels":
        config["scale_factor_spatial"] = 4
    reference = draw_weights(AutoencoderKLWan(**config), 0)
    vae = WanVAE(WanVAEConfig(**config)).eval().requires_grad_(False)
    weights = {key.replace(".resample.1.", ".resample."): value for key, value in reference.state_dict().items()}
    vae.load_state_dict(weights)
    return reference, vae


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKLWan, WanVAE]:
    return build(str(request.param))


def clip(num_frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(3, num_frames, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def codec(vae: WanVAE, chunk: int = 4, tiling: Tiling | None = None) -> VideoCodec:
    return VideoCodec(vae, device=torch.device("cpu"), chunk=chunk, tiling=tiling)


@torch.inference_mode()
def test_encoding_equals_the_reference(pair: tuple[AutoencoderKLWan, WanVAE]) -> None:
    reference, vae = pair
    frames = clip(13)
    expected = reference.encode(frames[None]).latent_dist.mode()[0]
    shape = (-1, 1, 1, 1)
    ours = codec(vae).encode(frames) * torch.tensor(STD).view(shape) + torch.tensor(MEAN).view(shape)
    assert relative_l2(ours, expected) < TOLERANCES[torch.float32]


@torch.inference_mode()
def test_decoding_equals_the_reference_whatever_the_chunk(pair: tuple[AutoencoderKLWan, WanVAE]) -> None:
    reference, vae = pair
    factor = reference.config.scale_factor_spatial
    latents = torch.randn(4, 6, 64 // factor, 96 // factor, generator=torch.Generator().manual_seed(3))
    z = latents * torch.tensor(STD).view(-1, 1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1, 1)
    expected = reference.decode(z[None]).sample[0]
    for chunk in (1, 2, 3, 5):
        ours = torch.cat(list(codec(vae, chunk).decode_float(latents)), dim=1).clamp(-1, 1)
        assert relative_l2(ours, expected) < TOLERANCES[torch.float32]


def test_a_lone_frame_survives(pair: tuple[AutoencoderKLWan, WanVAE]) -> None:
    _, vae = pair
    latents = codec(vae).encode(np.zeros((1, 64, 64, 3), dtype=np.uint8))
    assert latents.shape[1] == 1
    assert np.concatenate(list(codec(vae).decode(latents))).shape == (1, 64, 64, 3)


def test_encode_refuses_a_clip_that_is_not_4k_plus_1() -> None:
    _, vae = build("2.1")
    with pytest.raises(ValueError, match=r"num_frames must be 4k\+1 to be encoded, got 6"):
        codec(vae).encode(clip(6))
    with pytest.raises(ValueError, match="sides must be multiples of 8 to be encoded, got 60 x 96"):
        codec(vae).encode(clip(5, height=60))


@torch.inference_mode()
def test_tiles_blend_into_the_whole_frame() -> None:
    """Mid attention sees a whole tile, so tiles differ from the whole; without it seams alone would."""
    _, vae = build("2.1")
    torch.nn.init.zeros_(vae.decoder.mid_block.attentions[0].proj.weight)
    latents = torch.randn(4, 3, 24, 40, generator=torch.Generator().manual_seed(4))
    whole = torch.cat(list(codec(vae).decode_float(latents)), dim=1)
    tiling = Tiling(tile=128, overlap=64, threshold=0)
    tiled = torch.cat(list(codec(vae, chunk=1, tiling=tiling).decode_float(latents)), dim=1)
    assert tiled.shape == whole.shape
    assert relative_l2(tiled, whole) < 0.1
    hard = torch.cat(
        list(codec(vae, chunk=1, tiling=Tiling(tile=128, overlap=1, threshold=0)).decode_float(latents)), dim=1
    )
    assert relative_l2(tiled, whole) < 0.5 * relative_l2(hard, whole)  # the overlap is what hides the seams


@torch.inference_mode()
def test_encoded_tiles_blend_into_the_whole_frame() -> None:
    _, vae = build("2.1")
    torch.nn.init.zeros_(vae.encoder.mid_block.attentions[0].proj.weight)
    frames = clip(5, height=128, width=192)
    whole = codec(vae).encode(frames)
    tiled = codec(vae, chunk=1, tiling=Tiling(tile=96, overlap=64, threshold=0)).encode(frames)
    assert tiled.shape == whole.shape and relative_l2(tiled, whole) < 0.15


def test_tiles_cover_every_latent_and_overlap() -> None:
    tiling = Tiling(tile=64, overlap=16, threshold=0)
    for length in range(1, 60):
        spans = tiling.spans(length, 8)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(later[0] < earlier[1] for earlier, later in itertools.pairwise(spans))


@torch.inference_mode()
def test_states_do_not_grow_with_the_clip() -> None:
    _, vae = build("2.1")
    latents = torch.randn(1, 4, 9, 8, 8, generator=torch.Generator().manual_seed(5))
    _, states = vae.decode_chunk(latents[:, :, :1])
    sizes = []
    for index in range(1, 9, 2):
        _, states = vae.decode_chunk(latents[:, :, index : index + 2], states)
        sizes.append([state.numel() for state in states])
    assert all(size == sizes[0] for size in sizes)
