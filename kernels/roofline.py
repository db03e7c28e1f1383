"""What an operation must move and compute at the least: a lower bound of its time on a device of known limits.

Bytes count every tensor once, as if each element were read or written exactly once; what is small beside the token axis
(modulation tables, norm weights, tables of tiles) is counted too, once. Operations count a fused multiply-add as two.
Shape letters: N tokens, M modulations, H heads, D head size, C channels; dim = H D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    num_bytes: int
    operations: int

    def seconds(self, bytes_per_s: float, operations_per_s: float) -> float:
        """The least time on a device with this copy bandwidth and this arithmetic rate."""
        return max(self.num_bytes / bytes_per_s, self.operations / operations_per_s)

    @property
    def intensity(self) -> float:
        """Operations a byte; below a device's ratio of the two, bandwidth bounds."""
        return self.operations / self.num_bytes


def adaln(num_tokens: int, dim: int, itemsize: int, num_modulations: int = 1) -> Cost:
    """Reads x and ids, two fp32 tables; writes y. 9 operations an element: two sums, centring, norm, modulation."""
    tables = 2 * 4 * num_modulations * dim
    return Cost(2 * num_tokens * dim * itemsize + _ids(num_tokens, num_modulations) + tables, 9 * num_tokens * dim)


def gated_residual(num_tokens: int, dim: int, itemsize: int, num_modulations: int = 1) -> Cost:
    """Reads x, y and ids, one fp32 table; writes r."""
    table = 4 * num_modulations * dim
    return Cost(3 * num_tokens * dim * itemsize + _ids(num_tokens, num_modulations) + table, 2 * num_tokens * dim)


def gated_residual_adaln(num_tokens: int, dim: int, itemsize: int, num_modulations: int = 1) -> Cost:
    """Reads x, y and ids, three fp32 tables; writes r and its norm."""
    tables = 3 * 4 * num_modulations * dim
    return Cost(4 * num_tokens * dim * itemsize + _ids(num_tokens, num_modulations) + tables, 11 * num_tokens * dim)


def rms_norm(num_tokens: int, dim: int, itemsize: int) -> Cost:
    """Reads x and the weight; writes y."""
    return Cost((2 * num_tokens + 1) * dim * itemsize, 4 * num_tokens * dim)


def qk_norm_rope(num_tokens: int, num_heads: int, head_dim: int, itemsize: int, per_head: bool = False) -> Cost:
    """Reads q, k, two weights and the rotation; writes q and k. v is not touched."""
    dim = num_heads * head_dim
    weights = 2 * (head_dim if per_head else dim) * itemsize
    return Cost(4 * num_tokens * dim * itemsize + 4 * num_tokens * head_dim + weights, 2 * 7 * num_tokens * dim)


def attention(
    q_lens: Sequence[int], k_lens: Sequence[int], num_heads: int, head_dim: int, itemsize: int, biased: bool = False
) -> Cost:
    """Reads q, k, v and a fp32 bias; writes the output. Two products a pair of query and key; softmax is not counted.

    Sequence i has q_lens[i] queries and k_lens[i] keys.
    """
    num_queries, num_keys, dim = sum(q_lens), sum(k_lens), num_heads * head_dim
    pairs = sum(q * k for q, k in zip(q_lens, k_lens, strict=True))
    return Cost(2 * (num_queries + num_keys) * dim * itemsize + 4 * num_keys * biased, 4 * pairs * dim)


def quantize_rows(num_tokens: int, dim: int, itemsize: int) -> Cost:
    """Reads x; writes a byte an element and a fp32 scale a row. 3 operations an element: maximum, product, rounding."""
    return Cost(num_tokens * dim * (itemsize + 1) + 4 * num_tokens, 3 * num_tokens * dim)


def linear_quantized(num_tokens: int, num_inputs: int, num_outputs: int, itemsize: int) -> Cost:
    """The product alone: reads rows and weight of a byte an element, their fp32 scales and the bias; writes y."""
    operands = (num_tokens + num_outputs) * num_inputs + 4 * (num_tokens + num_outputs)
    return Cost(operands + (num_tokens + 1) * num_outputs * itemsize, 2 * num_tokens * num_inputs * num_outputs)


def quantized_attention(
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    num_heads: int,
    head_dim: int,
    itemsize: int,
    form: str,
    biased: bool = False,
) -> Cost:
    """`attention`, and what quantising moves: 8 bits and a scale a token are written and read again, and k (for fp8
    v too) is read once more for its columns. Half of the operations are of 8 bits, with fp8 all."""
    exact, dim = attention(q_lens, k_lens, num_heads, head_dim, itemsize, biased), num_heads * head_dim
    num_queries, num_keys = sum(q_lens), sum(k_lens)
    columns = num_keys * dim * (2 if form == "fp8" else 1)
    written = num_queries * dim + columns + 4 * num_heads * (num_queries + num_keys)
    return Cost(exact.num_bytes + 2 * written + columns * itemsize, exact.operations)


def sparse_attention(
    num_queries: int,
    num_keys: int,
    num_pairs: int,
    num_heads: int,
    head_dim: int,
    itemsize: int,
    biased: bool = False,
) -> Cost:
    """Reads q, k, v and a fp32 bias; writes the output. num_pairs of query and key are multiplied, in all heads."""
    num_bytes = 2 * (num_queries + num_keys) * num_heads * head_dim * itemsize + 4 * num_keys * biased
    return Cost(num_bytes, 4 * num_pairs * head_dim)


def patch_embed(
    num_tokens: int, channels: int, patch_size: Sequence[int], dim: int, latent_itemsize: int, itemsize: int
) -> Cost:
    """Reads the latents, weight and bias; writes the tokens."""
    k = channels * patch_size[0] * patch_size[1] * patch_size[2]
    num_bytes = num_tokens * k * latent_itemsize + (num_tokens * dim + k * dim + dim) * itemsize
    return Cost(num_bytes, 2 * num_tokens * k * dim)


def unpatchify(num_tokens: int, channels: int, patch_size: Sequence[int], itemsize: int) -> Cost:
    """Reads the tokens and writes the latents; it computes nothing."""
    return Cost(2 * num_tokens * channels * patch_size[0] * patch_size[1] * patch_size[2] * itemsize, 0)


def solver_step(
    channels: int,
    num_positions: int,
    velocity_itemsize: int,
    guided: bool,
    num_predictor: int,
    num_corrector: int = 0,
    preview_side: int = 0,
) -> Cost:
    """Reads latents, velocities and what the sums read; writes the next latents, the clean prediction, the sample."""
    size = channels * num_positions
    num_earlier = max(num_predictor, num_corrector) - 2
    states = 3 + num_earlier + 2 * (num_corrector > 0)
    num_pixels = 3 * preview_side**2
    num_bytes = size * (4 * states + velocity_itemsize * (1 + guided)) + num_pixels * num_positions
    operations = size * (2 + 3 * guided + 2 * (num_predictor + num_corrector) + 2 * num_pixels)
    return Cost(num_bytes + 4 * num_pixels * (channels + 1), operations)


def _ids(num_tokens: int, num_modulations: int) -> int:
    """A table of one row is not indexed."""
    return 8 * num_tokens if num_modulations > 1 else 0
