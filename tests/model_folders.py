"""Changes to the JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRANSFORMER, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
TEXT, IMAGE, INDEX, CARD = "text_encoder/config.json", "image_encoder/config.json", "model_index.json", "skylapse.json"


def set_fields(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))
