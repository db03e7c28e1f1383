"""Count the bytes of a model's weights once they are loaded, from its configs and its files' headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...kernels.weight_formats import words
from ..checkpoints.configs import parse_config
from ..checkpoints.empty_encoders import empty_encoder
from ..checkpoints.registry import TRANSFORMER_CLASS, VAE_CLASS, ComponentReport, ModelFolder
from ..families.wan.denoiser import WanConfig, WanDenoiser
from ..layers.quantization import quantized_weights, refusal_of
from ..vae.wan import WanVAE, WanVAEConfig

FP32_COMPONENTS = ("vae", "image_encoder")  # whatever the engine's dtype is


def loaded_bytes(folder: ModelFolder, components: Sequence[ComponentReport]) -> dict[str, int]:
    """Return the bytes of all components together on the engine's device, by precision: "bf16", "bf16+fp8", ...

    Formats that the model's sides cannot be quantised to are left out.
    """
    return {
        "+".join(filter(None, (name, quantize))): _bytes(folder, components, dtype, quantize)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        for quantize in (None, *words()[1:])
        if quantize_refusal(folder, quantize) is None
    }


def quantize_refusal(folder: ModelFolder, quantize: str | None) -> str | None:
    """Return the reason why the experts' weights cannot be kept in a format, or None; they are all of one config."""
    return refusal_of(empty_denoiser(folder.transformer), quantize)


def empty_denoiser(fields: Mapping[str, Any]) -> WanDenoiser:
    """Return an expert on `meta`."""
    with torch.device("meta"):
        return WanDenoiser(parse_config(WanConfig, fields, "transformer"))


def part_bytes(
    folder: ModelFolder, dtype: torch.dtype, quantize: str | None, decoder_dtype: torch.dtype
) -> dict[str, int]:
    """Return the bytes on a device of each part that can be there by itself: encoders, experts, halves of the VAE."""
    parts = _encoder_parameters(folder)
    found = {name: num * (torch.float32 if name in FP32_COMPONENTS else dtype).itemsize for name, num in parts.items()}
    found |= {name: _expert_bytes(config, dtype, quantize) for name, config in folder.transformers.items()}
    with torch.device("meta"):
        vae = WanVAE(parse_config(WanVAEConfig, folder.vae, "vae"))
    halves = {"encoder": (vae.encoder, vae.quant_conv), "decoder": (vae.decoder, vae.post_quant_conv)}
    itemsizes = {"encoder": 4, "decoder": decoder_dtype.itemsize}
    for name, modules in halves.items():
        found[name] = itemsizes[name] * sum(p.numel() for module in modules for p in module.parameters())
    return found


def reports_of(folder: ModelFolder) -> list[ComponentReport]:
    """Return reports of the components of a checkpoint whose weights are not here."""
    with torch.device("meta"):
        modules = [
            (name, WanDenoiser(parse_config(WanConfig, config, name))) for name, config in folder.transformers.items()
        ]
        vae = WanVAE(parse_config(WanVAEConfig, folder.vae, "vae"))
    kinds = [*((name, TRANSFORMER_CLASS, module) for name, module in modules), ("vae", VAE_CLASS, vae)]
    counts = [(name, kind, sum(p.numel() for p in module.parameters())) for name, kind, module in kinds]
    for name, num_parameters in _encoder_parameters(folder).items():
        counts.append((name, type(empty_encoder(folder, name)).__name__, num_parameters))
    return [ComponentReport(name, kind, count, None, ()) for name, kind, count in counts]


def _encoder_parameters(folder: ModelFolder) -> dict[str, int]:
    """Return the number of each encoder's parameters."""
    modules = {part: empty_encoder(folder, part) for part in folder.encoders}
    return {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()}


def _bytes(folder: ModelFolder, components: Sequence[ComponentReport], dtype: torch.dtype, quantize: str | None) -> int:
    others = [part for part in components if part.name not in folder.transformers]
    kept_in = {part.name: torch.float32 if part.name in FP32_COMPONENTS else dtype for part in others}
    experts = sum(_expert_bytes(config, dtype, quantize) for config in folder.transformers.values())
    return experts + sum(part.num_parameters * kept_in[part.name].itemsize for part in others)


def _expert_bytes(config: Mapping[str, Any], dtype: torch.dtype, quantize: str | None) -> int:
    """Return the bytes of an expert by the loader's rule, on a module without memory."""
    denoiser = empty_denoiser(config)
    quantized = quantized_weights(denoiser, quantize)
    total = 0
    for name, parameter in denoiser.named_parameters():
        if name in quantized:
            num_outputs, num_inputs = parameter.shape
            total += quantized[name].num_bytes(num_outputs, num_inputs, dtype)
        else:
            keep = any(part in name for part in WanDenoiser.fp32_parameters)
            total += parameter.numel() * (4 if keep else dtype.itemsize)
    return total
