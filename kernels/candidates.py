"""What tune.py searches through: launches of each operation, what they compile to, and inputs to judge them by.

Wan's widths (1.3B, 5B, 14B) stand for the row that serves them. Packs of up to 4096 tokens are a bucket of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from . import adaln, attention_kernels, patch_embed, qk_norm_rope, reference, rms_norm, solver_step
from . import attention as _registered  # noqa: F401 - its operation is called by name
from .launches import DTYPES, forced
from .search import Call, Launch, Search
from .toolchain import next_power_of_2

LENGTHS = {4096: 4096, None: 32760}  # the row's bound, and what it is timed with: 81 frames of 832 x 480
SEVERAL = ("adaln", "patch_embed", "attention_quantized")  # files of several operations, whose rows name theirs
CHECKED = 300  # tokens: some tiles and a bit
SIXTEEN, ALL = ["bf16", "fp16"], (["bf16", "fp16"], ["fp32"])
KINDS = ("descriptors", "warp_specialized")


def candidates(arch: int) -> list[Search]:
    return [*_rows(arch), *_heads(arch), *_embeds(arch), *_unpatchified(arch), *_steps(arch), *_attention(arch)]


def _search(
    name: str, op: str, row: Launch, launches: Sequence[Launch], compiled: Any, make: Any, **more: Any
) -> Search:
    """make(num_tokens, device) -> (what is run, what it should give)."""
    named = {"ops": [op], **row} if name in SEVERAL else dict(row)
    timed = int(LENGTHS.get(row["longest"]) or row["longest"])

    def call(num_tokens: int, device: torch.device) -> Call:
        run, expected = make(num_tokens, device)

        def launched(launch: Launch) -> Sequence[Tensor]:
            with forced(op, launch):
                return run()

        return Call(launched, expected)

    return Search(name, op, named, launches, compiled, partial(call, CHECKED), partial(call, timed), **more)


def _rows(arch: int) -> Iterator[Search]:
    """adaln and its kin, and rms_norm: warps alone, at most 128 elements a thread."""
    ops = ("adaln", "gated_residual", "gated_residual_adaln", "rms_norm")
    for op, dtypes, dim, longest in product(ops, ALL, (1536, 3072, 5120), LENGTHS):
        width, dtype = next_power_of_2(dim), dtypes[0]
        launches = [dict(num_warps=n) for n in (1, 2, 4, 8, 16) if 4 <= width // (32 * n) <= 128]
        name = "rms_norm" if op == "rms_norm" else "adaln"

        def compiled(launch: Launch, op: str = op, dtype: str = dtype, dim: int = dim) -> list[Any]:
            if op == "rms_norm":
                return [rms_norm.compiled(arch, dtype, dim, launch)]
            return [adaln.compiled(arch, op, dtype, dim, launch)]

        row = dict(dtypes=dtypes, width=width, longest=longest)
        yield _search(name, op, row, launches, compiled, partial(_row_inputs, op, dtype, dim))


def _row_inputs(op: str, dtype: str, dim: int, num_tokens: int, device: torch.device) -> tuple[Any, Any]:
    draw, exact = _drawing(device), _to(dtype)
    x, y, weight = draw(num_tokens, dim).to(exact), draw(num_tokens, dim).to(exact), draw(dim).to(exact)
    gate, shift, scale = draw(3, 6, dim).unbind(1)[:3]
    ids = torch.arange(num_tokens, device=device) % 3
    arguments = {
        "adaln": (x, shift, scale, ids, 1e-6),
        "gated_residual": (x, y, gate, ids),
        "gated_residual_adaln": (x, y, gate, shift, scale, ids, 1e-6),
        "rms_norm": (x, weight, 1e-6),
    }[op]
    function = getattr(rms_norm if op == "rms_norm" else adaln, op)
    if op == "gated_residual_adaln":

        def expected() -> list[Tensor]:
            residual = reference.gated_residual(*_cpu(x, y, gate, ids))
            tables = _cpu(shift, scale, ids)
            # The norm reads r as it is stored.
            return [residual, reference.adaln(residual.to(exact), tables[0], tables[1], tables[2], 1e-6)]

        return lambda: function(*arguments), expected
    return lambda: [function(*arguments)], lambda: [getattr(reference, op)(*_cpu(*arguments))]


def _heads(arch: int) -> Iterator[Search]:
    for dtypes, (heads, size), longest in product(ALL, ((12, 128), (24, 128), (40, 128)), LENGTHS):
        width, dtype = next_power_of_2(heads) * size, dtypes[0]
        launches = [dict(num_warps=n) for n in (1, 2, 4, 8, 16) if 4 <= width // (32 * n) <= 128]

        def compiled(launch: Launch, dtype: str = dtype, heads: int = heads, size: int = size) -> list[Any]:
            return [qk_norm_rope.compiled(arch, dtype, heads, size, each, launch) for each in (False, True)]

        def inputs(
            num_tokens: int, device: torch.device, dtype: str = dtype, heads: int = heads, size: int = size
        ) -> tuple[Any, Any]:
            draw, exact = _drawing(device), _to(dtype)
            qkv, (q_weight, k_weight) = draw(num_tokens, 3 * heads * size).to(exact), draw(2, heads * size).to(exact)
            angles = 3 * draw(num_tokens, size // 2)
            arguments = (qkv, q_weight, k_weight, torch.stack((angles.cos(), angles.sin()), -1), heads, 1e-6)
            return (
                lambda: qk_norm_rope.qk_norm_rope(*arguments)[:2],
                lambda: reference.qk_norm_rope(*_cpu(*arguments))[:2],
            )

        row = dict(dtypes=dtypes, width=width, longest=longest)
        yield _search("qk_norm_rope", "qk_norm_rope", row, launches, compiled, inputs)


def _embeds(arch: int) -> Iterator[Search]:
    """16 channels are one turn of the loop, which has no stages then; 36 and more are several."""
    for dtypes, (bound, channels, dim) in product(ALL, ((64, 16, 1536), (None, 36, 5120))):
        dtype = dtypes[0]
        sides: tuple[tuple[int, ...], ...] = (
            (64, 128),
            (64, 128, 256),
            (64,) if bound else (32, 64),
            (4, 8),
            (3,) if bound else (2, 3),
        )
        sides = ((32, 64), (32, 64), (16, 32), (4, 8), (3,)) if dtype == "fp32" else sides
        names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
        launches = [dict(zip(names, values, strict=True)) for values in product(*sides)]
        compiled = partial(_compiled_embed, arch, dtype, channels, dim)
        row = dict(dtypes=dtypes, width=bound, longest=None)
        yield _search("patch_embed", "patch_embed", row, launches, compiled, partial(_latents, dtype, channels, dim))


def _compiled_embed(arch: int, dtype: str, channels: int, dim: int, launch: Launch) -> list[Any]:
    return [patch_embed.compiled(arch, dtype, channels, dim, launch)]


def _latents(dtype: str, channels: int, dim: int, num_tokens: int, device: torch.device) -> tuple[Any, Any]:
    """Two requests, the second of a frame."""
    draw, exact, frames = _drawing(device), _to(dtype), max(1, num_tokens // 1560)
    sides = (60, 104) if num_tokens > CHECKED else (14, 18)
    latents = [draw(channels, frames, *sides), draw(channels, 1, 6, 10)]
    weight, bias, size = (draw(dim, 4 * channels) / 8).to(exact), draw(dim).to(exact), (1, 2, 2)
    rounded = [x.to(exact).cpu() for x in latents] if num_tokens <= CHECKED else []
    return (
        lambda: [patch_embed.patch_embed(latents, weight, bias, size)],
        lambda: [reference.patch_embed(rounded, weight.cpu(), bias.cpu(), size)],
    )


def _unpatchified(arch: int) -> Iterator[Search]:
    for dtypes, (bound, channels) in product(ALL, ((64, 16), (None, 48))):
        launches = [dict(block_m=m, num_warps=n) for m, n in product((16, 32, 64, 128), (4, 8, 16))]

        def compiled(launch: Launch, dtype: str = dtypes[0], channels: int = channels) -> list[Any]:
            return [patch_embed.compiled_unpatchify(arch, dtype, channels, launch)]

        def inputs(
            num_tokens: int, device: torch.device, dtype: str = dtypes[0], channels: int = channels
        ) -> tuple[Any, Any]:
            grids = [(max(1, num_tokens // 1560), 30, 52) if num_tokens > CHECKED else (3, 7, 9), (1, 3, 5)]
            tokens = _drawing(device)(sum(t * h * w for t, h, w in grids), 4 * channels).to(_to(dtype))
            return (
                lambda: patch_embed.unpatchify(tokens, grids, (1, 2, 2)),
                lambda: reference.unpatchify(tokens.cpu(), grids, (1, 2, 2)),
            )

        row = dict(dtypes=dtypes, width=bound, longest=None)
        yield _search("patch_embed", "unpatchify", row, launches, compiled, inputs)


def _steps(arch: int) -> Iterator[Search]:
    """UniPC of order 2 with guidance and a preview; the preview's levels are rounded, and are the tests' to judge."""
    for dtypes, (bound, channels) in product(ALL, ((16, 16), (None, 48))):
        launches = [dict(block_p=p, num_warps=n) for p, n in product((32, 64, 128, 256), (4, 8))]

        def compiled(launch: Launch, dtype: str = dtypes[0], channels: int = channels) -> list[Any]:
            flags = [(True, True, 2, True), (True, True, 3, True), (False, False, 0, False)]
            return [solver_step.compiled(arch, dtype, channels, *each, launch) for each in flags]

        def inputs(
            num_tokens: int, device: torch.device, dtype: str = dtypes[0], channels: int = channels
        ) -> tuple[Any, Any]:
            draw, shape = (
                _drawing(device),
                (channels, max(1, num_tokens // 1560), *((60, 104) if num_tokens > CHECKED else (9, 7))),
            )
            latents, last, *earlier = (draw(*shape) for _ in range(4))
            cond, uncond = (draw(*shape).to(_to(dtype)) for _ in range(2))
            weights, preview = [0.3, 0.4, 0.2, 0.1], (draw(48, channels) / 8, draw(48))
            arguments = (latents, cond, uncond, 4.5, 0.7, weights, weights, last, earlier)
            return (
                lambda: solver_step.solver_step(*arguments, preview)[:3],
                lambda: reference.solver_step(*_cpu(*arguments))[:3],
            )

        row = dict(dtypes=dtypes, width=bound, longest=None)
        yield _search("solver_step", "solver_step", row, launches, compiled, inputs)


def _attention(arch: int) -> Iterator[Search]:
    """By pointers, by descriptors and with specialised warps: rows side by side, each asked for by the tensors or the
    operator. 4 warps over 128 x 128 spill everywhere (docs/kernels.md). 8 warps within 128 registers leave room for a
    second program, whose products run while this one exponentiates.
    """
    kinds: list[dict[str, bool]] = [{}]
    if arch >= 90:
        kinds = [dict(descriptors=True), {}]
        kinds += [dict(descriptors=True, warp_specialized=True)] if arch < 120 else []
    for kind, head, (longest, lens) in product(
        kinds, (64, 96, 128), {64: [64] * 64, 1024: [1024] * 8, None: [16384]}.items()
    ):
        if kind.get("warp_specialized") and (longest or head == 96):
            continue
        sides = product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
        launches = [
            dict(block_m=m, block_n=n, num_warps=warps, num_stages=stages, **kind)
            for m, n, warps, stages in sides
            if (m * n < 128 * 128 or warps == 8 or kind.get("warp_specialized")) and not (m == 128 and longest == 64)
        ]
        if not kind.get("warp_specialized"):  # those share out registers themselves
            launches += [{**one, "maxnreg": 128} for one in launches if (one["num_warps"], one["num_stages"]) == (8, 2)]
        compiled = partial(_compiled_attention, arch, head, not kind.get("warp_specialized"))
        make = partial(_attended, head, lens, bool(kind.get("warp_specialized")))
        row = dict(dtypes=SIXTEEN, width=head, longest=longest)
        yield _search("attention", "attention", row, launches, compiled, make, asked=KINDS)


def _compiled_attention(arch: int, head: int, with_bias: bool, launch: Launch) -> list[Any]:
    how = attention_kernels.Configuration(**launch)
    biases = (False, True) if with_bias else (False,)
    return [attention_kernels.compiled(arch, "bf16", head, biased, how) for biased in biases]


def _attended(head: int, lens: list[int], specialized: bool, num_tokens: int, device: torch.device) -> tuple[Any, Any]:
    draw, heads = _drawing(device), 12
    if num_tokens == CHECKED:
        lens, heads = [1, 63, 64, 65, 107], 2
    cu = [*accumulate(lens, initial=0)]
    q, k, v = draw(cu[-1], 3, heads, head).to(torch.bfloat16).unbind(1)  # strided, as qkv has them
    return (
        lambda: torch.ops.skylapse.attention(q, k, v, cu, cu, None, False, specialized)[:1],
        lambda: reference.attention(q.cpu(), k.cpu(), v.cpu(), cu, cu, None)[:1],
    )


def _drawing(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device)


def _to(dtype: str) -> torch.dtype:
    return next(one for one, name in DTYPES.items() if name == dtype)


def _cpu(*arguments: Any) -> list[Any]:
    """Tensors, and lists of them, on the CPU."""
    return [x.cpu() if isinstance(x, Tensor) else [*_cpu(*x)] if isinstance(x, list) else x for x in arguments]
