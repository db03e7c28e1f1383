"""A job's request, as the store keeps it and as the engine takes it.

The row holds numbers and text alone. Pictures and clips that a request shows the model lie beside the job's other files
under `jobs/<id>/inputs/`: a PNG of the model's own size, or an mp4 of the finished clip's size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.core.request import ModelLimits, VideoRequest

GENERATE, REMIX, EDIT, EXTEND = "generate", "remix", "edit", "extend"
IMAGE, SOURCE, LATENTS = INPUTS = ("image.png", "source.mp4", "latents.npy")


def input_key(job_id: str, name: str) -> str:
    return f"jobs/{job_id}/inputs/{name}"


@dataclass(frozen=True)
class Extension:
    """The frames of an extension: the model makes `native_frames`, the first `context` of which are the clip's last."""

    context: int
    native_frames: int
    new_frames: int


def extend(source_frames: int, new_frames: int, limits: ModelLimits) -> Extension | None:
    """Use as much context as the model's length leaves room for, up to half of it; None if that is not one frame.

    The new frames fill whole latent frames; what is more than was asked for is cut off at the end.
    """
    group = limits.temporal_multiple
    new = math.ceil(new_frames / group) * group
    room = min(limits.max_num_frames - new, (limits.max_num_frames - 1) // 2 + 1, source_frames)
    if room < 1:
        return None
    context = (room - 1) // group * group + 1
    return Extension(context, context + new, new_frames)


def video_request(asked: dict[str, Any], image: Path | None = None) -> VideoRequest:
    """Return the engine's request for a job, without the clip that it may extend or remake."""
    width, height = (int(side) for side in asked["native_size"].split("x"))
    return VideoRequest(
        prompt=asked["prompt"],
        negative_prompt=asked["negative_prompt"],
        width=width,
        height=height,
        num_frames=asked["native_frames"],
        fps=asked["fps"],
        num_inference_steps=asked["num_inference_steps"],
        guidance_scale=asked["guidance_scale"],
        guidance_scale_2=asked.get("guidance_scale_2"),
        seed=asked["seed"],
        cache=asked["cache"],
        image=image,
    )


def preview_every(asked: dict[str, Any]) -> int:
    """Return the steps between previews, for as many as were asked for or as many as are possible; 0 for none."""
    previews: int = asked["partial_images"]
    return math.ceil(asked["num_inference_steps"] / (previews + 1)) if previews else 0
