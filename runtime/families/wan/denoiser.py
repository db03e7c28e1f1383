"""Wan's diffusion transformer on packed tokens (Wan2.1 and 2.2, every variant that `WanTransformer3DModel` configures).

Shape letters: N tokens of all sequences of a pack behind each other, M modulations (distinct timesteps), L context
tokens of all sequences, S sequences, H heads, D head size; dim = H D. Latents are [C, T, H, W] for each sequence.

Source: Wan (arXiv 2503.20314). All layers but attention are token-wise, so sequences of any shapes share a pass; a
token finds its timestep's modulation by index, so one mechanism serves a timestep per request and per latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.adaln import adaln, gated_residual, gated_residual_adaln, gated_residual_norm
from ....kernels.attention import attention
from ....kernels.patch_embed import patch_embed, unpatchify
from ....kernels.qk_norm_rope import qk_norm_rope
from ....kernels.rms_norm import rms_norm
from ...layers.linear import Linear
from ...layers.pack import Context, Pack, TextContext
from .config import WanConfig as WanConfig

TEXT_ROWS = 512  # Wan pads every prompt to this many rows and attends to all of them

# Of the feed-forward at a time, a bound by arithmetic for an H100. 32,768 rows are 256 x 54 and 256 x 20 tiles of
# 128 x 256 for the 14B model's two products, 104.7 and 38.8 turns of 132 SMs (1.3B: 67.9 and 11.6): at most 3 % idle in
# the last. Reading the weights once more takes 0.6 % of a part's time, copying its result into place 1.7 to 2.6 %.
FFN_ROWS = 32768


class WanDenoiser(nn.Module):
    """`embed -> trunk -> head`: velocity of every sequence of a pack."""

    # Kept in fp32 whatever the weights' dtype, as the reference keeps them (`_keep_in_fp32_modules`).
    fp32_parameters = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    # Left over in published I2V checkpoints; the reference ignores it too.
    unexpected_keys = ("norm_added_q",)

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        kernel = config.in_channels, *config.patch_size
        self.patch_embedding = Linear(math.prod(kernel), {"patch_embedding": config.dim}, kernel)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.dim))
        self.proj_out = Linear(config.dim, {"proj_out": config.out_channels * math.prod(config.patch_size)})

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def forward(self, pack: Pack, latents: Sequence[Tensor], timesteps: Tensor) -> list[Tensor]:
        """Velocities [C_out, T, H, W] of the pack's sequences.

        latents: one [C_in, T, H, W] a sequence; timesteps [M] fp32, the pack's distinct ones, in the order that
        `pack.modulation_ids` counts them.
        """
        tokens = self.embed(latents)
        embedding, modulation = self.condition_embedder.embed_time(timesteps, self.dtype)
        tokens = self.trunk(tokens, modulation, pack)
        return self.head(tokens, embedding, pack)

    def embed(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents of S sequences -> tokens [N, dim]."""
        layer = self.patch_embedding
        return patch_embed(list(latents), layer.weight, layer.bias, self.config.patch_size)

    def trunk(self, tokens: Tensor, modulation: Tensor, pack: Pack, blocks: slice = slice(None)) -> Tensor:
        """Tokens [N, dim] through a range of blocks; modulation [M, 6, dim]."""
        first = range(len(self.blocks))[blocks].start
        for index, block in enumerate(self.blocks[blocks], start=first):
            tokens = block(tokens, modulation, pack, index)
        return tokens

    def head(self, tokens: Tensor, embedding: Tensor, pack: Pack) -> list[Tensor]:
        """Tokens [N, dim] -> velocities [C_out, T, H, W], one a sequence; embedding [M, dim] of the timesteps."""
        shift, scale = (self.scale_shift_table + embedding[:, None]).unbind(1)
        tokens = adaln(tokens, shift, scale, pack.modulation_ids, self.config.eps)
        return unpatchify(self.proj_out(tokens), pack.grids, self.config.patch_size)

    def encode_text(self, embeddings: Tensor) -> TextContext:
        """Keys and values of a prompt for every block, computed once.

        embeddings [n, text_dim], the text encoder's rows without padding. The reference pads to 512 zero rows and
        attends to all: these become identical keys, so one row with bias log(512 - n) stands for them exactly.
        """
        num_padding = TEXT_ROWS - len(embeddings)
        bias = torch.zeros(len(embeddings), device=embeddings.device)
        if num_padding > 0:
            embeddings = F.pad(embeddings, (0, 0, 0, 1))
            bias = F.pad(bias, (0, 1), value=math.log(num_padding))
        return TextContext(keys_values=self.text_keys_values(embeddings), key_bias=bias)

    def text_keys_values(self, rows: Tensor) -> Tensor:
        """Text rows [L, text_dim] -> keys and values of every block [num_layers, 2, L, H, D]."""
        rows = self.condition_embedder.text_embedder(rows.to(self.dtype))
        return torch.stack([block.attn2.text_keys_values(rows) for block in self.layers])

    def encode_image(self, embeddings: Tensor) -> Tensor:
        """CLIP rows [L, image_dim] -> keys and values of every block [num_layers, 2, L', H, D]."""
        rows = self.condition_embedder.image_embedder(embeddings.to(self.dtype))
        return torch.stack([block.attn2.image_keys_values(rows) for block in self.layers])

    @property
    def layers(self) -> list[WanBlock]:
        """The blocks, with their type."""
        return [cast(WanBlock, block) for block in self.blocks]


class WanBlock(nn.Module):
    """Self-attention, cross-attention to text (and image), feed-forward; two of them modulated by the timestep."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else None
        self.attn2 = CrossAttention(config)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(self, x: Tensor, modulation: Tensor, pack: Pack, index: int) -> Tensor:
        table = self.scale_shift_table + modulation.float()
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.unbind(1)
        ids = pack.modulation_ids
        q, k, v = self.attn1.project(adaln(x, shift_1, scale_1, ids, self.eps), pack)
        y = self.attn1.attend(q, k, v, pack).flatten(1)
        del q, k, v  # 5 dim a token on CUDA: v is a view of all three projections, q and k are copies
        y = self.attn1.out(y)
        if self.norm2 is None:
            x = normed = gated_residual(x, y, gate_1, ids)
        else:
            x, normed = gated_residual_norm(x, y, gate_1, self.norm2.weight, self.norm2.bias, ids, self.eps)
        del y  # here and below: otherwise it lives through what comes next, dim a token more
        y = self.attn2(normed, pack, index)
        x, normed = gated_residual_adaln(x, y, None, shift_2, scale_2, ids, self.eps)
        del y
        y = self.ffn(normed)
        del normed
        return gated_residual(x, y, gate_2, ids)


class SelfAttention(nn.Module):
    """`project`, `attend` and `out`, one after the other."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(dim, {"to_q": dim, "to_k": dim, "to_v": dim})
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.out = Linear(dim, {"to_out.0": dim})
        self.eps = config.eps

    def project(self, x: Tensor, pack: Pack) -> tuple[Tensor, Tensor, Tensor]:
        """[N, dim] -> queries, keys and values [N, H, D].

        The block calls each part by itself: a `forward` would hold its argument meanwhile, dim a token more.
        """
        weights = self.norm_q.weight, self.norm_k.weight
        return qk_norm_rope(self.qkv(x), *weights, pack.rotation, self.num_heads, self.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
        """[N, H, D] each; what a compiled trunk leaves to eager mode, where the pack's lengths are read."""
        return attention(q, k, v, pack.cu_seqlens)


class CrossAttention(nn.Module):
    """Queries of the video against keys and values of the text, and of an image where the checkpoint has them."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_attention_heads
        self.q = Linear(dim, {"to_q": dim})
        self.kv = Linear(dim, {"to_k": dim, "to_v": dim})
        self.norm_q = nn.RMSNorm(dim, config.eps)
        self.norm_k = nn.RMSNorm(dim, config.eps)
        self.out = Linear(dim, {"to_out.0": dim})
        self.eps = config.eps
        if config.added_kv_proj_dim is not None:
            self.added_kv = Linear(config.added_kv_proj_dim, {"add_k_proj": dim, "add_v_proj": dim})
            self.norm_added_k = nn.RMSNorm(dim, config.eps)

    def forward(self, x: Tensor, pack: Pack, index: int) -> Tensor:
        q = rms_norm(self.q(x), self.norm_q.weight, self.eps).unflatten(-1, (self.num_heads, -1))
        return self.out(self.attend(q, pack, index).flatten(1))

    def attend(self, q: Tensor, pack: Pack, index: int) -> Tensor:
        """Queries [N, H, D] against block `index`'s keys of the texts, and of the images where there are any."""
        out = self._attend(q, pack.text, pack, index)
        return out if pack.image is None else out + self._attend(q, pack.image, pack, index)

    def _attend(self, q: Tensor, context: Context, pack: Pack, index: int) -> Tensor:
        keys, values = context.keys_values[index]
        return attention(q, keys, values, pack.cu_seqlens, context.cu_seqlens, context.key_bias)

    def text_keys_values(self, rows: Tensor) -> Tensor:
        """Projected text rows [n, dim] -> [2, n, H, D]."""
        return self._keys_values(self.kv(rows), self.norm_k.weight)

    def image_keys_values(self, rows: Tensor) -> Tensor:
        """Projected image rows [n, dim] -> [2, n, H, D]."""
        return self._keys_values(self.added_kv(rows), self.norm_added_k.weight)

    def _keys_values(self, kv: Tensor, norm_weight: Tensor) -> Tensor:
        keys, values = kv.chunk(2, dim=-1)
        keys = rms_norm(keys, norm_weight, self.eps)
        return torch.stack((keys, values)).unflatten(-1, (self.num_heads, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = Linear(dim, {"net.0.proj": hidden_dim})
        self.down = Linear(hidden_dim, {"net.2": dim})

    def forward(self, x: Tensor) -> Tensor:
        """[N, dim] -> [N, dim]; above FFN_ROWS in parts of equally many rows, so that `hidden_dim` is held of few."""
        if len(x) <= FFN_ROWS or torch.compiler.is_compiling():
            return self.down(self.up(x, "gelu_tanh"))
        y = torch.empty_like(x)
        rows = math.ceil(len(x) / math.ceil(len(x) / FFN_ROWS))
        for part, result in zip(x.split(rows), y.split(rows), strict=True):
            result.copy_(self.down(self.up(part, "gelu_tanh")))
        return y


class ConditionEmbedder(nn.Module):
    """Timesteps -> modulation; text and image rows -> the transformer's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, config.dim, config.dim, "linear_1", "linear_2")
        self.time_proj = Linear(config.dim, {"time_proj": 6 * config.dim})
        self.text_embedder = TextProjection(config.text_dim, config.dim, config.dim, "linear_1", "linear_2")
        if config.image_dim is not None:
            self.image_embedder = ImageProjection(config.image_dim, config.dim, config.pos_embed_seq_len)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps [M] -> embedding [M, dim] and modulation [M, 6, dim], in `dtype`."""
        half = self.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        hidden = F.silu(self.time_embedder.first(waves))
        embedding = self.time_embedder.second(hidden).to(dtype)
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class TwoLayers(nn.Module):
    """Two linear layers under the checkpoint's names for them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, first: str, second: str) -> None:
        super().__init__()
        self.first = Linear(in_dim, {first: hidden_dim})
        self.second = Linear(hidden_dim, {second: out_dim})


class TextProjection(TwoLayers):
    def forward(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows, "gelu_tanh"))


class ImageProjection(nn.Module):
    """CLIP rows -> dim; with a position embedding the rows of first and last frame are one sequence (FLF2V)."""

    def __init__(self, in_dim: int, out_dim: int, pos_embed_seq_len: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim, 1e-5)
        self.ff = TwoLayers(in_dim, in_dim, out_dim, "net.0.proj", "net.2")
        self.norm2 = nn.LayerNorm(out_dim, 1e-5)
        self.pos_embed = None
        if pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, pos_embed_seq_len, in_dim))

    def forward(self, rows: Tensor) -> Tensor:
        if self.pos_embed is not None:
            rows = rows + self.pos_embed[0]
        hidden = self.ff.second(F.gelu(self.ff.first(self.norm1(rows.float()).to(rows.dtype))))
        return self.norm2(hidden.float()).to(rows.dtype)
