"""Attention within a frame in an exported graph: so many queries at a time that its scores stay within a bound.

Exporters write attention out as two products and a softmax, whose scores are tokens x tokens numbers a frame: 0.8 GiB
in fp32 of a frame of 720p, where torch's own kernels hold a few rows. A graph of fixed sides gets a product a group of
queries. One of free sides cannot know how many groups it needs: it is used up to `ANY_AREA` and not above.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAX_SCORES = 2**26  # at once: 256 MiB in fp32, and as much for their softmax
LIKELY_FRAMES = 4  # of a chunk, where a graph leaves their number free
FIXED: type = int  # of a side, which is a torch.SymInt where it is free, whatever its annotation says
ANY_AREA = 8192  # latents of a frame by a graph for any size: 1 GiB of scores of four frames in fp32


class Bounded(TorchFunctionMode):
    """While it is active, attention of many tokens is done a group of queries at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not kwargs and len(args) == 3:
            return bounded_attention(*args)
        return func(*args, **(kwargs or {}))


def bounded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """F.scaled_dot_product_attention of [frames, heads, tokens, dim] each."""
    frames, heads, tokens, _ = query.shape
    if not isinstance(tokens, FIXED):  # free sides
        return F.scaled_dot_product_attention(query, key, value)
    rows = MAX_SCORES // (heads * tokens * (frames if isinstance(frames, FIXED) else LIKELY_FRAMES))
    if rows >= tokens:
        return F.scaled_dot_product_attention(query, key, value)
    parts = query.split(max(1, rows), dim=2)
    return torch.cat([F.scaled_dot_product_attention(part, key, value) for part in parts], dim=2)
