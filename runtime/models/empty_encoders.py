"""Text and image encoders without memory, from their configs: for counting parameters and predicting peaks."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from .registry import ModelFolder

ARCHITECTURES = {  # component -> transformers' classes that may encode it, the first where a config names none
    "text_encoder": ("UMT5EncoderModel", "T5EncoderModel"),
    "image_encoder": ("CLIPVisionModel",),
}


def empty_encoder(folder: ModelFolder, part: str) -> Any:
    """Return transformers' module on `meta`, or None where the checkpoint has none.

    Raises ValueError for a config that transformers cannot build a known encoder from.
    """
    config = folder.encoders.get(part)
    return None if config is None else _made(part, json.dumps(config, sort_keys=True))


@cache
def _made(part: str, config: str) -> Any:
    import torch
    import transformers

    fields = json.loads(config)
    known = ARCHITECTURES[part]
    named = (fields.get("architectures") or known)[0]
    kind = known[0] if part == "image_encoder" else named  # CLIPVisionModelWithProjection and CLIPModel hold the tower
    if kind not in known:
        raise ValueError(f"{part} must be {' or '.join(known)}, got {named}")
    module_class = getattr(transformers, kind)
    try:
        with torch.device("meta"):
            return module_class(module_class.config_class.from_dict(fields)).eval()
    except Exception as error:  # transformers' validation has errors of its own kinds
        raise ValueError(f"{part}/config.json cannot be read: {' '.join(str(error).split())[:200]}") from error
