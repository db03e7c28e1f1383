"""Configs of published checkpoints that ship with the package: what they need is known without their weights."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "published.json"


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def component(name: str) -> dict[str, Any]:
    """The config.json of a published component: wan-1.3b, wan2.1-vae, umt5-xxl, ..."""
    config: dict[str, Any] = _file()["components"][name]
    return config


@cache
def published() -> dict[str, dict[str, Any]]:
    """Hub id -> its folder's JSON files as `ModelFolder` has them: index, transformers, vae, encoders, extra."""
    models = {}
    for name, entry in _file()["models"].items():
        experts = ("transformer", "transformer_2")[: entry["experts"]]
        encoders = {part: component(entry[part]) for part in ("text_encoder", "image_encoder") if entry[part]}
        models[name] = {
            "index": entry["index"],
            "transformers": {expert: component(entry["transformer"]) for expert in experts},
            "vae": component(entry["vae"]),
            "encoders": encoders,
            "extra": {"native_sizes": entry["native_sizes"], "defaults": entry["defaults"]},
        }
    return models
