"""What is refused before any work is done."""

from __future__ import annotations

import os

from .models.model import Model
from .request import VideoRequest
from .video_file import check_image


def check_supported(model: Model, request: VideoRequest) -> None:
    """Raise ValueError for what this model, or this engine as yet, cannot do with a request."""
    folder = model.folder
    if request.image is not None and not (folder.concatenates_image or folder.gives_frames):
        raise ValueError(f"image is not supported by model {model.name!r} (text-to-video only)")
    if request.image is None and folder.concatenates_image:
        raise ValueError(f"image is required by model {model.name!r} (image-to-video only)")
    if request.last_image is not None and not folder.takes_last_image:
        raise ValueError(f"last_image is not supported by model {model.name!r}")
    if request.last_image is not None and request.num_frames == 1:
        raise ValueError("last_image needs num_frames above 1, got 1")
    if request.guidance_scale_2 is not None and len(model.experts) < 2:
        raise ValueError(f"guidance_scale_2 is only for models with two experts, and {model.name!r} has one")
    for name in ("video", "strength"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name} is not supported yet")
    for image in (request.image, request.last_image):
        if isinstance(image, str | os.PathLike):
            check_image(image)
