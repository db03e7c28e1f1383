"""Build text and image encoders without memory, from their configs: to be filled, counted, or run for their peaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from .encoder_configs import encoder_fields
from .registry import ModelFolder


def empty_encoder(folder: ModelFolder, part: str) -> Any:
    """Return transformers' module on `meta`, or None where the checkpoint has none; the next call gives the same one.

    Raises ValueError for a config that transformers cannot build a known encoder from.
    """
    config = folder.encoders.get(part)
    return None if config is None else _made(part, json.dumps(config, sort_keys=True))


@cache
def _made(part: str, config: str) -> Any:
    return build_encoder(part, encoder_fields(part, json.loads(config)))


def build_encoder(part: str, fields: Mapping[str, Any]) -> Any:
    """Return transformers' module on `meta`, for the fields that `encoder_fields` gives."""
    import torch
    import transformers

    name = "CLIPVisionModel" if part == "image_encoder" else fields["architectures"][0]  # the tower, whatever is around
    module_class = getattr(transformers, name)
    try:
        with torch.device("meta"):
            return module_class(module_class.config_class.from_dict(dict(fields))).eval()
    except Exception as error:  # transformers' validation has errors of its own kinds
        raise ValueError(f"{part}/config.json cannot be read: {' '.join(str(error).split())[:200]}") from error
