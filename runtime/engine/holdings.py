"""What a request takes of the memory, at its own size or at another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..conditioning.given import count_given
from ..memory.fit import Needs, Size
from ..memory.needs import held_bytes, num_tokens_of

if TYPE_CHECKING:
    from .trajectory import Trajectory


def needs_at(t: Trajectory, size: Size) -> Needs:
    """On the device, beside the model; on a CPU its frames lie in the same memory."""
    model, request = t.model, t.request
    config = model.experts[0].config
    shape = model.codec.latent_shape(size.num_frames, size.height, size.width)
    most = model.limits.max_prompt_tokens
    text_rows = sum(min(most, len(prompt.encode()) + 2) for prompt in t.branch_encoder.prompts)  # a byte a token
    image_rows = 0
    if model.image_encoder is not None:
        image_rows = model.image_encoder.rows_per_image * (1 + (request.last_image is not None))
    latents, hidden = t.cache.policy.footprint
    held = held_bytes(
        config,
        shape,
        model.dtype,
        num_branches=t.num_branches,
        text_rows=text_rows,
        image_rows=image_rows,
        solver_order=t.schedule.config.solver_order,
        cached_latents=latents,
        cached_tokens=hidden,
    )
    if model.device.type == "cpu":
        held += _frame_bytes(t, size)
    encodes = any(given is not None for given in (request.image, request.last_image, request.video))
    return Needs(size, held, num_tokens_of(config, shape), t.num_branches, encodes)


def _frame_bytes(t: Trajectory, size: Size) -> int:
    """The clip twice at its end, or while channels are made of it in fp32, and the given frames all the while."""
    num_held = size.num_frames * (4 if t.model.folder.concatenates_image else 2)
    num_given = t.conditioning.num_pasted if t.conditioning else sum(count_given(t.request))
    return 3 * (num_held + num_given) * size.height * size.width
