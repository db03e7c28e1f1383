"""Other libraries' attention and torch's kernels by name, imported when they are first called.

Shape letters: B sequences of one shape, H heads, N query tokens, M key tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .tables import PerLayout, send, upload_cu_seqlens

aten = torch.ops.aten
Peer = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]  # [N, H, D] as `attention` has them


def _xformers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Tensor:
    """xformers' `memory_efficient_attention` with a block-diagonal mask."""
    from xformers import ops

    mask = _block_diagonal(tuple(cu_seqlens_q), tuple(cu_seqlens_k), q.device)
    out: Tensor = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]
    return out


@PerLayout
def _block_diagonal(cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = [[stop - start for start, stop in pairwise(cu_seqlens)] for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
    mask = BlockDiagonalMask.from_seqlens(*lengths, device=torch.device("cpu"))
    for info in (mask.q_seqinfo, mask.k_seqinfo):  # its own upload would wait for the stream
        tables = {name: x for name, x in vars(info).items() if isinstance(x, Tensor) and x.device.type == "cpu"}
        vars(info).update({name: send(x, device) for name, x in tables.items()})
    return mask


def _flash3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Tensor:
    """flash-attention 3's `flash_attn_varlen_func`; its versions return the output, or a tuple that begins with it."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        *(q, k, v),
        cu_seqlens_q=_uploaded(tuple(cu_seqlens_q), q.device),
        cu_seqlens_k=_uploaded(tuple(cu_seqlens_k), q.device),
        max_seqlen_q=_longest(cu_seqlens_q),
        max_seqlen_k=_longest(cu_seqlens_k),
    )
    return out[0] if isinstance(out, tuple) else out


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Tensor:
    """torch's `varlen_attn`, flash-attention 2. After these seven arguments 2.11 and 2.13 differ."""
    from torch.nn.attention.varlen import varlen_attn

    starts_q, starts_k = (_uploaded(tuple(cu_seqlens), q.device) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    out = varlen_attn(q, k, v, starts_q, starts_k, _longest(cu_seqlens_q), _longest(cu_seqlens_k))
    assert isinstance(out, Tensor)  # a pair where the log-sum-exp is asked for
    return out


_uploaded = PerLayout(upload_cu_seqlens)


def _longest(cu_seqlens: Sequence[int]) -> int:
    return max(stop - start for start, stop in pairwise(cu_seqlens))


# --- a call for each run of sequences of one shape, [B, H, N, D] and [B, H, M, D] -------------------------------------


def by_runs(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int],
    key_bias: Tensor | None = None,
) -> Tensor:
    """Neighbours of one shape are a batch of `attend`, which gets a bias as a mask [B, 1, N, M]. Returns [N, H, D]."""
    lengths = [
        (q_stop - q_start, k_stop - k_start)
        for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    ]
    outputs, q_end, k_end = [], 0, 0
    for (q_len, k_len), run in groupby(lengths):
        batch = sum(1 for _ in run)
        q_start, q_end = q_end, q_end + batch * q_len
        k_start, k_end = k_end, k_end + batch * k_len
        queries = q[q_start:q_end].unflatten(0, (batch, q_len)).transpose(1, 2)
        keys = k[k_start:k_end].unflatten(0, (batch, k_len)).transpose(1, 2)
        values = v[k_start:k_end].unflatten(0, (batch, k_len)).transpose(1, 2)
        mask = []
        if key_bias is not None:
            bias = key_bias[k_start:k_end].to(q.dtype).view(batch, 1, 1, k_len)
            mask = [bias.expand(batch, 1, q_len, k_len)]
        outputs.append(attend(queries, keys, values, *mask).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's kernel itself: `sdpa_kernel` would set flags of the whole process, which the VAE's thread would see."""
    out: Tensor = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)[0]  # no mask, no log-sum-exp
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's flash-attention 2 itself, which wants head sizes that 8 divides; see `_cudnn`."""
    head_size = q.shape[3]
    if missing := -head_size % 8:  # zeros change no product; as torch's scaled_dot_product_attention has it
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    out: Tensor = aten._scaled_dot_product_flash_attention.default(q, k, v, scale=head_size**-0.5)[0]
    return out[..., :head_size]


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention's `sageattn`: products on 8 bits, the kernels by its own choice for the architecture.

    `sageattn_varlen` is not called: it smooths keys by their mean over the whole pack, so that a request's video would
    depend on its neighbours.
    """
    from sageattention import sageattn

    out: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out


PEERS: dict[str, Peer] = {
    "xformers": _xformers,
    "flash3": _flash3,
    "varlen": _varlen,
    "cudnn": partial(by_runs, _cudnn),
    "flash": partial(by_runs, _flash),
    "sage": partial(by_runs, _sage),
}
