"""torch.compile for a denoiser's blocks, with few enough shapes that mixed packs do not recompile for ever.

What is compiled is everything between two attentions: norms, modulation, projections, feed-forward. All of it is
token-wise, so a pack is padded with rows that nobody reads, up to a bucket, and its modulation table to a power of two.
Up to 8,192 tokens, where packs are of any mixture, buckets are powers of two and the middles between them: at most half
is added. Above, where a row costs most and packs are of one or two clips, a doubling has sixteen steps: at most a
sixteenth is added. Attention stays in eager mode, on the unpadded rows, because its lengths differ from pack to pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.pack import Pack
from .denoiser import WanDenoiser

SMALLEST_BUCKET, FINE_FROM, STEPS = 64, 8192, 16
# Of one piece of code, up to 262,144 tokens: 15 buckets up to 8,192, with tables of 2, 4, 8, ... 64 rows, and 80 above,
# with tables of 2 and 4.
MAX_COMPILED = 15 * 6 + 80 * 2


def compile_trunk(denoiser: WanDenoiser, backend: str | Callable[..., Any] = "inductor") -> None:
    """Run this denoiser's blocks compiled from now on; the first pack of each bucket takes seconds to minutes."""
    for index, block in enumerate(denoiser.layers):
        block.attn1.attend = torch.compiler.disable(_unpadded(block.attn1.attend))  # type: ignore[method-assign]
        block.attn2.attend = torch.compiler.disable(_of_block(block.attn2.attend, index))  # type: ignore[method-assign]
    # Each bucket compiles the same code once more; past its limits (8, and 256 in all) dynamo would run the rest
    # uncompiled.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_COMPILED)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MAX_COMPILED)
    run = torch.compile(_run_block, dynamic=False, backend=backend)

    def trunk(tokens: Tensor, modulation: Tensor, pack: Pack, blocks: slice = slice(None)) -> Tensor:
        num_tokens = len(tokens)
        missing = bucket(num_tokens) - num_tokens
        padded = replace(
            pack,
            modulation_ids=F.pad(pack.modulation_ids, (0, missing)),
            rotation=F.pad(torch.view_as_real(pack.rotation), (0, 0, 0, 0, 0, missing)),
        )
        tokens = F.pad(tokens, (0, 0, 0, missing))
        rows = max(2, 1 << (len(modulation) - 1).bit_length())
        modulation = F.pad(modulation, (0, 0, 0, 0, 0, rows - len(modulation)))
        for block in denoiser.layers[blocks]:
            tokens = run(block, tokens, modulation, padded)
        return tokens[:num_tokens]

    denoiser.trunk = trunk  # type: ignore[method-assign]


def bucket(num_tokens: int) -> int:
    """The next of 64, 96, 128, 192, ... 6144, 8192, 8704, 9216, ... 16384, 17408, ... that holds so many."""
    if num_tokens > FINE_FROM:
        step = (1 << (num_tokens - 1).bit_length()) // 2 // STEPS
        return -(-num_tokens // step) * step
    size = SMALLEST_BUCKET
    while size < num_tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _run_block(block: Any, tokens: Tensor, modulation: Tensor, pack: Pack) -> Tensor:
    result: Tensor = block(tokens, modulation, pack, 0)
    return result


def _unpadded(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def unpadded(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        n = pack.num_tokens
        return F.pad(attend(q[:n], k[:n], v[:n], pack), (0, 0, 0, 0, 0, len(q) - n))

    return unpadded


def _of_block(attend: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """The block's number is bound here: as an argument it would be a constant of the compiled code, one for each."""

    def of_block(q: Tensor, pack: Pack, _: int) -> Tensor:
        n = pack.num_tokens
        return F.pad(attend(q[:n], pack, index), (0, 0, 0, 0, 0, len(q) - n))

    return of_block
