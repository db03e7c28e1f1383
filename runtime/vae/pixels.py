"""How a clip's pixels, frames and channels are turned into each other; nothing here has weights.

Shape letters as in wan.py: tensors are [B, C, T, H, W] in channels-last memory order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_time(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W], a view in channels-last order."""
    if torch.compiler.is_exporting():
        return x.transpose(1, 2).flatten(0, 1)  # as compile/frames.py knows it
    # By way of the last dimension: a lone frame that is transposed loses the strides by which a convolution tells the
    # order, and answers in the planar one, which then lasts from state to state.
    return x.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def unfold_time(x: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W], a view in channels-last order."""
    if torch.compiler.is_exporting():
        return x.unflatten(0, (batch, -1)).transpose(1, 2)
    return x.movedim(1, -1).unflatten(0, (batch, -1)).movedim(-1, 1)


def interleave_time(x: Tensor) -> Tensor:
    """[B, 2 C, T, H, W] -> [B, C, 2 T, H, W]: the halves of the channels are the even and the odd frames."""
    x = x.movedim(1, -1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
    x = x.permute(0, 1, 4, 2, 3, 5).contiguous()  # two frames of one would be a view of both orders
    return x.flatten(1, 2).movedim(-1, 1)


def average_down(x: Tensor, out_dim: int, factor_t: int, factor_s: int) -> Tensor:
    """Fold blocks of factor_t x factor_s x factor_s pixels into channels and average groups of them to `out_dim`."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // factor_t, factor_t, h // factor_s, factor_s, w // factor_s, factor_s)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, out_dim, -1, t // factor_t, h // factor_s, w // factor_s)
    return x.mean(dim=2)


def repeat_up(x: Tensor, out_dim: int, factor_t: int, factor_s: int) -> Tensor:
    """Repeat channels to out_dim * factor_t * factor_s^2 and unfold them into pixels; the result is the only copy.

    Factors are 1 or 2, channels out_dim times or by a power of 2.
    """
    x = x.movedim(1, -1)
    if (wider := out_dim // x.shape[-1]) > 1:
        x = x.repeat_interleave(wider, dim=-1)
    # Of the pixels that an output channel has of one input pixel, so many in time, height and width differ.
    own = x.shape[-1] // out_dim
    own_t = min(own, factor_t)
    own_h = min(own // own_t, factor_s)
    x = x.unflatten(-1, (out_dim, own_t, own_h, own // (own_t * own_h))).permute(0, 1, 5, 2, 6, 3, 7, 4)
    b, t, _, h, _, w, _, c = x.shape
    x = x.expand(b, t, factor_t, h, factor_s, w, factor_s, c)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C p p, T, H / p, W / p]; channel order (c, column, row) as the checkpoints have it."""
    if p == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // p, p, w // p, p).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * p * p, t, h // p, w // p)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """[B, C p p, T, H, W] -> [B, C, T, H p, W p], the inverse of `patchify`."""
    if p == 1:
        return x
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // (p * p), p, p, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // (p * p), t, h * p, w * p)
