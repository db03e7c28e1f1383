"""A step's parts by our own names, for the profiler: ranges that are put around our functions only while it looks.

Outside of `watching` nothing of the package is touched, so ranges cost nothing where nobody profiles.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ...kernels import roofline
from ...kernels.roofline import Cost
from ...runtime.cache.step_cache import StepCache
from ...runtime.engine.pack_cache import Layouts
from ...runtime.engine.trajectory import Trajectory
from ...runtime.families.wan import denoiser as wan
from ...runtime.layers.linear import Linear
from ...runtime.layers.pack import Context, Pack
from ...runtime.layers.time_embedding import TimeEmbeddings
from ...runtime.models.text_encoder import TextEncoder
from ...runtime.vae import codec

PREFIX = "skylapse: "  # of the ranges' names


@dataclass(frozen=True)
class Noun:
    """A function of ours, found as `owner.attribute`; several may have one name.

    cost: of a call, by its arguments. holds: whether others stand inside it; else what it calls belongs to it.
    """

    name: str
    owner: Any
    attribute: str
    cost: Callable[..., Cost] | None = None
    holds: bool = False


class Ranges:
    """Those of one profile. costs: of every noun's calls while `counts` was set."""

    def __init__(self, nvtx: bool) -> None:
        self.nvtx, self.counts = nvtx, False
        self.costs: dict[str, Counter[Cost]] = {}
        self._inside = False  # of a noun that holds no others

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        if self.nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            with record_function(PREFIX + name):
                yield
        finally:
            if self.nvtx:
                torch.cuda.nvtx.range_pop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Ranges around all of NOUNS; what was there before comes back."""
        before = [(noun, vars(noun.owner)[noun.attribute]) for noun in NOUNS]
        for noun, function in before:
            setattr(noun.owner, noun.attribute, self._wrapped(noun, function))
        try:
            yield
        finally:
            for noun, function in before:
                setattr(noun.owner, noun.attribute, function)

    def _wrapped(self, noun: Noun, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            if self.counts and noun.cost is not None:
                self.costs.setdefault(noun.name, Counter())[noun.cost(*arguments, **options)] += 1
            self._inside = not noun.holds
            try:
                with self.named(noun.name):
                    return function(*arguments, **options)
            finally:
                self._inside = False

        return run


# --- what they must move and compute ----------------------------------------------------------------------------------


def _patch_embed(denoiser: wan.WanDenoiser, latents: list[Tensor]) -> Cost:
    config = denoiser.config
    p, q, r = config.patch_size
    num_tokens = sum(x.shape[1] * x.shape[2] * x.shape[3] for x in latents) // (p * q * r)
    itemsize = denoiser.patch_embedding.weight.itemsize
    return roofline.patch_embed(
        num_tokens, config.in_channels, config.patch_size, config.dim, latents[0].itemsize, itemsize
    )


def _adaln(x: Tensor, shift: Tensor, *_: object) -> Cost:
    return roofline.adaln(len(x), x.shape[1], x.itemsize, len(shift))


def _gated(x: Tensor, y: Tensor, gate: Tensor, *_: object) -> Cost:
    return roofline.gated_residual(len(x), x.shape[1], x.itemsize, len(gate))


def _gated_adaln(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, *_: object) -> Cost:
    return roofline.gated_residual_adaln(len(x), x.shape[1], x.itemsize, shift.shape[0] if shift.dim() > 1 else 1)


def _qk_norm_rope(qkv: Tensor, q: Tensor, k: Tensor, rotation: Tensor, num_heads: int, eps: float) -> Cost:
    head_dim = qkv.shape[1] // 3 // num_heads
    return roofline.qk_norm_rope(len(qkv), num_heads, head_dim, qkv.itemsize, per_head=len(q) == head_dim)


def _rms_norm(x: Tensor, *_: object) -> Cost:
    return roofline.rms_norm(len(x), x.shape[1], x.itemsize)


def _self_attention(_: object, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Cost:
    lengths = _lengths(pack.cu_seqlens)
    return roofline.attention(lengths, lengths, q.shape[1], q.shape[2], q.itemsize)


def _cross_attention(_: object, q: Tensor, pack: Pack, index: int) -> Cost:
    lengths = _lengths(pack.cu_seqlens)

    def to(context: Context) -> Cost:
        biased = context.key_bias is not None
        return roofline.attention(
            lengths, _lengths(context.cu_seqlens), q.shape[1], q.shape[2], q.itemsize, biased=biased
        )

    text = to(pack.text)
    image = to(pack.image) if pack.image is not None else Cost(0, 0)
    return Cost(text.num_bytes + image.num_bytes, text.operations + image.operations)


def _linear(layer: Linear, x: Tensor, *_: object) -> Cost:
    return _product(layer, x.numel() // x.shape[-1], x.itemsize)


def _feed_forward(layer: wan.FeedForward, x: Tensor) -> Cost:
    """Both products; what lies between them is written and read."""
    up, down = (_product(part, x.numel() // x.shape[-1], x.itemsize) for part in (layer.up, layer.down))
    return Cost(up.num_bytes + down.num_bytes, up.operations + down.operations)


def _product(layer: Linear, num_rows: int, itemsize: int) -> Cost:
    """Rows, weight and bias once."""
    outputs, inputs = layer.out_features, layer.in_features
    weight_bytes = layer.format.num_bytes(outputs, inputs, layer.bias.dtype)
    num_bytes = weight_bytes + layer.bias.nbytes + num_rows * (inputs + outputs) * itemsize
    return Cost(num_bytes, 2 * num_rows * inputs * outputs)


def _lengths(cu_seqlens: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens)]


NOUNS = (
    Noun("text encoder", TextEncoder, "encode"),
    Noun("text keys and values", wan.WanDenoiser, "encode_text"),
    Noun("packing", Layouts, "get"),
    Noun("patch embed", wan.WanDenoiser, "embed", _patch_embed),
    Noun("timestep embedding", TimeEmbeddings, "get"),
    Noun("modulation table", wan.WanBlock, "forward", holds=True),  # what no other noun takes of a block
    Noun("adaln", wan, "adaln", _adaln),
    Noun("linear", Linear, "forward", _linear),
    Noun("qk_norm_rope", wan, "qk_norm_rope", _qk_norm_rope),
    Noun("self-attention", wan.SelfAttention, "attend", _self_attention),
    Noun("rms_norm", wan, "rms_norm", _rms_norm),
    Noun("cross-attention", wan.CrossAttention, "attend", _cross_attention),
    Noun("gated residual", wan, "gated_residual", _gated),
    Noun("gated residual, norm", wan, "gated_residual_norm", _gated_adaln),
    Noun("gated residual, norm", wan, "gated_residual_adaln", _gated_adaln),
    Noun("feed-forward", wan.FeedForward, "forward", _feed_forward),
    Noun("head and unpatchify", wan.WanDenoiser, "head"),
    Noun("guidance and solver", Trajectory, "advance"),
    *(Noun("step cache", StepCache, name) for name in ("indicator", "decide", "predict", "commit")),
    Noun("decode", codec, "decode_tiled"),
)
