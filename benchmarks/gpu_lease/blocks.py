"""Call 4: blocks of Wan 14B with random weights at native lengths: a block's seconds, FLOPs use, peak of a step.

A trunk of two blocks stands for one of forty: its peak is the same, since a block's input and output are all that
lives between two blocks, and its time is twice a block's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...kernels import roofline
from ...kernels.patch_embed import Grid
from ...runtime.families.wan.denoiser import WanConfig, WanDenoiser
from ...runtime.layers.pack import Pack, Sequence, build_pack
from ..harness import Run
from ..kernels.block import cost_of
from ..kernels.memory_bound import GRIDS
from ..peak import held_bytes, peak_while
from .case import Case, Context
from .drive import main
from .lines import Labels, Line, measured, of_turns
from .random_weights import denoiser

LAYERS = 2
PROMPT_ROWS = 64  # of the text encoder; the rest of 512 is one row with a bias
BRANCHES = {"one branch": 1, "a guided pair": 2}
WEIGHTS = (None, "fp8")  # of the blocks: bf16, or 8 bits
TINY = WanConfig(num_attention_heads=2, attention_head_dim=64, ffn_dim=256, text_dim=64, freq_dim=32, num_layers=LAYERS)
TINY_GRIDS: dict[str, Grid] = {"tiny": (2, 4, 6)}


@dataclass(frozen=True)
class Setting:
    """The pack of a step of one request."""

    size: str
    grid: Grid
    branches: str

    @property
    def num_tokens(self) -> int:
        """Return the tokens of a branch."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def words(self) -> str:
        return f"14B {self.size}: {self.num_tokens} tokens, {self.branches}"


def cases(context: Context) -> Iterator[Case]:
    config = TINY if context.dry else WanConfig(num_layers=LAYERS)
    grids = TINY_GRIDS if context.dry else GRIDS
    yield context.limits_case()
    for setting in settings_of(grids):
        yield Case(f"time, {setting.words}", partial(_times, context, config, setting))
        yield Case(f"peak, {setting.words}", partial(_peaks, context, config, setting))


def settings_of(grids: Mapping[str, Grid]) -> list[Setting]:
    return [Setting(size, grid, branches) for size, grid in grids.items() for branches in BRANCHES]


def _times(context: Context, config: WanConfig, setting: Setting) -> Iterator[Line]:
    """Measure the seconds of a block in each kind of weights, and its rate as a share of the product's."""
    runs: dict[str, Run] = {}
    for kind in WEIGHTS:
        model = denoiser(config, context.device, context.suite.dtype, kind)
        given = inputs(context, model, setting)
        with torch.inference_mode():
            _, modulation = model.condition_embedder.embed_time(given.timesteps, model.dtype)
            tokens = model.embed(given.latents)
        runs[kind or "bf16"] = partial(model.trunk, tokens, modulation, given.pack)
    turns = context.turns(f"blocks/{setting.words}", runs)
    per_block = {name: [s / LAYERS for s in samples] for name, samples in turns.samples.items()}
    labels: Labels = {"tokens": setting.num_tokens, "branches": BRANCHES[setting.branches]}
    yield from of_turns(f"blocks/{setting.words}", replace(turns, samples=per_block), "bf16", labels)
    operations = cost(config, setting, context.suite.dtype.itemsize).operations
    for name, samples in per_block.items():
        rate = [operations / s for s in samples]
        yield measured(f"blocks/{setting.words}/{name}/rate", "operations/s", rate, "higher", labels)
        product = context.limits["operations_per_s"].median
        use = [r / product for r in rate]
        yield measured(f"blocks/{setting.words}/{name}/use", "of the product's rate", use, "higher", labels)


def _peaks(context: Context, config: WanConfig, setting: Setting) -> Iterator[Line]:
    """Measure the most bytes of a step above the weights, the latents and the text, which are there all the while."""
    for kind in WEIGHTS:
        model = denoiser(config, context.device, context.suite.dtype, kind)
        given = inputs(context, model, setting)

        run = partial(step, model, given)
        run()  # compiles, and makes the libraries' workspaces
        held, peak = held_bytes(context.device), peak_while(run, context.device)
        if held is not None and peak is not None:
            yield measured(peak_name(setting, kind), "bytes", [max(0, peak - held)])


def peak_name(setting: Setting, kind: str | None) -> str:
    return f"peaks/{setting.words}, {kind or 'bf16'}/step"


@torch.inference_mode()
def step(model: WanDenoiser, given: Inputs) -> None:
    """Take a step as the engine does: nothing keeps the tokens that the blocks have been given."""
    tokens = [model.embed(given.latents)]
    embedding, modulation = model.condition_embedder.embed_time(given.timesteps, model.dtype)
    tokens.append(model.trunk(tokens.pop(), modulation, given.pack))
    model.head(tokens.pop(), embedding, given.pack)


@dataclass(frozen=True)
class Inputs:
    pack: Pack
    latents: list[Tensor]
    timesteps: Tensor


def inputs(context: Context, model: WanDenoiser, setting: Setting) -> Inputs:
    """Return the inputs of a step of one request: its branches see the same latents and other texts."""
    config, suite = model.config, context.suite
    with torch.inference_mode():
        texts = [model.encode_text(suite.draw(PROMPT_ROWS, config.text_dim)) for _ in range(BRANCHES[setting.branches])]
    sequences = [Sequence(setting.grid, (0,) * setting.grid[0], text) for text in texts]
    pack = build_pack(sequences, config.attention_head_dim, context.device)
    shape = [n * p for n, p in zip(setting.grid, config.patch_size, strict=True)]
    latents = suite.draw(config.in_channels, *shape, dtype=torch.float32)
    return Inputs(pack, [latents] * len(texts), torch.full((1,), 500.0, device=context.device))


def cost(config: WanConfig, setting: Setting, itemsize: int) -> roofline.Cost:
    """Return the cost of a block: weights are read once, whatever the number of branches."""
    one, branches = cost_of(config, setting.num_tokens, itemsize), BRANCHES[setting.branches]
    return roofline.Cost(one.num_bytes, branches * one.operations)


if __name__ == "__main__":
    sys.exit(main("blocks"))
