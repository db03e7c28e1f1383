"""Check that a folder can be loaded before any weight is read: `models inspect` asks it, and loading begins with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..cache.calibration import CalibrationFile, read_calibrations
from ..checkpoints.encoder_configs import image_encoder_config, text_encoder_config
from ..checkpoints.registry import ModelFolder
from .image_encoder import load_processor
from .parts import check_weights
from .text_encoder import load_tokenizer


@dataclass(frozen=True)
class Companions:
    """The parts that have no weights."""

    tokenizer: Any
    processor: Any  # of images; None where the model is shown none
    calibrations: CalibrationFile


def check_loadable(folder: ModelFolder) -> Companions:
    """Read all but the weights, whose names and shapes are checked; ValueError names the part and what is wrong."""
    check_weights(folder)
    text, image = folder.encoders["text_encoder"], folder.encoders.get("image_encoder")
    return Companions(
        tokenizer=load_tokenizer(folder.path, text_encoder_config(text).vocab_size),
        processor=None if image is None else load_processor(folder.path, image_encoder_config(image).image_size),
        calibrations=read_calibrations(folder.path),
    )
