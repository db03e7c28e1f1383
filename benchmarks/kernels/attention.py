"""Attention at the lengths of Wan's clips, and a ragged pack of eight, by every backend that can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...kernels import attention_peers, backends, roofline
from ...kernels.attention import attention, attention_by, plain
from ..harness import Missing, Run
from .case import Case, Make, Suite, compiled

LENGTHS = (4096, 8192, 16384, 32760, 75600)  # the last two: 81 frames at 832 x 480 and 1280 x 720
HEADS = {128: 24, 64: 48}  # head size -> heads
RAGGED = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
SMALL_LENGTHS, SMALL_RAGGED = (256, 1024), (16, 32, 48, 64, 96, 128, 192, 256)


def cases(suite: Suite) -> Iterator[Case]:
    lengths = LENGTHS if suite.on_gpu else SMALL_LENGTHS
    for head_size, heads in HEADS.items():
        heads = heads if suite.on_gpu else 2
        for length in lengths:
            if not (suite.quick and head_size == 64 and length > 32760):
                yield _case(suite, "attention", f"{length} tokens", (length,), heads, head_size)
        ragged = RAGGED if suite.on_gpu else SMALL_RAGGED
        words = f"eight sequences of {ragged[0]} to {ragged[-1]} tokens"
        yield _case(suite, "attention_ragged", words, ragged, heads, head_size)


def _case(suite: Suite, op: str, words: str, lengths: tuple[int, ...], heads: int, head_size: int) -> Case:
    cost = roofline.attention(lengths, lengths, heads, head_size, suite.dtype.itemsize)
    words = f"{words}, {heads} heads of {head_size}"
    return Case(op, words, cost, suite.dtype, partial(build, suite, op, lengths, heads, head_size))


def build(suite: Suite, op: str, lengths: tuple[int, ...], heads: int, head_size: int) -> dict[str, Make]:
    cu_seqlens = tuple(accumulate(lengths, initial=0))
    q, k, v = (suite.draw(cu_seqlens[-1], heads, head_size) for _ in range(3))
    names = backends.CHOICES["attention"]
    makes: dict[str, Make] = {name: partial(by, name, q, k, v, cu_seqlens, cu_seqlens) for name in names}
    if not suite.on_gpu:
        makes = {
            "skylapse": lambda: partial(attention, q, k, v, cu_seqlens),
            "products": lambda: partial(plain, q, k, v, cu_seqlens, cu_seqlens, None),
        }
    if op == "attention_ragged":
        makes |= {"loop": lambda: partial(_loop, q, k, v, cu_seqlens), "padded": lambda: _padded(q, k, v, lengths)}
    elif not suite.on_gpu:
        makes["torch.compile"] = lambda: compiled(partial(_loop, q, k, v, cu_seqlens))
    return makes


def by(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...]) -> Run:
    """One backend on a GPU. Missing says why it cannot serve there."""
    major, minor = torch.cuda.get_device_capability(q.device)
    backends.select({"attention": name})
    choice = backends.decide("attention", 10 * major + minor, lambda: backends.fault_of_triton(q.device))
    backends.select({})
    if choice.fallback:
        raise Missing(choice.reason.rpartition("cannot serve: ")[2])
    if name in attention_peers.TORCH and not attention_peers.torch_takes(name, q, k, v):
        raise Missing("torch does not use it for such tensors here")
    return partial(attention_by, name, q, k, v, cu_seqlens_q, cu_seqlens_k)


def _loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
    """One call of torch's a sequence."""
    parts = []
    for start, stop in pairwise(cu_seqlens):
        query, key, value = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1))
    return torch.cat(parts)


def _padded(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Run:
    """Sequences padded to the longest and the padding masked, as a batch of one shape; padding them is not timed."""
    query, key, value = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
    there = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    return partial(F.scaled_dot_product_attention, query, key, value, there[:, None, None])
