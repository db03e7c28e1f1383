"""Operations that bandwidth bounds: norms, residuals, rotary embedding, patches and solver steps, at Wan's shapes.

Their peers are the lines that the CPU runs, in eager mode and compiled, and a copy of as many bytes. The tokens are
those of 81 frames at 832 x 480 and at 1280 x 720.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import adaln, patch_embed, qk_norm_rope, rms_norm, roofline, solver_step
from ...kernels.patch_embed import Grid
from .case import Case, Make, Suite, beside_torch

GRIDS: dict[str, Grid] = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
SMALL: dict[str, Grid] = {"small": (3, 8, 12)}
MIXED: list[Grid] = [(21, 30, 52), (13, 30, 52), (1, 45, 80), (9, 28, 28)]
SMALL_MIXED: list[Grid] = [(3, 8, 12), (1, 4, 6), (2, 6, 8)]
WIDTHS = {"1.3B": (1536, 12), "14B": (5120, 40)}  # Wan's: dim, heads
NARROW = {"demo": (256, 4)}
ROWS = 8  # timesteps in a pack
EPS = 1e-6


def shapes(suite: Suite) -> Iterator[tuple[str, Grid, int, int]]:
    """(name, grid, dim, heads)."""
    grids, widths = (GRIDS, WIDTHS) if suite.on_gpu else (SMALL, NARROW)
    for name, (dim, heads) in widths.items():
        for size, grid in grids.items():
            if not (suite.quick and size == "720p"):
                yield f"{name}, {size}", grid, dim, heads


def cases(suite: Suite) -> Iterator[Case]:
    for name, grid, dim, heads in shapes(suite):
        num_tokens = grid[0] * grid[1] * grid[2]
        yield from _token_wise(suite, f"{name}: {num_tokens} tokens, dim {dim}", num_tokens, dim)
        cost = roofline.qk_norm_rope(num_tokens, heads, dim // heads, suite.dtype.itemsize)
        words = f"{name}: {num_tokens} tokens, {heads} heads of {dim // heads}"
        build = partial(_qk_norm_rope, suite, num_tokens, dim, heads, cost)
        yield Case("qk_norm_rope", words, cost, suite.dtype, build)
        yield from _patches(suite, f"{name}, dim {dim}", [grid], dim)
    mixed, dim = (MIXED, 5120) if suite.on_gpu else (SMALL_MIXED, 256)
    yield from _patches(suite, f"a mixed pack of {len(mixed)} shapes", mixed, dim)
    for size, (t, h, w) in (GRIDS if suite.on_gpu else SMALL).items():
        yield _solver_step(suite, size, (16, t, 2 * h, 2 * w))


def _token_wise(suite: Suite, words: str, num_tokens: int, dim: int) -> Iterator[Case]:
    size = num_tokens, dim, suite.dtype.itemsize
    ops = {
        "adaln": roofline.adaln(*size, ROWS),
        "gated_residual": roofline.gated_residual(*size, ROWS),
        "gated_residual_adaln": roofline.gated_residual_adaln(*size, ROWS),
        "rms_norm": roofline.rms_norm(*size),
    }
    for op, cost in ops.items():
        yield Case(op, words, cost, suite.dtype, partial(_of_tokens, suite, op, num_tokens, dim, cost))


def _of_tokens(suite: Suite, op: str, num_tokens: int, dim: int, cost: roofline.Cost) -> dict[str, Make]:
    x, y = suite.draw(num_tokens, dim), suite.draw(num_tokens, dim)
    shift, scale, gate, *_ = suite.draw(ROWS, 6, dim, dtype=torch.float32).unbind(1)
    ids = torch.arange(num_tokens, device=suite.device) * ROWS // num_tokens
    arguments: tuple[Any, ...] = {
        "adaln": (x, shift, scale, ids, EPS),
        "gated_residual": (x, y, gate, ids),
        "gated_residual_adaln": (x, y, gate, shift, scale, ids, EPS),
        "rms_norm": (x, suite.draw(dim), EPS),
    }[op]
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "adaln": (adaln.adaln, adaln._adaln_cpu),
        "gated_residual": (adaln.gated_residual, adaln._gated_residual_cpu),
        "gated_residual_adaln": (adaln.gated_residual_adaln, adaln._gated_residual_adaln_cpu),
        "rms_norm": (rms_norm.rms_norm, rms_norm._cpu),
    }
    ours, lines = (partial(run, *arguments) for run in pairs[op])
    return beside_torch(ours, lines, cost, suite.device)


def _qk_norm_rope(suite: Suite, num_tokens: int, dim: int, heads: int, cost: roofline.Cost) -> dict[str, Make]:
    qkv, weights = suite.draw(num_tokens, 3 * dim), (suite.draw(dim), suite.draw(dim))
    pairs = suite.draw(num_tokens, dim // heads // 2, 2, dtype=torch.float32)  # complex numbers do not compile
    arguments = qkv, *weights, pairs, heads, EPS
    ours, lines = partial(qk_norm_rope.qk_norm_rope, *arguments), partial(qk_norm_rope._cpu, *arguments)
    return beside_torch(ours, lines, cost, suite.device)


def _patches(suite: Suite, words: str, grids: list[Grid], dim: int) -> Iterator[Case]:
    num_tokens = sum(t * h * w for t, h, w in grids)
    embed = roofline.patch_embed(num_tokens, 16, (1, 2, 2), dim, 4, suite.dtype.itemsize)
    unembed = roofline.unpatchify(num_tokens, 16, (1, 2, 2), suite.dtype.itemsize)
    words = f"{words}: {num_tokens} tokens, 16 channels"
    yield Case("patch_embed", words, embed, suite.dtype, partial(_patch_embed, suite, grids, dim, embed))
    yield Case("unpatchify", words, unembed, suite.dtype, partial(_unpatchify, suite, grids, num_tokens, unembed))


def _patch_embed(suite: Suite, grids: list[Grid], dim: int, cost: roofline.Cost) -> dict[str, Make]:
    latents = [suite.draw(16, t, 2 * h, 2 * w, dtype=torch.float32) for t, h, w in grids]
    weight, bias = suite.draw(dim, 64), suite.draw(dim)
    ours = partial(patch_embed.patch_embed, latents, weight, bias, (1, 2, 2))
    lines = partial(patch_embed._patch_embed_cpu, latents, weight, bias, (1, 2, 2))
    as_convolution = weight.view(dim, 16, 1, 2, 2)

    def conv3d() -> list[Tensor]:
        convolve = torch.nn.functional.conv3d
        return [convolve(x[None].to(weight.dtype), as_convolution, bias, stride=(1, 2, 2)) for x in latents]

    makes = beside_torch(ours, lines, cost, suite.device)
    if suite.quick and suite.on_gpu:
        return makes
    return makes | {"conv3d": lambda: conv3d}  # in bf16 it is told to take seconds (sglang-omni #539)


def _unpatchify(suite: Suite, grids: list[Grid], num_tokens: int, cost: roofline.Cost) -> dict[str, Make]:
    tokens = suite.draw(num_tokens, 64)
    ours = partial(patch_embed.unpatchify, tokens, grids, (1, 2, 2))
    return beside_torch(ours, partial(patch_embed._unpatchify_cpu, tokens, grids, (1, 2, 2)), cost, suite.device)


def _solver_step(suite: Suite, size: str, shape: tuple[int, int, int, int]) -> Case:
    """UniPC of order 2 with guidance and a preview: all that a step can ask for."""
    cost = roofline.solver_step(shape[0], shape[1] * shape[2] * shape[3], suite.dtype.itemsize, True, 3, 4, 4)

    def build() -> dict[str, Make]:
        latents, last, *earlier = (suite.draw(*shape, dtype=torch.float32) for _ in range(4))
        cond, uncond = suite.draw(*shape), suite.draw(*shape)
        weights = [0.6, 0.5, -0.1], [0.5, 0.3, 0.2, -0.1]
        weight, bias = suite.draw(48, shape[0], dtype=torch.float32), suite.draw(48, dtype=torch.float32)
        numbers = 4.5, 0.7, *weights, last, earlier
        ours = partial(solver_step.solver_step, latents, cond, uncond, *numbers, (weight, bias))
        lines = partial(solver_step._cpu, latents, cond, uncond, *numbers, weight, bias)
        return beside_torch(ours, lines, cost, suite.device)

    words = f"{size}: {list(shape)}, UniPC order 2, guided, corrected, preview"
    return Case("solver_step", words, cost, suite.dtype, build)
