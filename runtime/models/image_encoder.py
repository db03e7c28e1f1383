"""An image -> CLIP rows, for checkpoints that cross-attend to them (Wan2.1 image-to-video)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .text_encoder import load_transformers_model


class ImageEncoder:
    """CLIP's vision tower and its preprocessing, both read by transformers."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        """Read `image_encoder/` and `image_processor/` of a checkpoint folder."""
        from transformers import CLIPImageProcessorPil, CLIPVisionModel  # the one that needs no torchvision

        model = load_transformers_model(CLIPVisionModel, folder / "image_encoder", dtype)
        processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor", local_files_only=True)
        return cls(model.to(device), processor)

    @property
    def rows_per_image(self) -> int:
        """Its patches, and the class token."""
        config = self.model.config
        return int(config.image_size // config.patch_size) ** 2 + 1

    def encode(self, images: list[np.ndarray]) -> Tensor:
        """uint8 images [H, W, 3] -> rows [num_images * patches, image_dim] of the last layer but one."""
        pixels = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        with torch.inference_mode():
            states = self.model(pixels.to(self.model.device, self.model.dtype), output_hidden_states=True).hidden_states
        rows: Tensor = states[-2].flatten(0, 1)
        return rows
