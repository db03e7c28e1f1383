"""The denoiser on packed tokens equals WanTransformer3DModel, alone and in mixed packs, for every variant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compare import TOLERANCES, relative_l2
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny import BASE, CLIP_ROWS, IMAGE, draw_weights
from torch import nn

from skylapse.runtime.checkpoints.configs import parse_config
from skylapse.runtime.checkpoints.published import component
from skylapse.runtime.checkpoints.weights import check_keys, load_weights, slots
from skylapse.runtime.families.wan.denoiser import WanConfig, WanDenoiser
from skylapse.runtime.layers.pack import Sequence, build_pack
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig, checkpoint_name

CPU = torch.device("cpu")
SHAPES = ((3, 8, 12), (1, 6, 4), (5, 4, 4))
PROMPT_ROWS = (7, 512, 1)
TIMESTEPS = (900.0, 37.0, 500.0)
OPTIONS = {
    "plain": BASE,
    "image": BASE | IMAGE,
    "first and last image": BASE | IMAGE | dict(pos_embed_seq_len=2 * CLIP_ROWS),
    "no cross norm": BASE | dict(cross_attn_norm=False),
    "tall patch": BASE | dict(patch_size=(1, 1, 2)),
}


@pytest.fixture(params=OPTIONS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[WanTransformer3DModel, WanDenoiser]]:
    config = OPTIONS[request.param]
    reference = draw_weights(WanTransformer3DModel(**config), 0)
    reference.save_pretrained(tmp_path)
    with torch.inference_mode():
        yield reference, load(tmp_path, config)


def load(folder: Path, config: dict) -> WanDenoiser:
    with torch.device("meta"):
        denoiser = WanDenoiser(WanConfig(**config))
    load_weights(denoiser, folder, device=CPU, dtype=torch.float32, fp32_parameters=denoiser.fp32_parameters)
    return denoiser


def inputs(config: WanConfig) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
    """Latents and prompt rows of three sequences, and CLIP rows."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(config.in_channels, *shape, generator=generator) for shape in SHAPES]
    prompts = [torch.randn(rows, config.text_dim, generator=generator) for rows in PROMPT_ROWS]
    num_images = 2 if config.pos_embed_seq_len else 1
    rows = torch.randn(num_images, CLIP_ROWS, config.image_dim, generator=generator) if config.image_dim else None
    return latents, prompts, rows


def reference_velocity(
    model: WanTransformer3DModel,
    latents: torch.Tensor,
    prompt: torch.Tensor,
    timestep: torch.Tensor,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    padded = torch.zeros(1, 512, prompt.shape[1])
    padded[0, : len(prompt)] = prompt
    return model(latents[None], timestep, padded, rows, return_dict=False)[0][0]


def grid_of(latents: torch.Tensor, config: WanConfig) -> tuple[int, int, int]:
    t, h, w = (length // p for length, p in zip(latents.shape[1:], config.patch_size, strict=True))
    return t, h, w


def test_three_sequences_of_different_shapes_share_a_pack(pair: tuple[WanTransformer3DModel, WanDenoiser]) -> None:
    reference, denoiser = pair
    latents, prompts, rows = inputs(denoiser.config)
    expected = [
        reference_velocity(reference, x, prompt, torch.tensor([t]), rows)
        for x, prompt, t in zip(latents, prompts, TIMESTEPS, strict=True)
    ]
    image = None if rows is None else denoiser.encode_image(rows.flatten(0, 1))
    sequences = [
        Sequence(grid_of(x, denoiser.config), (i,) * x.shape[1], denoiser.encode_text(prompt), image)
        for i, (x, prompt) in enumerate(zip(latents, prompts, strict=True))
    ]
    pack = build_pack(sequences, denoiser.config.attention_head_dim, CPU)
    for ours, theirs in zip(denoiser(pack, latents, torch.tensor(TIMESTEPS)), expected, strict=True):
        assert relative_l2(ours, theirs) < TOLERANCES[torch.float32]


def test_a_timestep_per_frame_equals_the_reference_per_token(pair: tuple[WanTransformer3DModel, WanDenoiser]) -> None:
    reference, denoiser = pair
    latents, prompts, rows = inputs(denoiser.config)
    x, prompt = latents[0], prompts[0]
    t, h, w = grid_of(x, denoiser.config)
    per_token = torch.tensor([0.0] + [640.0] * (t - 1)).repeat_interleave(h * w)[None]
    expected = reference_velocity(reference, x, prompt, per_token, rows)
    image = None if rows is None else denoiser.encode_image(rows.flatten(0, 1))
    sequence = Sequence((t, h, w), (1,) + (0,) * (t - 1), denoiser.encode_text(prompt), image)
    pack = build_pack([sequence], denoiser.config.attention_head_dim, CPU)
    (ours,) = denoiser(pack, [x], torch.tensor([640.0, 0.0]))
    assert relative_l2(ours, expected) < TOLERANCES[torch.float32]


def test_bf16_stays_within_its_noise_of_the_reference(tmp_path: Path) -> None:
    reference = draw_weights(WanTransformer3DModel(**BASE), 0)
    reference.save_pretrained(tmp_path)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.device("meta"):
        denoiser = WanDenoiser(WanConfig(**BASE))
    load_weights(denoiser, tmp_path, device=CPU, dtype=torch.bfloat16, fp32_parameters=denoiser.fp32_parameters)
    assert denoiser.blocks[0].norm2.weight.dtype == torch.float32
    latents, prompts, _ = inputs(denoiser.config)
    x, prompt = latents[0].bfloat16(), prompts[0].bfloat16()
    with torch.inference_mode():
        padded = torch.zeros(1, 512, 64, dtype=torch.bfloat16)
        padded[0, : len(prompt)] = prompt
        theirs = half(x[None], torch.tensor([500.0]), padded, return_dict=False)[0][0].float()
        exact = reference_velocity(reference, x.float(), prompt.float(), torch.tensor([500.0]), None)
        sequence = Sequence(grid_of(x, denoiser.config), (0,) * x.shape[1], denoiser.encode_text(prompt))
        (ours,) = denoiser(build_pack([sequence], 24, CPU), [x], torch.tensor([500.0]))
    assert relative_l2(ours.float(), exact) < 1.5 * relative_l2(theirs, exact)


def test_dropping_the_folded_padding_would_be_seen(tmp_path: Path) -> None:
    reference = draw_weights(WanTransformer3DModel(**BASE), 0)
    reference.save_pretrained(tmp_path)
    denoiser = load(tmp_path, BASE)
    latents, prompts, _ = inputs(denoiser.config)
    x, prompt = latents[0], prompts[0]
    with torch.inference_mode():
        expected = reference_velocity(reference, x, prompt, torch.tensor([500.0]), None)
        text = denoiser.encode_text(prompt)
        bare = type(text)(text.keys_values[:, :, :-1], text.key_bias[:-1])
        sequence = Sequence(grid_of(x, denoiser.config), (0,) * x.shape[1], bare)
        (ours,) = denoiser(build_pack([sequence], 24, CPU), [x], torch.tensor([500.0]))
    assert relative_l2(ours, expected) > 1e-2


PUBLISHED_TRANSFORMERS = ("wan-1.3b", "wan-14b", "wan-14b-i2v", "wan-14b-flf2v", "wan-a14b-i2v", "wan-5b")
PUBLISHED_VAES = ("wan2.1-vae", "wan2.2-vae")


def published_headers(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(p.shape), "F32") for name, p in module.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_published_transformers_map_every_key(name: str) -> None:
    config = component(name)
    with torch.device("meta"):
        headers = published_headers(WanTransformer3DModel(**config))
        places = slots(WanDenoiser(parse_config(WanConfig, config, "transformer")))
    check_keys(places, headers, Path(name), ())
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.attn2\.norm_added_q\.weight"):
        check_keys(places, headers | {"blocks.0.attn2.norm_added_q.weight": ((1,), "F32")}, Path(name), ())
    check_keys(
        places, headers | {"blocks.0.attn2.norm_added_q.weight": ((1,), "F32")}, Path(name), WanDenoiser.unexpected_keys
    )


@pytest.mark.parametrize("name", PUBLISHED_VAES)
def test_published_vaes_map_every_key(name: str) -> None:
    config = component(name)
    with torch.device("meta"):
        headers = published_headers(AutoencoderKLWan(**config))
        places = slots(WanVAE(parse_config(WanVAEConfig, config, "vae")), checkpoint_name)
    check_keys(places, headers, Path(name), ())
