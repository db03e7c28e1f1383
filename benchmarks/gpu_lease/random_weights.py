"""Modules of published shapes with random weights, made on their device, and checkpoint folders of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...kernels.weight_formats import FORMATS
from ...runtime.models.checkpoint import slots
from ...runtime.models.linear import Linear
from ...runtime.models.wan import WanConfig, WanDenoiser
from ...runtime.vae.wan import WanVAE, WanVAEConfig, checkpoint_name

Module = TypeVar("Module", bound=nn.Module)
WEIGHTS = "diffusion_pytorch_model.safetensors"

VAE_21 = WanVAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
VAE_22 = WanVAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    latents_mean=(0.0,) * 48,
    latents_std=(1.0,) * 48,
)
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "disable_corrector": [],
}
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.33.0",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def denoiser(config: WanConfig, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> WanDenoiser:
    """As the loader has one: some parameters in fp32, and the blocks' weights in 8 bits where asked."""
    with torch.device("meta"):
        module = WanDenoiser(config)
    for name, parameter in list(module.named_parameters()):
        keep = any(part in name for part in WanDenoiser.fp32_parameters)
        _place(module, name, _drawn(name, parameter, device, torch.float32 if keep else dtype))
    if quantize is not None:
        for layer in [x for block in module.blocks for x in block.modules() if isinstance(x, Linear)]:
            rows = layer.weight.float()
            layer.keep_in(FORMATS[quantize], rows.device)
            layer.fill(0, rows)
    return module.requires_grad_(False).eval()


def vae(config: WanVAEConfig, device: torch.device, dtype: torch.dtype) -> WanVAE:
    with torch.device("meta"):
        module = WanVAE(config)
    for name, parameter in list(module.named_parameters()):
        _place(module, name, _drawn(name, parameter, device, dtype))
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


def _place(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


# --- a checkpoint folder ----------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, wan: WanConfig, codec: WanVAEConfig, text: dict[str, Any], device: torch.device
) -> Path:
    """A folder in the published format. text: fields of UMT5's config; its vocabulary is the demo model's, of words."""
    from transformers import UMT5Config, UMT5EncoderModel

    from ..demo_model.text import build_tokenizer

    tokenizer = build_tokenizer()
    _write_json(folder / "model_index.json", INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    transformer, coder = denoiser(wan, device, torch.bfloat16), vae(codec, device, torch.float32)
    _write_module(folder / "transformer", transformer, "WanTransformer3DModel", asdict(wan))
    _write_module(folder / "vae", coder, "AutoencoderKLWan", asdict(codec))
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
    _write_json(folder / "text_encoder" / "config.json", {**config.to_dict(), "architectures": ["UMT5EncoderModel"]})
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _write_module(folder: Path, module: WanVAE | WanDenoiser, class_name: str, config: dict[str, Any]) -> None:
    """The loader's mapping of names, the other way."""
    places = slots(module, checkpoint_name) if isinstance(module, WanVAE) else slots(module)
    parameters, tensors = dict(module.named_parameters()), dict[str, Tensor]()
    for name, slot in places.items():
        value = parameters[slot.parameter][slot.rows]
        if isinstance(module, WanDenoiser) and name == "patch_embedding.weight":
            value = value.view(len(value), module.config.in_channels, *module.config.patch_size)
        tensors[name] = value.contiguous().cpu().clone()
    _write_json(folder / "config.json", {"_class_name": class_name, "_diffusers_version": "0.33.0"} | config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
