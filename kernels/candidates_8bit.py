"""What tune.py searches through for the operations on 8 bits: tiles, warps and stages around the present launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from . import attention_quantized, attention_quantized_kernels, launches, linear_quantized_kernels, reference
from .candidates import CHECKED, SIXTEEN, _drawing, _search
from .linear_quantized import linear_quantized, quantize_rows
from .search import Launch, Search


def candidates(arch: int) -> list[Search]:
    return [*_linear(arch), *_attention(arch)]


def _around(committed: Launch, sides: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """What else it says (descriptors, sums) stays as it is."""
    return [dict(committed) | dict(zip(sides, values, strict=True)) for values in product(*sides.values())]


def _linear(arch: int) -> Iterator[Search]:
    """By number of tokens; Wan-14B's attention projections, 5120 x 5120, stand for all layers."""
    for kind, longest in product(
        ("int8", "fp8") if arch >= linear_quantized_kernels.FP8_FROM else ("int8",), (64, None)
    ):
        length = longest or launches.ANY_LENGTH
        committed = launches.find("linear_quantized", "linear_quantized", arch, kind, 0, length)
        sides = dict(block_m=(64, 128) if longest is None else (64,), block_n=(128, 256), block_k=(64, 128))
        found = _around(committed, sides | dict(num_warps=(4, 8), num_stages=(2, 3, 4)))

        def compiled(launch: Launch, kind: str = kind, longest: int | None = longest) -> list[Any]:
            row = launches.Row(("linear_quantized",), (kind,), None, longest, launch)
            return [linear_quantized_kernels._shipped_product(arch, row, kind, "bf16", gelu) for gelu in (False, True)]

        row = dict(dtypes=[kind], width=None, longest=longest)
        yield _search("linear_quantized", "linear_quantized", row, found, compiled, partial(_layer, kind))


def _layer(kind: str, num_tokens: int, device: torch.device) -> tuple[Any, Any]:
    """Judged with the rows that the operation itself has rounded: what is searched for is the product's launch."""
    draw, dim = _drawing(device), 5120 if num_tokens != CHECKED else 512
    x, bias, exact = draw(num_tokens, dim).bfloat16(), draw(dim), linear_quantized_kernels.DTYPES[kind]
    weight, weight_scale = quantize_rows(draw(dim, dim) / dim**0.5, exact)

    def expected() -> list[Tensor]:
        values, scales = (part.cpu() for part in quantize_rows(x, exact))
        rest = (weight.cpu(), weight_scale.cpu(), bias.cpu())
        return [reference.linear_quantized(values, scales, *rest, "gelu_tanh")]

    return lambda: [linear_quantized(x, weight, weight_scale, bias, "gelu_tanh")], expected


def _attention(arch: int) -> Iterator[Search]:
    for form, head in product(("int8", "fp8") if arch >= linear_quantized_kernels.FP8_FROM else ("int8",), (64, 128)):
        op, name = f"attention_{form}", "attention_quantized"
        committed = launches.find(name, op, arch, "bf16", head, launches.ANY_LENGTH)
        sides = dict(block_m=(64, 128), block_n=(64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))

        def compiled(launch: Launch, form: str = form, head: int = head, op: str = op) -> list[Any]:
            row = launches.Row((op,), ("bf16",), head, None, launch)
            return [attention_quantized_kernels._shipped(form, arch, row, "bf16", head, each) for each in (False, True)]

        row = dict(dtypes=SIXTEEN, width=head, longest=None)
        yield _search(name, op, row, _around(committed, sides), compiled, partial(_attended, form, head))


def _attended(form: str, head: int, num_tokens: int, device: torch.device) -> tuple[Any, Any]:
    """Judged by torch's lines with the same roundings in fp32: float64 without them is another result."""
    lens: Sequence[int] = [1, 63, 64, 65, 107] if num_tokens == CHECKED else [num_tokens]
    cu, heads = tuple(accumulate(lens, initial=0)), 2 if num_tokens == CHECKED else 12
    q, k, v = _drawing(device)(cu[-1], 3, heads, head).bfloat16().unbind(1)

    def expected() -> list[Tensor]:
        out, _ = attention_quantized.plain(q.cpu(), k.cpu(), v.cpu(), cu, cu, None, form, False)
        return [out.double()]

    return lambda: attention_quantized.quantized_attention(q, k, v, cu, cu, None, form)[:1], expected
