"""Modules of published shapes with random weights, made on their device, and checkpoint folders of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...kernels.weight_formats import FORMATS
from ...runtime.checkpoints.configs import parse_config
from ...runtime.checkpoints.published import component
from ...runtime.checkpoints.weights import allocate
from ...runtime.families.wan.denoiser import WanConfig, WanDenoiser
from ...runtime.layers.linear import Linear
from ...runtime.vae.wan import WanVAE, WanVAEConfig
from ..checkpoint_folder import INDEX, SCHEDULER, write_json, write_module

VAE_21, VAE_22 = (parse_config(WanVAEConfig, component(name), "vae") for name in ("wan2.1-vae", "wan2.2-vae"))


def denoiser(config: WanConfig, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> WanDenoiser:
    """Return a denoiser as the loader gives it: some parameters in fp32, the blocks' weights in 8 bits where asked."""
    with torch.device("meta"):
        module = WanDenoiser(config)
    allocate(module, device=device, dtype=dtype, fp32_parameters=WanDenoiser.fp32_parameters)
    _draw(module)
    if quantize is not None:
        for layer in [x for block in module.blocks for x in block.modules() if isinstance(x, Linear)]:
            rows = layer.weight.float()
            layer.keep_in(FORMATS[quantize], rows.device)
            layer.fill(0, rows)
    return module.requires_grad_(False).eval()


def vae(config: WanVAEConfig, device: torch.device, dtype: torch.dtype) -> WanVAE:
    with torch.device("meta"):
        module = WanVAE(config)
    allocate(module, device=device, dtype=dtype)
    _draw(module)
    return module.requires_grad_(False).eval()


def _drawn(name: str, like: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Under which activations keep their size: norms about 1, everything else by its number of inputs."""
    generator = torch.Generator(device).manual_seed(sum(name.encode()))
    x = torch.empty(like.shape, device=device, dtype=torch.float32).normal_(generator=generator)
    if "scale_shift_table" in name:
        x *= 0.5
    elif "gamma" in name or ("norm" in name and name.endswith("weight")):
        x = 1 + 0.1 * x
    elif name.endswith("bias"):
        x *= 0.02
    else:
        x /= max(1, like[0].numel()) ** 0.5
    return x.to(dtype)


def _draw(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.data.copy_(_drawn(name, parameter, parameter.device, parameter.dtype))


# --- a checkpoint folder ----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, wan: WanConfig, codec: WanVAEConfig, text: dict[str, Any], device: torch.device
) -> Path:
    """A folder in the published format. text: fields of UMT5's config; its vocabulary is the demo model's, of words."""
    from transformers import UMT5Config, UMT5EncoderModel

    from ..demo_model.text import build_tokenizer

    tokenizer = build_tokenizer()
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    transformer, coder = denoiser(wan, device, torch.bfloat16), vae(codec, device, torch.float32)
    write_module(folder / "transformer", transformer, asdict(wan))
    write_module(folder / "vae", coder, asdict(codec))
    config = UMT5Config(
        vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, **text
    )
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    tensors = {
        name: _drawn(name, value, device, torch.bfloat16).cpu()
        for name, value in encoder.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    }
    (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    write_json(folder / "text_encoder" / "config.json", {**config.to_dict(), "architectures": ["UMT5EncoderModel"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder
