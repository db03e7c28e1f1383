"""The configs that ship with the package are those of the published checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from skylapse.runtime.checkpoints.configs import parse_config
from skylapse.runtime.checkpoints.published import published
from skylapse.runtime.checkpoints.registry import ModelFolder, published_folder
from skylapse.runtime.families.wan.denoiser import WanConfig, WanDenoiser
from skylapse.runtime.memory.fit_report import precisions, rows_of
from skylapse.runtime.vae.wan import WanVAE, WanVAEConfig

GB = 10**9
NAMES = tuple(published())


def folder_of(name: str) -> ModelFolder:
    folder = published_folder(name)
    assert folder is not None
    return folder


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def same_component(kind: str) -> list[Any]:
    """One model for each config of a kind that differs."""
    seen: dict[str, str] = {}
    for name in NAMES:
        folder = folder_of(name)
        config = folder.vae if kind == "vae" else folder.transformer
        seen.setdefault(repr(config), name)
    return list(seen.values())


@pytest.mark.parametrize("name", same_component("transformer"))
def test_diffusers_builds_each_transformer_with_as_many_parameters(name: str) -> None:
    config = folder_of(name).transformer
    with torch.device("meta"):
        reference = WanTransformer3DModel.from_config(config)
        ours = WanDenoiser(parse_config(WanConfig, config, "transformer"))
    assert count(ours) == count(reference)
    assert {key: reference.config[key] for key in config if not key.startswith("_")} == {
        key: tuple(value) if isinstance(value, list) and isinstance(reference.config[key], tuple) else value
        for key, value in config.items()
        if not key.startswith("_")
    }


@pytest.mark.parametrize("name", same_component("vae"))
def test_diffusers_builds_each_vae_with_as_many_parameters(name: str) -> None:
    config = folder_of(name).vae
    with torch.device("meta"):
        reference = AutoencoderKLWan.from_config(config)
        ours = WanVAE(parse_config(WanVAEConfig, config, "vae"))
    assert count(ours) == count(reference)


def test_encoders_have_the_parameters_that_are_published() -> None:
    parts = {part: config for name in NAMES for part, config in folder_of(name).encoders.items()}
    with torch.device("meta"):
        text = transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(parts["text_encoder"]))
        images = transformers.CLIPVisionModel(transformers.CLIPVisionConfig.from_dict(parts["image_encoder"]))
    assert round(count(text) / 1e9, 2) == 5.68 and round(count(images) / 1e9, 2) == 0.63


def test_two_experts_are_those_of_wan_2_2() -> None:
    """Parameters in billions, of one expert."""
    found = {}
    for name in NAMES:
        folder = folder_of(name)
        with torch.device("meta"):
            denoiser = WanDenoiser(parse_config(WanConfig, folder.transformer, "transformer"))
        found[name.split("/")[1].removesuffix("iffusers").removesuffix("-D").removesuffix("-d")] = (
            len(folder.transformers),
            round(count(denoiser) / 1e9, 1),
        )
    assert found == {
        "Wan2.1-T2V-1.3B": (1, 1.4),
        "Wan2.1-T2V-14B": (1, 14.3),
        "Wan2.1-I2V-14B-480P": (1, 16.4),
        "Wan2.1-I2V-14B-720P": (1, 16.4),
        "Wan2.1-FLF2V-14B-720P": (1, 16.4),
        "Wan2.2-T2V-A14B": (2, 14.3),
        "Wan2.2-I2V-A14B": (2, 14.3),
        "Wan2.2-TI2V-5B": (1, 5.0),
    }


def test_a_card_that_is_too_small_says_what_would_fit() -> None:
    (precision,) = precisions(folder_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), (None,))
    (row,) = rows_of(precision, 6 * GB, offload="none")
    assert not row["fits"] and row["blocked_by"] is not None and row["nearest"] == [] and row["max_frames"] == 0
    (row,) = rows_of(precision, 20 * GB, offload="none")  # weights alone are 14.6 GB
    assert row["blocked_by"] == "decode" and row["max_frames"] == 0  # a shorter clip's frames are as large
    assert len(row["nearest"]) == 1 and row["nearest"][0].endswith("x81")
