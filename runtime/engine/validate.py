"""What is refused before any work is done."""

from __future__ import annotations

import os

from ..conditioning.given import check_length, count_given, count_video
from ..core.request import VideoRequest
from ..media.pictures import check_image
from ..models.model import Model


def check_supported(model: Model, request: VideoRequest) -> None:
    """Raise ValueError for what this model cannot do with a request. Files are judged by their headers."""
    folder = model.folder
    takes_frames = folder.concatenates_image or folder.gives_frames
    if request.image is not None and not takes_frames:
        raise ValueError(f"image is not supported by model {model.name!r} (text-to-video only)")
    if request.continues_video and not takes_frames:
        raise ValueError(f"video without strength is not supported by model {model.name!r} (text-to-video only)")
    if request.image is not None and request.continues_video:
        raise ValueError("image must not be given beside a video that is continued: both are how the clip begins")
    if request.image is None and not request.continues_video and folder.concatenates_image:
        raise ValueError(f"image is required by model {model.name!r} (image-to-video only)")
    if request.last_image is not None and not folder.takes_last_image:
        raise ValueError(f"last_image is not supported by model {model.name!r}")
    if request.last_image is None and folder.requires_last_image:
        raise ValueError(f"last_image is required by model {model.name!r} (first and last frame to video)")
    if request.last_image is not None and request.num_frames == 1:
        raise ValueError("last_image needs num_frames above 1, got 1")
    if request.strength is not None and request.video is None:
        raise ValueError("strength needs a video")
    if request.guidance_scale_2 is not None and len(model.experts) < 2:
        raise ValueError(f"guidance_scale_2 is only for models with two experts, and {model.name!r} has one")
    for name in ("image", "last_image"):
        if isinstance(image := getattr(request, name), str | os.PathLike):
            check_image(image, name)
    if request.video is not None:
        check_length(request, count_video(request))
    if folder.gives_frames:
        _check_something_is_left(model, request)


def _check_something_is_left(model: Model, request: VideoRequest) -> None:
    """A latent frame that is given whole leaves nothing in it to make; some must not be given."""
    width, height, num_frames = request.size
    factor = model.codec.temporal_factor
    num_given = sum((count - 1) // factor + 1 for count in count_given(request))
    if num_given >= model.codec.latent_shape(num_frames, height, width)[1]:
        fewest = factor * num_given + 1
        raise ValueError(f"num_frames must be at least {fewest} beside the given frames, got {num_frames}")
