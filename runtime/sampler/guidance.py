"""Classifier-free guidance: away from the unconditional prediction, towards the prompt's."""

from __future__ import annotations

import torch
from torch import Tensor


def guidance_is_on(scale: float) -> bool:
    """Whether a request needs the unconditional branch at all; diffusers' rule."""
    return scale > 1


def combine(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """`uncond + scale * (cond - uncond)`, all [C, T, H, W] of one dtype.

    Source: Ho & Salimans, arXiv 2207.12598, whose w is our scale - 1.
    """
    return torch.add(uncond, cond - uncond, alpha=scale)
