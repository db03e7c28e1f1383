"""The config of Wan's diffusion transformer, and the values that it may have; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.json_file import shown, within

MAX_LAYERS, MAX_WIDTH = 256, 2**17  # the largest published ones have 40 layers of 5,120; more is a slip of the pen
QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True)
class WanConfig:
    """The fields of diffusers' `WanTransformer3DModel` config.json; ValueError names one that is out of bounds."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = QK_NORM
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        within(self, 1, 16, "patch_size")
        if self.patch_size[0] != 1:  # a clip has an odd number of latent frames, or any
            raise ValueError(f"patch_size must begin with 1, got {shown(self.patch_size)}")
        within(self, 1, MAX_LAYERS, "num_layers")
        within(self, 1, 1024, "num_attention_heads")
        within(self, 2, 1024, "attention_head_dim", "freq_dim", even=True)  # pairs are rotated; cosines and sines
        within(self, 1, 4096, "in_channels", "out_channels")
        within(self, 1, MAX_WIDTH, "text_dim", "ffn_dim", "image_dim", "rope_max_seq_len", "pos_embed_seq_len")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be above 0 and below 1, got {self.eps}")
        if self.qk_norm != QK_NORM:
            raise ValueError(f'qk_norm must be "{QK_NORM}", got "{self.qk_norm}"')
        wanted = None if self.image_dim is None else self.dim
        if self.added_kv_proj_dim != wanted:
            why = "without image_dim" if wanted is None else "(heads times their size) beside image_dim"
            got = "null" if self.added_kv_proj_dim is None else self.added_kv_proj_dim
            raise ValueError(f"added_kv_proj_dim must be {'null' if wanted is None else wanted} {why}, got {got}")
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError(f"pos_embed_seq_len must be null without image_dim, got {self.pos_embed_seq_len}")

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim
