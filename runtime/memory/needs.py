"""Bytes that a request holds on the device between two steps, from shapes: latents, contexts, what caches keep."""

from __future__ import annotations

import math

import torch

from ..checkpoints.registry import ModelFolder
from ..families.wan.denoiser import WanConfig
from .fit import Needs, Size


def held_bytes(
    config: WanConfig,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    num_branches: int,
    text_rows: int,
    image_rows: int = 0,
    solver_order: int = 2,
    cached_latents: int = 0,
    cached_tokens: int = 0,
) -> int:
    """At most, of latents [C, T, H, W] `shape`.

    text_rows: of all prompts; image_rows: of all images that every block is shown. cached_*: how many latents and how
    many hidden states a branch a step cache keeps.
    """
    latent_bytes = 4 * math.prod(shape)
    token_bytes = num_tokens_of(config, shape) * config.dim * dtype.itemsize * num_branches
    num_latents = 4 + solver_order + math.ceil(config.in_channels / config.out_channels)
    # The encoders' rows, and an expert's keys and values of them, twice: a pack has its own. Images' rows are fp32.
    keys_values = 2 * 2 * config.num_layers * config.dim
    elements = text_rows * (config.text_dim + keys_values) + image_rows * (2 * (config.image_dim or 0) + keys_values)
    contexts = elements * dtype.itemsize
    # Of the pack's layout, by token: rotation in complex64, and which timestep it is at.
    contexts += num_tokens_of(config, shape) * num_branches * (4 * config.attention_head_dim + 8)
    return (num_latents + cached_latents) * latent_bytes + cached_tokens * token_bytes + contexts


def num_tokens_of(config: WanConfig, shape: tuple[int, int, int, int]) -> int:
    """Tokens of one branch of latents [C, T, H, W]."""
    return math.prod(side // patch for side, patch in zip(shape[1:], config.patch_size, strict=True))


def needs_of(folder: ModelFolder, config: WanConfig, size: Size, dtype: torch.dtype) -> Needs:
    """Of a guided request with prompts of any length, and an image where the model can be given one."""
    vae = folder.vae
    factor, frames = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    z_dim = vae.get("z_dim", 16)
    shape = (z_dim, (size.num_frames - 1) // frames + 1, size.height // factor, size.width // factor)
    encodes = folder.concatenates_image or folder.gives_frames
    num_images = 2 if folder.requires_last_image else 1
    clip = folder.encoders.get("image_encoder")
    image_rows = num_images * ((clip["image_size"] // clip["patch_size"]) ** 2 + 1) if clip else 0
    text_rows = 2 * (folder.limits.max_prompt_tokens + 1)
    held = held_bytes(config, shape, dtype, num_branches=2, text_rows=text_rows, image_rows=image_rows)
    return Needs(size, held, num_tokens_of(config, shape), 2, encodes)
