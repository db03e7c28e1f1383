"""Variable-length attention over packed sequences: o_i = sum_j softmax_j(q_i k_j / sqrt(D) + b_j) v_j in each.

Shape letters: N query tokens, M key tokens (all sequences of a pack behind each other), H heads, D head size.
The Triton kernels are in attention_kernels.py, other libraries' in attention_peers.py; attention_backends.py chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .attention_backends import call_of
from .attention_kernels import launch, shipped, unfit
from .attention_peers import PEERS, by_runs
from .attention_quantized import QUANTIZED, quantized_attention

__all__ = ["attention", "attention_with_lse", "shipped"]

QUERY_ROWS = 1024  # queries whose logits are held at once where the log-sum-exp is computed by plain products


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
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    name = _backend(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, with_lse=False)
    return attention_by(name, q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)


def attention_by(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None = None,
) -> Tensor:
    """`attention` by one of `backends.CHOICES`, which must take these tensors; for who compares them."""
    if name in ("triton", "triton-ws"):
        return _op(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, False, name == "triton-ws")[0]
    if name in QUANTIZED:
        return quantized_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, QUANTIZED[name])[0]
    if name in PEERS:
        return PEERS[name](q, k, v, cu_seqlens_q, cu_seqlens_k)
    return _sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...] | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each query's softmax sum [H, N] fp32: what parts of the keys are merged by."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    name = _backend(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, with_lse=True)
    return attention_with_lse_by(name, q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)


def attention_with_lse_by(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` by one of `backends.CHOICES`, which must take these tensors; others' are plain products."""
    if name in ("triton", "triton-ws"):
        return _op(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, True, name == "triton-ws")
    if name in QUANTIZED:
        return quantized_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, QUANTIZED[name], with_lse=True)
    return plain(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)


def _backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    key_bias: Tensor | None,
    with_lse: bool,
) -> str:
    """What serves these tensors; kernels have no backward, and other devices than CUDA have torch alone."""
    if q.device.type != "cuda" or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return "sdpa"
    biased = with_lse or key_bias is not None
    name = _chosen(q.device, tuple(cu_seqlens_q), tuple(cu_seqlens_k), q.shape[1], q.shape[2], biased)
    if name != "sdpa" and (reason := unfit(q, k, v, key_bias)) is not None:
        backends.tell_once(f"attention: sdpa instead of {name}: {reason}")
        return "sdpa"
    return name


@torch.compiler.assume_constant_result  # the choice is made, and logged, while a graph is traced
def _chosen(
    device: torch.device,
    cu_seqlens_q: tuple[int, ...],
    cu_seqlens_k: tuple[int, ...],
    num_heads: int,
    head_size: int,
    biased: bool,
) -> str:
    call = call_of(cu_seqlens_q, cu_seqlens_k, num_heads, head_size, biased)
    return backends.current().choose("attention", device, call).name


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], bias: Tensor | None
) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:]:
        raise ValueError(f"shapes differ: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    for name, cu_seqlens, tokens in (("cu_seqlens_q", cu_seqlens_q, len(q)), ("cu_seqlens_k", cu_seqlens_k, len(k))):
        if isinstance(cu_seqlens, Tensor):  # type: ignore[unreachable]
            raise ValueError(f"{name} must be host integers, got a tensor of {cu_seqlens.dtype}")
        ends = (cu_seqlens[0], cu_seqlens[-1]) if cu_seqlens else None
        if ends != (0, tokens) or min(_lengths(cu_seqlens), default=0) <= 0:
            raise ValueError(f"{name} must rise from 0 to {tokens} without empty sequences, got {cu_seqlens}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"{len(cu_seqlens_q) - 1} query sequences, but {len(cu_seqlens_k) - 1} key sequences")
    if bias is not None and bias.shape != (len(k),):
        raise ValueError(f"key_bias must be [{len(k)}], got {tuple(bias.shape)}")


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(cu_seqlens)]


# --- torch, on any device ---------------------------------------------------------------------------------------------


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], key_bias: Tensor | None
) -> Tensor:
    return by_runs(F.scaled_dot_product_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)


def plain(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By products in fp32, a block of queries at a time: SDPA keeps its log-sum-exp to itself."""
    outputs, sums = [], []
    for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
        keys = k[k_start:k_stop].float().permute(1, 2, 0) / math.sqrt(q.shape[2])
        values = v[k_start:k_stop].float().transpose(0, 1)
        for queries in q[q_start:q_stop].float().transpose(0, 1).split(QUERY_ROWS, dim=1):
            logits = queries @ keys
            if key_bias is not None:
                logits = logits + key_bias[k_start:k_stop].float()
            lse = logits.logsumexp(-1)
            hidden = lse[..., None] == -math.inf  # every key has a bias of -inf: zeros, as the kernel has it
            weights = (logits - lse[..., None].masked_fill(hidden, 0)).exp()
            outputs.append((weights @ values).transpose(0, 1))
            sums.append(lse)
    return torch.cat(outputs).to(q.dtype), torch.cat(sums, dim=1)


# --- as an operation of torch -----------------------------------------------------------------------------------------


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    with_lse: bool,
    warp_specialized: bool,
) -> tuple[Tensor, Tensor]:
    if with_lse:
        return plain(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    out = _sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32)


_op = torch.library.custom_op("skylapse::attention", _torch, mutates_args=(), device_types="cpu")
_op.register_kernel("cuda")(launch)


@_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None,
    with_lse: bool,
    warp_specialized: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]) if with_lse else (0,), dtype=torch.float32)
