"""The parts of a model as they are loaded: modules without memory, and their weights' names in the folder's files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.configs import parse_config
from ..checkpoints.empty_encoders import build_encoder
from ..checkpoints.registry import ModelFolder
from ..checkpoints.weights import ENCODER_WEIGHTS, WEIGHTS, check_keys, has_weights, load_weights, slots, tensor_headers
from ..families.wan.config import WanConfig
from ..families.wan.denoiser import WanDenoiser
from ..layers.quantization import quantized_weights
from ..vae.wan import WanVAE, checkpoint_name
from ..vae.wan_config import WanVAEConfig

# One parameter; published checkpoints hold it under one of the names or under both.
SHARED, EMBED_TOKENS = "shared.weight", "encoder.embed_tokens.weight"
TOWER = "vision_model."  # before the names of a vision tower's weights, where a CLIP has more than it
# Left over in files of whole models: T5's decoder, CLIP's text model and projections; transformers ignores them too.
REST_OF_T5 = (EMBED_TOKENS, "decoder.", "lm_head.")
REST_OF_CLIP = ("visual_projection", "text_projection", "text_model.", "logit_scale", "position_ids")

Rename = Callable[[str], str]  # our name of a parameter -> the checkpoint's


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part's module, on `meta`, and the place of its weights.

    rename_for: takes the names in the file, and returns what turns our names of parameters into them.
    """

    name: str
    module: Any
    stem: str = WEIGHTS
    rename_for: Callable[[Collection[str]], Rename] = lambda names: lambda name: name
    fp32_parameters: Sequence[str] = ()
    unexpected_keys: Sequence[str] = ()


def expert_part(name: str, fields: Mapping[str, Any]) -> Part:
    """Return a denoiser of these config fields."""
    with torch.device("meta"):
        module = WanDenoiser(parse_config(WanConfig, fields, name))
    return Part(
        name=name,
        module=module,
        fp32_parameters=WanDenoiser.fp32_parameters,
        unexpected_keys=WanDenoiser.unexpected_keys,
    )


def vae_part(fields: Mapping[str, Any]) -> Part:
    """Return a VAE of these config fields."""
    with torch.device("meta"):
        module = WanVAE(parse_config(WanVAEConfig, fields, "vae"))
    return Part(name="vae", module=module, rename_for=lambda names: checkpoint_name)


def text_encoder_part(fields: Mapping[str, Any]) -> Part:
    """Return a text encoder of these config fields, which `encoder_fields` has checked."""
    model = build_encoder("text_encoder", fields)
    model.set_input_embeddings(model.shared)  # its two names are of one module
    return Part(
        name="text_encoder",
        module=model,
        stem=ENCODER_WEIGHTS,
        rename_for=lambda names: lambda name: EMBED_TOKENS if name == SHARED and SHARED not in names else name,
        unexpected_keys=REST_OF_T5,
    )


def image_encoder_part(fields: Mapping[str, Any]) -> Part:
    """Return an image encoder of these config fields: the vision tower, whatever else its files hold."""

    def rename_for(names: Collection[str]) -> Rename:
        prefix = TOWER if any(name.startswith(TOWER) for name in names) else ""
        return lambda name: prefix + name

    return Part(
        name="image_encoder",
        module=build_encoder("image_encoder", fields),
        stem=ENCODER_WEIGHTS,
        rename_for=rename_for,
        unexpected_keys=REST_OF_CLIP,
    )


def parts_of(folder: ModelFolder) -> Iterator[Part]:
    """Yield every part that has weights, one after the other."""
    for name, fields in folder.transformers.items():
        yield expert_part(name, fields)
    yield vae_part(folder.vae)
    if "text_encoder" in folder.encoders:
        yield text_encoder_part(folder.encoders["text_encoder"])
    if "image_encoder" in folder.encoders:
        yield image_encoder_part(folder.encoders["image_encoder"])


def check_weights(folder: ModelFolder) -> None:
    """Raise ValueError naming a part whose files are missing or do not fit its config; only their headers are read."""
    for part in parts_of(folder):
        path = folder.path / part.name
        headers = tensor_headers(path, part.stem)
        places = slots(part.module, part.rename_for(headers))
        check_keys(places, headers, path, part.unexpected_keys)


def holds_weights(folder: ModelFolder) -> bool:
    """Return whether the folder was meant to be loaded from: one of JSON files alone only describes a model."""
    return any(has_weights(folder.path / part) for part in (*folder.transformers, "vae", *folder.encoders))


def load_part(
    part: Part, path: Path, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> nn.Module:
    """Fill a part's module from its folder's files; ValueError names what does not fit."""
    module: nn.Module = part.module
    load_weights(
        module,
        path,
        device=device,
        dtype=dtype,
        stem=part.stem,
        fp32_parameters=part.fp32_parameters,
        unexpected_keys=part.unexpected_keys,
        rename=part.rename_for(tensor_headers(path, part.stem)),
        quantized=quantized_weights(module, quantize),
    )
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            assert name == "position_ids", name  # the only kind that an encoder has, and it is in no file
            setattr(owner, name, torch.arange(buffer.shape[-1], device=device)[None])
    return module
