"""Attention at the lengths of Wan's clips, and a ragged pack of eight, by every backend that can be asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...kernels import backends, roofline
from ...kernels.attention import attention, attention_by, plain
from ...kernels.attention_backends import Call, call_of
from ..harness import Missing, Run
from .case import Case, Make, Suite, compiled

LENGTHS = (4096, 8192, 16384, 32760, 75600)  # the last two: 81 frames at 832 x 480 and 1280 x 720
HEADS = {128: 24, 64: 48}  # head size -> heads
RAGGED = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
RAGGED_SHORT = (64, 128, 192, 256, 320, 384, 448, 512)  # not worth a call each: attention_backends.RUN_OPERATIONS
SMALL_LENGTHS, SMALL_RAGGED = (256, 1024), (16, 32, 48, 64, 96, 128, 192, 256)


def cases(suite: Suite) -> Iterator[Case]:
    lengths = LENGTHS if suite.on_gpu else SMALL_LENGTHS
    for head_size, heads in HEADS.items():
        heads = heads if suite.on_gpu else 2
        for length in lengths:
            if not (suite.quick and head_size == 64 and length > 32760):
                yield case_of(suite, "attention", f"{length} tokens", (length,), heads, head_size)
        for ragged in (RAGGED, RAGGED_SHORT) if suite.on_gpu else (SMALL_RAGGED,):
            yield case_of(suite, "attention_ragged", "eight sequences", ragged, heads, head_size)


def case_of(suite: Suite, op: str, words: str, lengths: tuple[int, ...], heads: int, head_size: int) -> Case:
    """`call_in` reads its name, so `words` of a single sequence are "75600 tokens"."""
    cost = roofline.attention(lengths, lengths, heads, head_size, suite.dtype.itemsize)
    listed = f" ({', '.join(map(str, lengths))})" if len(lengths) > 1 else ""
    words = f"{words}{listed}, {heads} heads of {head_size}"
    return Case(op, words, cost, suite.dtype, partial(_build, suite, op, lengths, heads, head_size))


def call_in(name: str) -> Call:
    """The kind of call that a case is, as the runtime sees it; ValueError for a name that says no lengths."""
    found = re.search(r"(?:^(\d+) tokens|\((\d[\d, ]*)\)), (\d+) heads of (\d+)$", name)
    if found is None:
        raise ValueError(f"a case of attention must say its lengths and heads, got {name!r}")
    one, several, heads, head_size = found.groups()
    cu_seqlens = tuple(accumulate(map(int, (one or several).split(",")), initial=0))
    return call_of(cu_seqlens, cu_seqlens, int(heads), int(head_size), False)


def _build(suite: Suite, op: str, lengths: tuple[int, ...], heads: int, head_size: int) -> dict[str, Make]:
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
    call = call_of(cu_seqlens_q, cu_seqlens_k, q.shape[1], q.shape[2], False)
    choice = backends.Backends({"attention": name}).choose("attention", q.device, call)
    if choice.name != name:
        raise Missing(choice.reason.partition("cannot serve: ")[2].partition("; ")[0])
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
