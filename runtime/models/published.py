"""Configs of published checkpoints that ship with the package: what they need is known without their weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "published.json"


@cache
def published() -> dict[str, dict[str, Any]]:
    """Hub id -> its folder's JSON files as `ModelFolder` has them: index, transformers, vae, encoders, extra."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    components: dict[str, dict[str, Any]] = found["components"]
    models = {}
    for name, entry in found["models"].items():
        experts = ("transformer", "transformer_2")[: entry["experts"]]
        encoders = {part: components[entry[part]] for part in ("text_encoder", "image_encoder") if entry[part]}
        models[name] = {
            "index": entry["index"],
            "transformers": {expert: components[entry["transformer"]] for expert in experts},
            "vae": components[entry["vae"]],
            "encoders": encoders,
            "extra": {"native_sizes": entry["native_sizes"], "defaults": entry["defaults"]},
        }
    return models
