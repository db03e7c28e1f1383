"""Tiny complete checkpoints of every Wan variant, in diffusers' folder format, with weights that can fail a test."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from skylapse.benchmarks.demo_model.text import TEXT_DIM, build_text_encoder, build_tokenizer
from skylapse.runtime.engine.memory import MemoryBudget

BASE = dict(
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=TEXT_DIM,
    freq_dim=32,
    ffn_dim=64,
    num_layers=2,
)
CLIP_ROWS = 17  # 16 patches and the class token
IMAGE = dict(in_channels=12, image_dim=20, added_kv_proj_dim=48)
VAE_21 = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True])
VAE_22 = dict(
    base_dim=8,
    decoder_base_dim=16,
    z_dim=4,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=1,
    temperal_downsample=[False, True, True],
    is_residual=True,
    patch_size=2,
    in_channels=12,
    out_channels=12,
    scale_factor_spatial=16,
)
# variant -> transformer config, VAE config, number of experts, pipeline options
VARIANTS: dict[str, tuple[dict, dict, int, dict]] = {
    "wan2.1-t2v": (BASE, VAE_21, 1, {}),
    "wan2.1-i2v": (BASE | IMAGE, VAE_21, 1, {}),
    "wan2.1-flf2v": (BASE | IMAGE | dict(pos_embed_seq_len=2 * CLIP_ROWS), VAE_21, 1, {}),
    "wan2.2-t2v-a14b": (BASE, VAE_21, 2, dict(boundary_ratio=0.875)),
    "wan2.2-i2v-a14b": (BASE | dict(in_channels=12), VAE_21, 2, dict(boundary_ratio=0.9)),
    "wan2.2-ti2v-5b": (BASE, VAE_22, 1, dict(expand_timesteps=True)),
}


def draw_weights(module: nn.Module, seed: int) -> nn.Module:
    """Weights under which every part matters (one small std would leave norms near 0 and attention uniform)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for name, p in module.named_parameters():
            if "scale_shift_table" in name:
                p.copy_(0.5 * randn(p))
            elif "gamma" in name or ("norm" in name and name.endswith("weight")):
                p.copy_(1 + 0.2 * randn(p))
            elif name.endswith("bias"):
                p.copy_(0.1 * randn(p))
            else:
                p.copy_(1.5 * randn(p) / max(1, p[0].numel()) ** 0.5)
    return module.eval()


def build_pipeline(variant: str, seed: int = 0) -> WanPipeline | WanImageToVideoPipeline:
    """diffusers' pipeline of a variant, random weights, on the CPU; seed: of the denoisers' weights."""
    transformer, vae, num_experts, options = VARIANTS[variant]
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    parts = dict(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)).eval(),
        vae=draw_weights(
            AutoencoderKLWan(**vae, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0]), 1
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
        transformer=draw_weights(WanTransformer3DModel(**transformer), 2 + 100 * seed),
    )
    if num_experts == 2:
        parts["transformer_2"] = draw_weights(WanTransformer3DModel(**transformer), 3 + 100 * seed)
    shows_images = "i2v" in variant or "flf2v" in variant
    if not shows_images or "ti2v" in variant:
        pipeline = WanPipeline(**parts, **options)
    else:
        if "image_dim" in transformer:
            config = CLIPVisionConfig(
                hidden_size=20,
                intermediate_size=40,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
            parts["image_encoder"] = draw_weights(CLIPVisionModel(config), 4)
            parts["image_processor"] = CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            )
        pipeline = WanImageToVideoPipeline(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_room(memory: MemoryBudget, available_bytes: int) -> MemoryBudget:
    """A budget that leaves so much for requests, their work and parts that move."""
    taken = memory.fitter.budget_bytes - memory.available_bytes
    return dataclasses.replace(memory, fitter=dataclasses.replace(memory.fitter, budget_bytes=taken + available_bytes))


def save_checkpoint(variant: str, folder: Path, seed: int = 0) -> Path:
    """A complete folder of a variant."""
    build_pipeline(variant, seed).save_pretrained(folder)
    return folder


def save_small_model(folder: Path, seed: int) -> Path:
    """A folder whose own sizes are small, so that a service makes its clips in a moment; seed: of its weights."""
    save_checkpoint("wan2.1-t2v", folder, seed)
    defaults = {"width": 64, "height": 64, "num_frames": 5, "fps": 8, "num_inference_steps": 2, "guidance_scale": 3.0}
    (folder / "skylapse.json").write_text(json.dumps({"native_sizes": [[64, 64]], "defaults": defaults}))
    return folder
