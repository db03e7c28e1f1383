"""Turn images into CLIP rows, for checkpoints that cross-attend to them (Wan2.1 image-to-video)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.encoder_configs import encoder_fields
from ..core.json_file import read_json
from .parts import image_encoder_part, load_part
from .text_encoder import first_line


class ImageEncoder:
    """CLIP's vision tower and its preprocessing, both read by transformers."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        fields: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> ImageEncoder:
        """Read `image_encoder/` and `image_processor/` of a checkpoint folder; ValueError names what does not fit.

        fields: the config's, by `encoder_fields`; processor: by `load_processor`; where they have been read already.
        """
        if fields is None:
            fields = encoder_fields("image_encoder", read_json(folder / "image_encoder" / "config.json"))
        model: Any = load_part(image_encoder_part(fields), folder / "image_encoder", device=device, dtype=dtype)
        return cls(model, processor or load_processor(folder, model.config.image_size))

    @property
    def rows_per_image(self) -> int:
        """Return the number of rows of an image: its patches, and the class token."""
        config = self.model.config
        return int(config.image_size // config.patch_size) ** 2 + 1

    def encode(self, images: list[np.ndarray]) -> Tensor:
        """Return rows [num_images * rows_per_image, image_dim] of uint8 images [H, W, 3], of the last layer but one."""
        pixels = self.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        with torch.inference_mode():
            states = self.model(pixels.to(self.model.device, self.model.dtype), output_hidden_states=True).hidden_states
        rows: Tensor = states[-2].flatten(0, 1)
        return rows


def load_processor(folder: Path, image_size: int) -> Any:
    """Read `image_processor/` of a checkpoint folder, by transformers; ValueError says what is missing or does not fit.

    image_size: the side in pixels of the images that the image encoder takes.
    """
    from transformers import CLIPImageProcessorPil  # the one that needs no torchvision

    part = folder / "image_processor"
    if not part.is_dir():
        raise ValueError("image_processor is missing: the folder has none")
    read_json(part / "preprocessor_config.json")
    try:
        processor = CLIPImageProcessorPil.from_pretrained(part, local_files_only=True)
        shape = tuple(processor(images=[Image.new("RGB", (48, 32))], return_tensors="pt").pixel_values.shape)
    except Exception as error:  # transformers lets through whatever its parsers stumble over
        raise ValueError(f"image_processor cannot be read: {first_line(error)}") from error
    if shape != (1, 3, image_size, image_size):
        wanted = f"{image_size}x{image_size}, the image encoder's image_size"
        raise ValueError(f"image_processor must make images of {wanted}, got {'x'.join(map(str, shape[2:]))}")
    return processor
