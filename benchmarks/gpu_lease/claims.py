"""Claims that `bench kernels` does not make: pointers beside descriptors, lossy and sparse attention, convolutions.

And any claim again as a captured launch, replayed on new numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...kernels import attention, reference
from ...kernels.attention_quantized import QUANTIZED, quantized_attention
from ...kernels.attention_sparse import BlockLists, build_layout, sparse_attention_with_lse
from ...kernels.conv3d import conv3d
from ...kernels.linear import linear
from ...kernels.resample_conv import downsample_conv2d, upsample_conv2d
from ..kernels.case import Suite
from ..kernels.checks import LOSSY, TOLERANCES, Claim

LENGTHS = [(1, 1), (130, 64), (65, 513), (300, 299)]  # queries and keys, about and beyond a tile
HEADS = 2
SPARSE = [((130, 1, 200), (64, 1, 300, 33)), ((5,), (129,))]  # sizes of blocks of queries and of keys, a sequence each


def more_claims(suite: Suite, seed: int) -> Iterator[Claim]:
    torch.manual_seed(seed)
    for size in (64, 96, 128):
        for skewed in (False, True):
            for biased in (False, True):
                yield _attention(suite, size, skewed, biased)
            yield _sparse(suite, size, skewed, seed)
        for name in QUANTIZED if size != 96 else ():
            yield _quantized(suite, name, size)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _convolutions(suite, dtype)
        x, weight, bias = (suite.draw(*shape, dtype=dtype) for shape in ((77, 192), (320, 192), (320,)))
        yield Claim(
            op="linear",
            case=_words(dtype, "77 tokens, 192 to 320, GELU"),
            run=partial(linear, x, weight, bias, "gelu_tanh"),
            formula=lambda x=x, w=weight, b=bias: F.gelu(x.double() @ w.double().T + b.double(), approximate="tanh"),  # type: ignore[misc]
            tolerance=TOLERANCES[dtype],
        )


def replayed(claim: Claim, device: torch.device) -> Claim:
    """Return the claim that a captured launch, replayed on new numbers, gives to the bit what a plain call does."""
    given = (claim.run.args, claim.run.keywords) if isinstance(claim.run, partial) else ()
    numbers = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point() and x.itemsize > 1]

    def renew() -> None:
        generator = torch.Generator(device).manual_seed(7)  # the same ones at each call
        for x in numbers:
            x.normal_(generator=generator)

    def run() -> list[Tensor]:
        claim.run()  # compiles, and uploads the layout
        replay, outputs = capture(claim.run, device)
        renew()
        replay()
        return [x.clone() for x in outputs]

    return Claim(f"captured={claim.op}", claim.case, run, claim.run, 0.0)


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture a call: (its replay, the tensors that it writes). Without graphs a second call stands for the replay."""
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = _tensors(run())
        return graph.replay, outputs
    outputs = _tensors(run())

    def again() -> None:
        for target, source in zip(outputs, _tensors(run()), strict=True):
            target.copy_(source)

    return again, outputs


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid inside that fp32 convolutions round their operands to TF32; torch allows it by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _attention(suite: Suite, size: int, skewed: bool, biased: bool) -> Claim:
    cu_q, cu_k = (tuple(accumulate(column, initial=0)) for column in zip(*LENGTHS, strict=True))
    q, k, v = (_rows(suite, n, size, skewed) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    bias = suite.draw(cu_k[-1], dtype=torch.float32) if biased else None
    words = f"head {size}, {'pointers' if skewed else 'descriptors'}{', biased' if biased else ''}"
    run = partial(attention.attention_with_lse, q, k, v, cu_q, cu_k, bias)
    formula = partial(reference.attention, q, k, v, cu_q, cu_k, bias)
    return Claim("attention", _words(q.dtype, words), run, formula, TOLERANCES[q.dtype])


def _quantized(suite: Suite, name: str, size: int) -> Claim:
    cu_q, cu_k = (tuple(accumulate(column, initial=0)) for column in zip(*LENGTHS, strict=True))
    q, k, v = (_rows(suite, n, size, False) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    bias = suite.draw(cu_k[-1], dtype=torch.float32)
    run = partial(quantized_attention, q, k, v, cu_q, cu_k, bias, QUANTIZED[name], True)
    formula = partial(reference.attention, q, k, v, cu_q, cu_k, bias)
    return Claim(f"attention={name}", _words(q.dtype, f"head {size}, biased, lse"), run, formula, LOSSY[name])


def _sparse(suite: Suite, size: int, skewed: bool, seed: int) -> Claim:
    rng = random.Random(seed)
    lists = [_lists(*sizes, rng) for sizes in SPARSE]
    cu_q, cu_k = (
        tuple(accumulate(ends, initial=0))
        for ends in zip(*((own.q_bounds[-1], own.k_bounds[-1]) for own in lists), strict=True)
    )
    q, k, v = (_rows(suite, n, size, skewed) for n in (cu_q[-1], cu_k[-1], cu_k[-1]))
    bias = suite.draw(cu_k[-1], dtype=torch.float32)
    layout = build_layout(cu_q, cu_k, lists, size, q.dtype, suite.device)

    def formula() -> tuple[Tensor, Tensor]:
        """Compute on the CPU: it reads the keys that each query sees, one by one."""
        query, key, value = (x.cpu() for x in (q, k, v))
        return reference.sparse_attention(query, key, value, cu_q, cu_k, [_seen(own) for own in lists], bias.cpu())

    words = f"head {size}, {'pointers' if skewed else 'descriptors'}, lists of {len(lists)} sequences"
    run = partial(sparse_attention_with_lse, q, k, v, layout, bias)
    return Claim("attention_sparse", _words(q.dtype, words), run, formula, TOLERANCES[q.dtype])


def _rows(suite: Suite, num_tokens: int, size: int, skewed: bool) -> Tensor:
    """Draw rows [N, H, D] in bf16; skewed: with starts and strides that the copy engine does not take."""
    return suite.draw(num_tokens, HEADS, size + skewed, dtype=torch.bfloat16)[..., int(skewed) :]


def _lists(q_sizes: Sequence[int], k_sizes: Sequence[int], rng: random.Random) -> BlockLists:
    """Put each block of keys in each list at random, the first one always: a query that sees no key has -inf."""
    q_bounds, k_bounds = (tuple(accumulate(sizes, initial=0)) for sizes in (q_sizes, k_sizes))
    blocks = range(len(k_sizes))
    lists = tuple(
        tuple(tuple(block for block in blocks if block == 0 or rng.random() < 0.5) for _ in q_sizes)
        for _ in range(HEADS)
    )
    return BlockLists(q_bounds, k_bounds, lists)


def _seen(own: BlockLists) -> Tensor:
    """Return the lists as a mask [H, queries, keys] bool."""
    mask = torch.zeros(HEADS, own.q_bounds[-1], own.k_bounds[-1], dtype=torch.bool)
    for head, of_head in enumerate(own.lists):
        for (start, stop), blocks in zip(pairwise(own.q_bounds), of_head, strict=True):
            for block in blocks:
                mask[head, start:stop, own.k_bounds[block] : own.k_bounds[block + 1]] = True
    return mask


def _convolutions(suite: Suite, dtype: torch.dtype) -> Iterator[Claim]:
    """Claim convolutions in true fp32: TF32's error is measured at real width, with the whole VAE."""
    x, weight, bias = (suite.draw(*shape, dtype=dtype) for shape in ((2, 32, 10, 14), (48, 32, 3, 3), (48,)))
    clip, kernel = suite.draw(1, 32, 5, 10, 14, dtype=dtype), suite.draw(48, 32, 3, 3, 3, dtype=dtype)
    x, clip = x.contiguous(memory_format=torch.channels_last), clip.contiguous(memory_format=torch.channels_last_3d)

    def filters() -> tuple[Tensor, Tensor]:
        return _exact(weight), _exact(bias)

    formulas: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Tensor]]] = {
        "upsample_conv2d": (
            upsample_conv2d,
            (x, weight, bias),
            lambda: F.conv2d(F.interpolate(_exact(x), scale_factor=2, mode="nearest"), *filters(), padding=1),
        ),
        "downsample_conv2d": (
            downsample_conv2d,
            (x, weight, bias),
            lambda: F.conv2d(F.pad(_exact(x), (0, 1, 0, 1)), *filters(), stride=2),
        ),
        "conv3d": (
            conv3d,
            (clip, kernel, bias, (1, 1, 1), (0, 1, 1)),
            lambda: F.conv3d(_exact(clip), _exact(kernel), _exact(bias), padding=(0, 1, 1)),
        ),
    }
    for op, (run, given, formula) in formulas.items():
        yield Claim(op, _words(dtype, "32 to 48 channels"), partial(_exactly, run, *given), formula, TOLERANCES[dtype])


def _exact(x: Tensor) -> Tensor:
    return x.double().cpu()


def _exactly(run: Callable[..., Any], *given: Any) -> Any:
    with torch.no_grad(), tf32(False):
        return run(*given)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]


def _words(dtype: torch.dtype, *more: object) -> str:
    return ", ".join([str(dtype).removeprefix("torch."), *map(str, more)])
