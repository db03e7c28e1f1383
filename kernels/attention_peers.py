"""Other libraries' variable-length attention, imported when they are first called, and torch's kernels by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel


def _xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Tensor:
    """xformers' `memory_efficient_attention` with a block-diagonal mask; [N, H, D] as `attention` has them."""
    from xformers import ops

    mask = _block_diagonal(tuple(cu_seqlens_q), tuple(cu_seqlens_k), q.device)
    out: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    return out


@lru_cache(maxsize=64)
def _block_diagonal(cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [[stop - start for start, stop in pairwise(cu_seqlens)] for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    return BlockDiagonalMask.from_seqlens(*lengths, device=device)


def _flash3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Tensor:
    """flash-attention 3's `flash_attn_varlen_func`; its versions return the output, or a tuple that begins with it."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *(q, k, v),
        cu_seqlens_q=_uploaded(tuple(cu_seqlens_q), q.device),
        cu_seqlens_k=_uploaded(tuple(cu_seqlens_k), q.device),
        max_seqlen_q=max(stop - start for start, stop in pairwise(cu_seqlens_q)),
        max_seqlen_k=max(stop - start for start, stop in pairwise(cu_seqlens_k)),
    )
    return out[0] if isinstance(out, tuple) else out


@lru_cache(maxsize=64)
def _uploaded(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


PEERS = {"xformers": _xformers, "flash3": _flash3}
TORCH = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
    "flash": (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
}


def torch_uses(name: str) -> AbstractContextManager[None]:
    """Inside it, torch's scaled dot product attention is this kernel of its own, or an error."""
    return sdpa_kernel(TORCH[name][0])


def torch_takes(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this kernel of torch's serves such tensors [N, H, D] on their device."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    return TORCH[name][1](cuda.SDPAParams(query, key, value, None, 0.0, False, False))
