"""Every kernel against its formula in float64, on the device that it will be timed on.

Shapes are drawn anew at each run, ragged; fresh memory is filled with NaN, so an element that nobody writes is an
error; and each call is repeated, for a race would give other bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...kernels import adaln, attention, backends, patch_embed, qk_norm_rope, reference, rms_norm, solver_step
from ...kernels.linear_backends import SCALED_MM_ROWS
from ...kernels.linear_quantized import DTYPES, linear_quantized, quantize_rows
from ..harness import Missing, reason_of
from ..record import Check
from .attention import by
from .case import Suite

# Greatest distance of an element, in units of the result's root mean square: some four roundings of 4 units.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}
# What tests/kernels/test_attention_quantized.py holds ours to; SageAttention rounds as our fp8 does.
LOSSY = {"triton-int8": 0.15, "triton-fp8": 0.6, "sage": 0.6}
REPEATS = 20
EPS = 1e-6


@dataclass(frozen=True)
class Claim:
    """`run` computes what `formula` does in float64: a tensor, or several in any nesting."""

    op: str
    case: str
    run: Callable[[], Any]
    formula: Callable[[], Any]
    tolerance: float


def judge(claim: Claim, repeats: int = REPEATS) -> Check:
    """Right, wrong, or what it raised instead."""
    named: dict[str, Any] = dict(op=claim.op, case=claim.case, tolerance=claim.tolerance)
    try:
        with poisoned():
            first = [x.clone() for x in _tensors(claim.run())]
            worst = max(_distance(x, y) for x, y in zip(first, _tensors(claim.formula()), strict=True))
            if not math.isfinite(worst):
                return Check(**named, status="wrong", runs=1, reason="not finite, or never written")
            for run in range(2, repeats + 1):
                if not all(torch.equal(x, y) for x, y in zip(first, _tensors(claim.run()), strict=True)):
                    return Check(**named, status="wrong", runs=run, reason="not what the first run gave")
    except Exception as error:
        return Check(**named, status="failed", reason=reason_of(error))
    return Check(**named, status="ok" if worst <= claim.tolerance else "wrong", worst=worst, runs=repeats)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated inside is NaN (255 in pixels) until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory; the rest of what it does is not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def claims(suite: Suite, seed: int) -> Iterator[Claim]:
    """Of every operation, at shapes drawn by the seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (rng.randrange(65, 300), 5120 if suite.on_gpu else 256):
            yield from _norms(suite, rng.randrange(1, 200), dim, dtype)
        for heads, size in ((1, 16), (3, 64), (5, 96), (12, 128)):
            yield _qk_norm_rope(suite, rng.randrange(1, 200), heads, size, dtype)
        for channels, dim in ((16, 200), (36, 128)):
            grids = [(rng.randrange(1, 4), rng.randrange(1, 9), rng.randrange(1, 9)) for _ in range(3)]
            yield from _patches(suite, grids, channels, dim, dtype)
        for earlier in range(4):
            shape = (16, rng.randrange(1, 5), rng.randrange(1, 20), rng.randrange(1, 20))
            yield _solver_step(suite, shape, earlier, dtype)
        for kind in DTYPES:
            for num_tokens in (rng.randrange(1, 200), SCALED_MM_ROWS + rng.randrange(200)):
                sizes = num_tokens, 16 * rng.randrange(1, 40), 16 * rng.randrange(1, 40)
                yield _linear(suite, kind, *sizes, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        for size in (64, 96, 128):
            lengths = [(1, 1), (63, 64), (65, 129), *((rng.randrange(1, 700), rng.randrange(1, 700)) for _ in range(3))]
            yield from _attention(suite, lengths, size, dtype)


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    wanted = expected.double().cpu()
    return float((actual.double().cpu() - wanted).abs().max() / wanted.square().mean().sqrt())


def _words(dtype: torch.dtype, *more: object) -> str:
    return ", ".join([str(dtype).removeprefix("torch."), *map(str, more)])


def _norms(suite: Suite, num_tokens: int, dim: int, dtype: torch.dtype) -> Iterator[Claim]:
    x, y = suite.draw(num_tokens, 2 * dim, dtype=dtype)[:, :dim] * 3 + 5, suite.draw(num_tokens, dim, dtype=dtype)
    shift, scale, gate, *_ = suite.draw(3, 6, dim, dtype=torch.float32).unbind(1)
    ids, weight = torch.randint(3, (num_tokens,), device=suite.device), suite.draw(dim, dtype=dtype)
    arguments: dict[str, tuple[Any, ...]] = {
        "adaln": (x, shift, scale, ids, EPS),
        "gated_residual": (x, y, gate, ids),
        "rms_norm": (x, weight, EPS),
    }
    for op, given in arguments.items():
        ours = rms_norm.rms_norm if op == "rms_norm" else getattr(adaln, op)
        case = _words(dtype, f"{num_tokens} tokens", f"dim {dim}")
        yield Claim(op, case, partial(ours, *given), partial(getattr(reference, op), *given), TOLERANCES[dtype])

    def in_two(gate: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
        residual = reference.gated_residual(x, y, gate, ids)
        return [residual, reference.adaln(residual.to(dtype), shift, scale, ids, EPS)]

    affine, offset, ones = scale[:1] + 1, shift[:1], torch.ones_like(gate)
    fused: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "": (
            partial(adaln.gated_residual_adaln, x, y, gate, shift, scale, ids, EPS),
            partial(in_two, gate, shift, scale),
        ),
        ", no gate": (
            partial(adaln.gated_residual_adaln, x, y, None, shift, scale, ids, EPS),
            partial(in_two, ones, shift, scale),
        ),
        ", affine norm": (
            partial(adaln.gated_residual_norm, x, y, gate, affine[0], offset[0], ids, EPS),
            partial(in_two, gate, offset, affine - 1),
        ),
    }
    for kind, (run, formula) in fused.items():
        yield Claim("gated_residual_adaln", case + kind, run, formula, TOLERANCES[dtype])


def _qk_norm_rope(suite: Suite, num_tokens: int, heads: int, size: int, dtype: torch.dtype) -> Claim:
    qkv = suite.draw(num_tokens, 3 * heads * size, dtype=dtype)
    weights = suite.draw(heads * size, dtype=dtype), suite.draw(heads * size, dtype=dtype)
    angles = suite.draw(num_tokens, size // 2, dtype=torch.float32) * 3
    given = qkv, *weights, torch.stack((angles.cos(), angles.sin()), -1), heads, EPS
    case = _words(dtype, f"{num_tokens} tokens", f"{heads} heads of {size}")
    ours, formula = partial(qk_norm_rope.qk_norm_rope, *given), partial(reference.qk_norm_rope, *given)
    return Claim("qk_norm_rope", case, ours, formula, TOLERANCES[dtype])


def _patches(
    suite: Suite, grids: list[tuple[int, int, int]], channels: int, dim: int, dtype: torch.dtype
) -> Iterator[Claim]:
    latents = [suite.draw(channels, t, 2 * h, 2 * w, dtype=torch.float32) for t, h, w in grids]
    latents[1] = latents[1].transpose(2, 3).contiguous().transpose(2, 3)  # read by its strides
    weight, bias = (suite.draw(dim, 4 * channels) / 8).to(dtype), suite.draw(dim, dtype=dtype)
    rounded = [x.to(dtype) for x in latents]
    case, given = _words(dtype, f"{channels} channels", f"grids {grids}"), (weight, bias, (1, 2, 2))
    embed, formula = partial(patch_embed.patch_embed, latents, *given), partial(reference.patch_embed, rounded, *given)
    yield Claim("patch_embed", case, embed, formula, TOLERANCES[dtype])
    tokens = suite.draw(sum(t * h * w for t, h, w in grids), 4 * channels, dtype=dtype)
    moved, places = (partial(f, tokens, grids, (1, 2, 2)) for f in (patch_embed.unpatchify, reference.unpatchify))
    yield Claim("unpatchify", case, moved, places, 0.0)


def _solver_step(suite: Suite, shape: tuple[int, int, int, int], earlier: int, dtype: torch.dtype) -> Claim:
    latents, last, *before = (suite.draw(*shape, dtype=torch.float32) for _ in range(2 + earlier))
    velocities = suite.draw(*shape, dtype=dtype), suite.draw(*shape, dtype=dtype)
    weights = [0.6, 0.5, -0.2, 0.3, 0.1][: 2 + earlier]
    given = latents, *velocities, 4.5, 0.7, weights, weights[::-1], last, before
    preview = suite.draw(48, shape[0], dtype=torch.float32) / 8, suite.draw(48, dtype=torch.float32)

    def levels() -> list[Tensor]:
        *tensors, unrounded = reference.solver_step(*given, preview)
        assert unrounded is not None
        return [*tensors, unrounded]

    # Pixels are rounded to whole numbers: half a level, of levels whose root mean square is above 100.
    ours = partial(solver_step.solver_step, *given, preview)
    return Claim("solver_step", _words(dtype, list(shape), f"{earlier} earlier"), ours, levels, 6e-3)


def _linear(suite: Suite, kind: str, num_tokens: int, inner: int, outer: int, dtype: torch.dtype) -> Claim:
    """The product of operands in 8 bits, as exact as its dtype; what rounding the operands costs is not asked here."""
    x, weight, bias = (suite.draw(*shape, dtype=dtype) for shape in ((num_tokens, inner), (outer, inner), (outer,)))
    rows, columns = quantize_rows(x, DTYPES[kind]), quantize_rows(weight, DTYPES[kind])
    formula = partial(reference.linear_quantized, *rows, *columns, bias, "gelu_tanh")
    ours = partial(linear_quantized, x, *columns, bias, "gelu_tanh")
    return Claim(
        "linear", _words(dtype, kind, f"{num_tokens} tokens, {inner} to {outer}"), ours, formula, TOLERANCES[dtype]
    )


def _attention(suite: Suite, lengths: list[tuple[int, int]], size: int, dtype: torch.dtype) -> Iterator[Claim]:
    """Ours with its log-sum-exp and a bias of keys, and every other backend without."""
    cu_q, cu_k = (tuple(accumulate(column, initial=0)) for column in zip(*lengths, strict=True))
    q, k, v = (suite.draw(cu[-1], 2, size, dtype=dtype) for cu in (cu_q, cu_k, cu_k))
    bias = suite.draw(cu_k[-1], dtype=torch.float32)
    case = _words(dtype, f"head {size}", f"lengths {lengths}")
    ours = partial(attention.attention_with_lse, q, k, v, cu_q, cu_k, bias)
    yield Claim("attention", case, ours, partial(reference.attention, q, k, v, cu_q, cu_k, bias), TOLERANCES[dtype])
    if not suite.on_gpu or size == 96:
        return
    for name in backends.CHOICES["attention"]:
        try:
            run = by(name, q, k, v, cu_q, cu_k)
        except Missing:
            continue
        formula = partial(_without_lse, q, k, v, cu_q, cu_k)
        yield Claim(f"attention={name}", case, run, formula, LOSSY.get(name, TOLERANCES[dtype]))


def _without_lse(q: Tensor, k: Tensor, v: Tensor, cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> Tensor:
    return reference.attention(q, k, v, cu_q, cu_k, None)[0]
