"""Variable-length attention over packed sequences: o_i = sum_j softmax_j(q_i k_j / sqrt(D) + b_j) v_j in each.

Shape letters: N query tokens, M key tokens (all sequences of a pack behind each other), H heads, D head size.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...] | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Each sequence's queries attend to the same sequence's keys.

    q [N, H, D], k and v [M, H, D]; cu_seqlens_*: where each sequence starts, and the end (host integers, so nothing
    synchronises); `cu_seqlens_k` defaults to `cu_seqlens_q`. key_bias [M] is added to every logit of that key: a key
    that stands for n identical ones has bias log(n). Returns [N, H, D].
    """
    cu_seqlens_k = cu_seqlens_k or cu_seqlens_q
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    lengths = list(zip(_lengths(cu_seqlens_q), _lengths(cu_seqlens_k), strict=True))
    outputs, q_end, k_end = [], 0, 0
    for (q_len, k_len), run in groupby(lengths):  # neighbours of one shape share one call
        batch = sum(1 for _ in run)
        q_start, q_end = q_end, q_end + batch * q_len
        k_start, k_end = k_end, k_end + batch * k_len
        queries = q[q_start:q_end].unflatten(0, (batch, q_len)).transpose(1, 2)
        keys = k[k_start:k_end].unflatten(0, (batch, k_len)).transpose(1, 2)
        values = v[k_start:k_end].unflatten(0, (batch, k_len)).transpose(1, 2)
        bias = None
        if key_bias is not None:
            bias = key_bias[k_start:k_end].to(q.dtype).view(batch, 1, 1, k_len).expand(batch, 1, q_len, k_len)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _lengths(cu_seqlens: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens)]


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], bias: Tensor | None
) -> None:
    for name, cu_seqlens, tokens in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or min(_lengths(cu_seqlens), default=0) <= 0:
            raise ValueError(f"{name} must rise from 0 to {tokens} without empty sequences, got {cu_seqlens}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"{len(cu_seqlens_q) - 1} query sequences, but {len(cu_seqlens_k) - 1} key sequences")
    if k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"shapes differ: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if bias is not None and bias.shape != (len(k),):
        raise ValueError(f"key_bias must be [{len(k)}], got {tuple(bias.shape)}")
