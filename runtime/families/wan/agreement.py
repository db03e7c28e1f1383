"""Check that the configs of a model's parts belong together: each part gives what the next one takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from ...checkpoints.encoder_configs import ImageEncoderConfig, TextEncoderConfig
from ...core.json_file import shown
from ...vae.wan_config import WanVAEConfig
from .config import WanConfig


def check_agreement(
    experts: Mapping[str, WanConfig],
    vae: WanVAEConfig,
    text_encoder: TextEncoderConfig,
    image_encoder: ImageEncoderConfig | None,
    expand_timesteps: bool,
) -> None:
    """Raise ValueError naming the file, the field that does not go with another part's, and a value that would."""
    (name, config), *others = experts.items()
    for other, second in others:
        for field in fields(config):
            ours, theirs = getattr(config, field.name), getattr(second, field.name)
            if ours != theirs:
                _refuse(f"{other}/config.json", field.name, theirs, ours, f"as in {name}")
    file = f"{name}/config.json"
    plain, concatenated = vae.z_dim, 2 * vae.z_dim + vae.scale_factor_temporal
    if config.out_channels != vae.z_dim:
        _refuse(file, "out_channels", config.out_channels, vae.z_dim, "the VAE's z_dim")
    if config.in_channels not in (plain, concatenated):
        allowed = f"{plain}, or {concatenated} where an image is given in channels beside the latents"
        raise ValueError(f"{file}: in_channels must be {allowed}, got {config.in_channels}")
    if config.in_channels == plain and config.image_dim is not None:
        raise ValueError(f"{file}: image_dim must be null beside in_channels = {plain}, got {config.image_dim}")
    if config.in_channels == concatenated and expand_timesteps:
        raise ValueError(
            f"model_index.json: expand_timesteps must be false with in_channels = {concatenated}, got true"
        )
    if config.text_dim != text_encoder.d_model:
        _refuse(file, "text_dim", config.text_dim, text_encoder.d_model, "the text encoder's d_model")
    if image_encoder is None:
        return
    if config.image_dim != image_encoder.hidden_size:
        _refuse(file, "image_dim", config.image_dim, image_encoder.hidden_size, "the image encoder's hidden_size")
    rows = 2 * image_encoder.num_rows
    if config.pos_embed_seq_len not in (None, rows):
        whose = "the image encoder's rows of two images"
        _refuse(file, "pos_embed_seq_len", config.pos_embed_seq_len, rows, whose)


def _refuse(file: str, field: str, got: object, wanted: object, whose: str) -> None:
    raise ValueError(f"{file}: {field} must be {shown(wanted)}, {whose}, got {shown(got)}")
