"""A block of Wan2.1 with random weights beside diffusers' own, eager and compiled.

Both compute the same function of the same weights, which is checked before they are timed. Ours has the text's keys and
values already, as it computes them once a prompt; diffusers computes them at each step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import roofline
from ...kernels.patch_embed import Grid
from ...kernels.weight_formats import FORMATS, words
from ...runtime.families.wan.denoiser import TEXT_ROWS, WanBlock, WanConfig
from ...runtime.layers.linear import Linear
from ...runtime.layers.pack import Sequence, TextContext, build_pack
from ..harness import Missing
from .case import Case, Make, Suite, compiled
from .memory_bound import GRIDS, SMALL

MODELS = {
    "Wan2.1-1.3B": WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=1),
    "Wan2.1-14B": WanConfig(num_layers=1),
}
TINY = {"tiny": WanConfig(num_attention_heads=2, attention_head_dim=64, ffn_dim=512, num_layers=1)}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative L2
LOSSY = 0.1  # of projections in 8 bits


def cases(suite: Suite) -> Iterator[Case]:
    for model, config in (MODELS if suite.on_gpu else TINY).items():
        for size, grid in (GRIDS if suite.on_gpu else SMALL).items():
            if suite.quick and size == "720p":
                continue  # compiling each shape of diffusers' block takes a minute
            num_tokens = grid[0] * grid[1] * grid[2]
            cost = cost_of(config, num_tokens, suite.dtype.itemsize)
            words = f"{model}, {size}: {num_tokens} tokens"
            yield Case("block", words, cost, suite.dtype, partial(_build, suite, config, grid))


def cost_of(config: WanConfig, num_tokens: int, itemsize: int) -> roofline.Cost:
    """Weights and tokens once; products of attention and of all linear layers."""
    dim, heads, size = config.dim, config.num_attention_heads, config.attention_head_dim
    weights = 6 * dim**2 + 2 * dim * config.ffn_dim  # qkv, out, the cross-attention's q and out, feed-forward
    to_itself = roofline.attention((num_tokens,), (num_tokens,), heads, size, itemsize).operations
    to_text = roofline.attention((num_tokens,), (TEXT_ROWS,), heads, size, itemsize).operations
    num_bytes = (weights + 2 * num_tokens * dim) * itemsize
    return roofline.Cost(num_bytes, 2 * num_tokens * weights + to_itself + to_text)


def _build(suite: Suite, config: WanConfig, grid: Grid) -> dict[str, Make]:
    tokens = suite.draw(grid[0] * grid[1] * grid[2], config.dim)
    rows = suite.draw(TEXT_ROWS, config.dim)
    modulation = suite.draw(1, 6, config.dim) / 8
    with torch.device(suite.device):
        block = WanBlock(config).to(suite.dtype).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    assert block.norm2 is not None
    block.norm2.float()  # as the loader keeps them
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    keys_values = block.attn2.text_keys_values(rows)[None]
    bias = torch.zeros(TEXT_ROWS, device=suite.device)
    sequence = Sequence(grid, (0,) * grid[0], TextContext(keys_values, bias))
    pack = build_pack([sequence], config.attention_head_dim, suite.device)
    ours = partial(block, tokens, modulation, pack, 0)
    makes: dict[str, Make] = {"skylapse": lambda: ours}
    makes |= {f"skylapse, {kind}": partial(_in_8_bits, ours, kind) for kind in words()[1:]}
    theirs: dict[str, Any] = {}

    def diffusers() -> partial[Tensor]:
        if not theirs:
            theirs["run"] = partial(
                _theirs(block, config, suite), tokens[None], rows[None], modulation, _rotary(config, grid, suite)
            )
            _agree(ours(), theirs["run"]()[0], TOLERANCES[suite.dtype])
        return theirs["run"]

    return makes | {"diffusers": diffusers, "diffusers, torch.compile": lambda: compiled(diffusers())}


def _in_8_bits(exact: partial[Tensor], kind: str) -> partial[Tensor]:
    """The block with the weights of its projections in 8 bits, as the loader makes them."""
    block = copy.deepcopy(exact.func)
    assert isinstance(block, WanBlock)
    for module in block.modules():
        if isinstance(module, Linear):
            rows = module.weight.float()
            module.keep_in(FORMATS[kind], rows.device)
            module.fill(0, rows)
    run = partial(block, *exact.args)
    _agree(run(), exact(), LOSSY)
    return run


def _theirs(block: WanBlock, config: WanConfig, suite: Suite) -> nn.Module:
    """diffusers' block with our block's weights."""
    try:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock
    except ImportError as error:
        raise Missing("diffusers is not installed") from error
    with torch.device(suite.device):
        theirs = WanTransformerBlock(
            config.dim, config.ffn_dim, config.num_attention_heads, config.qk_norm, config.cross_attn_norm, config.eps
        ).to(suite.dtype)
    theirs.norm2.float()
    weights = {n: p for n, p in block.named_parameters() if n.startswith(("scale_shift_table", "norm2."))}
    for path, module in block.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(module, nn.RMSNorm):
            weights[f"{path}.weight"] = module.weight
        if isinstance(module, Linear):
            sizes = list(module.sources.values())
            for kind, tensor in module.named_parameters():
                parts = zip(module.sources, tensor.split(sizes), strict=True)
                weights |= {f"{parent}.{source}.{kind}": part for source, part in parts}
    theirs.scale_shift_table.data = theirs.scale_shift_table.data.float()
    theirs.load_state_dict(weights)
    return theirs.eval()


def _rotary(config: WanConfig, grid: Grid, suite: Suite) -> Any:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    rope = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    t, h, w = grid
    return tuple(x.to(suite.device) for x in rope(torch.empty(1, 16, t, 2 * h, 2 * w)))


def _agree(one: Tensor, other: Tensor, tolerance: float) -> None:
    distance = float((one.double() - other.double()).norm() / other.double().norm())
    if not distance <= tolerance:
        raise RuntimeError(f"the blocks differ by {distance:.2g}, at most {tolerance:g} is rounding")
