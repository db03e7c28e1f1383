"""The configs of text and image encoders, as far as they shape the parts that we read; no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.json_file import shown, typed, within

MAX_WIDTH = 2**17
TEXT_CLASSES = ("UMT5EncoderModel", "T5EncoderModel")
# The last two hold the tower beside a projection or a text model, which nothing here reads.
IMAGE_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
FEED_FORWARDS = ("relu", "gelu", "gelu_new", "silu")


@dataclass(frozen=True)
class TextEncoderConfig:
    """Fields of transformers' `UMT5Config` and `T5Config`, with the former's defaults."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str | None = None  # follows from the one before, but counts where it is given

    def __post_init__(self) -> None:
        within(self, 1, 2**24, "vocab_size")
        within(self, 1, MAX_WIDTH, "d_model", "d_kv", "d_ff")
        within(self, 1, 256, "num_layers")
        within(self, 1, 1024, "num_heads")
        within(self, 4, 4096, "relative_attention_num_buckets", even=True)  # halves are of the two directions
        within(self, self.relative_attention_num_buckets, 2**20, "relative_attention_max_distance")
        within(self, 0, 1, "dropout_rate")
        _check_epsilon("layer_norm_epsilon", self.layer_norm_epsilon)
        if self.dense_act_fn not in (None, *FEED_FORWARDS):
            raise ValueError(f"dense_act_fn must be {' or '.join(FEED_FORWARDS)}, got {shown(self.dense_act_fn)}")
        allowed = (*FEED_FORWARDS, *(f"gated-{name}" for name in FEED_FORWARDS))
        if self.feed_forward_proj not in allowed:
            raise ValueError(f"feed_forward_proj must be {' or '.join(allowed)}, got {shown(self.feed_forward_proj)}")


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Fields of transformers' `CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        within(self, 1, MAX_WIDTH, "hidden_size", "intermediate_size")
        within(self, 1, 256, "num_hidden_layers")
        within(self, 1, 1024, "num_attention_heads")
        within(self, 3, 3, "num_channels")
        within(self, 1, 4096, "image_size")
        within(self, 1, self.image_size, "patch_size")
        within(self, 0, 1, "attention_dropout")
        _check_epsilon("layer_norm_eps", self.layer_norm_eps)
        if self.hidden_size % self.num_attention_heads:
            heads = f"a divisor of hidden_size = {self.hidden_size}"
            raise ValueError(f"num_attention_heads must be {heads}, got {self.num_attention_heads}")
        allowed = ("quick_gelu", "gelu", "gelu_new", "relu", "silu")
        if self.hidden_act not in allowed:
            raise ValueError(f"hidden_act must be {' or '.join(allowed)}, got {shown(self.hidden_act)}")

    @property
    def num_rows(self) -> int:
        """Return the number of rows that an image becomes: its patches, and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


def _check_epsilon(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {value}")


def text_encoder_config(fields: Mapping[str, Any]) -> TextEncoderConfig:
    """Read the fields of text_encoder/config.json; ValueError names the field that is wrong."""
    return typed(TextEncoderConfig, fields, "text_encoder/config.json")


def image_encoder_config(fields: Mapping[str, Any]) -> ImageEncoderConfig:
    """Read the fields of image_encoder/config.json; ValueError names the field that is wrong."""
    return typed(ImageEncoderConfig, fields, "image_encoder/config.json")


def encoder_fields(part: str, fields: Mapping[str, Any], class_name: str | None = None) -> dict[str, Any]:
    """Return a config.json's fields without nulls; of a whole CLIP's, those of its vision tower.

    They are checked: ValueError names what is wrong. class_name: the part's in model_index.json, which counts before
    the config's own word, as in diffusers. The result's "architectures" names the class alone.
    """
    file, known = f"{part}/config.json", TEXT_CLASSES if part == "text_encoder" else IMAGE_CLASSES
    named = fields.get("architectures")
    if named is not None and not (isinstance(named, list) and named and all(isinstance(one, str) for one in named)):
        raise ValueError(f"{file}: architectures must be a list of texts, got {shown(named)}")
    found = class_name or (named or known)[0]
    if found not in known:
        raise ValueError(f"{part} must be {' or '.join(known)}, got {found}")
    vision = fields.get("vision_config")
    if part == "image_encoder" and vision is not None:
        if not isinstance(vision, dict):
            raise ValueError(f"{file}: vision_config must be an object, got {shown(vision)}")
        fields = vision
    given = {name: value for name, value in fields.items() if value is not None} | {"architectures": [found]}
    if part == "text_encoder":
        text_encoder_config(given)
    else:
        image_encoder_config(given)
    return given
