"""Adaptive layer norm: y = LayerNorm(x) * (1 + scale) + shift, the gated residual r = x + y * gate, and both in one.

Modulation rows come from a table by a token's index; a table of one row serves all tokens. Arithmetic is fp32.
Source: DiT (arXiv 2212.09748), section 3.2, as Wan uses it.

The kernel gives a program a whole row, kept in registers: each element is read once and each result written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launches import DTYPES, arch_of, find, points
from .toolchain import Shipped, check_floats, jit, launches, next_power_of_2, tl


def adaln(x: Tensor, shift: Tensor, scale: Tensor, ids: Tensor, eps: float) -> Tensor:
    """x [N, dim]; shift and scale [num_modulations, dim] fp32; ids [N] into them. Returns [N, dim] in x's dtype."""
    run = _adaln_op if launches(x) else _adaln_cpu
    return run(x, shift, scale, ids, eps)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    """x + y * gate; x and y [N, dim], gate [num_modulations, dim] fp32, ids [N]. Returns [N, dim] in x's dtype."""
    run = _gated_residual_op if launches(x) else _gated_residual_cpu
    return run(x, y, gate, ids)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, ids: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r = x + y * gate, and adaln(r) of the next layer; shapes as above. Returns both, [N, dim] in x's dtype.

    gate: None adds y as it is. The norm reads r as it is stored, in x's dtype, so fusing changes nothing but the number
    of passes.
    """
    run = _gated_residual_adaln_op if launches(x) else _gated_residual_adaln_cpu
    return run(x, y, gate, shift, scale, ids, eps)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r = x + y * gate, and LayerNorm(r) * weight + bias; weight and bias [dim] fp32. Returns both, as above.

    To the kernel they are a scale and a shift that all tokens share.
    """
    if launches(x):
        return _gated_residual_adaln_op(x, y, gate, bias.expand_as(gate), (weight - 1).expand_as(gate), ids, eps)
    residual = _gated_residual_cpu(x, y, gate, ids)
    return residual, F.layer_norm(residual.float(), weight.shape, weight, bias, eps).to(x.dtype)


def rows(table: Tensor, ids: Tensor) -> Tensor:
    """The tokens' rows of a modulation table; one row is broadcast instead of gathered."""
    return table if len(table) == 1 else table.index_select(0, ids)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _adaln_cpu(x: Tensor, shift: Tensor, scale: Tensor, ids: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return torch.addcmul(rows(shift, ids), normed, 1 + rows(scale, ids)).to(x.dtype)


def _gated_residual_cpu(x: Tensor, y: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    return torch.addcmul(x.float(), y.float(), rows(gate, ids)).to(x.dtype)


def _gated_residual_adaln_cpu(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, ids: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = x + y if gate is None else _gated_residual_cpu(x, y, gate, ids)
    return residual, _adaln_cpu(residual, shift, scale, ids, eps)


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _kernel(
    x,
    y,
    gate,
    shift,
    scale,
    ids,
    residual,
    out,
    dim,
    stride_x,
    stride_y,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    ONE_ROW: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    if ONE_ROW:
        index = row * 0
    else:
        index = tl.load(ids + row).to(tl.int64)
    value = tl.load(x + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        added = tl.load(y + row * stride_y + columns, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + index * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        value += added
        stored = value.to(residual.dtype.element_ty)
        tl.store(residual + row * dim + columns, stored, mask=inside)
        value = stored.to(tl.float32)
    if NORMED:
        mean = tl.sum(value, axis=0) / dim
        centred = tl.where(inside, value - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / dim
        factor = 1.0 + tl.load(scale + index * stride_scale + columns, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(shift + index * stride_shift + columns, mask=inside, other=0.0).to(tl.float32)
        normed = centred * tl.rsqrt(variance + eps) * factor + offset
        tl.store(out + row * dim + columns, normed.to(out.dtype.element_ty), mask=inside)


def _adaln_triton(x: Tensor, shift: Tensor, scale: Tensor, ids: Tensor, eps: float) -> Tensor:
    _check(x, ids, {"x": x}, {"shift": shift, "scale": scale})
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, None, shift, scale, ids, None, out, eps)
    return out


def _gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor, ids: Tensor) -> Tensor:
    _check(x, ids, {"x": x, "y": y}, {"gate": gate})
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, y, gate, None, None, ids, residual, None, 0.0)
    return residual


def _gated_residual_adaln_triton(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, ids: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    tables = {"shift": shift, "scale": scale} | ({} if gate is None else {"gate": gate})
    _check(x, ids, {"x": x, "y": y}, tables)
    residual = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(residual)
    _launch(x, y, gate, shift, scale, ids, residual, out, eps)
    return residual, out


def _launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    ids: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    eps: float,
) -> None:
    if not x.numel():
        return
    table = gate if shift is None else shift
    assert table is not None
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (x, y, gate, shift, scale)]
    op = {(False, True): "adaln", (True, False): "gated_residual", (True, True): "gated_residual_adaln"}[
        y is not None, shift is not None
    ]
    num_warps = find("adaln", op, arch_of(x.device), DTYPES[x.dtype], x.shape[1], len(x))["num_warps"]
    constants = _constants(op, x.shape[1], len(table) == 1)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its tensors' is
        _kernel[(len(x),)](
            x, y, gate, shift, scale, ids, residual, out, x.shape[1], *strides, eps, **constants, num_warps=num_warps
        )


def _constants(op: str, dim: int, one_row: bool) -> dict[str, Any]:
    flags = dict(ONE_ROW=one_row, GATED=op != "adaln", NORMED=op != "gated_residual")
    return dict(**flags, BLOCK=next_power_of_2(dim))


def _check(x: Tensor, ids: Tensor, tokens: dict[str, Tensor], tables: dict[str, Tensor]) -> None:
    check_floats(**tokens, **tables)
    if x.dim() != 2 or x.shape[1] > 16384:
        raise ValueError(f"x must be [N, dim] with dim at most 16384, got {list(x.shape)}")
    for name, tensor in tokens.items():
        if tensor.shape != x.shape:
            raise ValueError(f"{name} must be {list(x.shape)}, got {list(tensor.shape)}")
    num_rows = len(next(iter(tables.values())))
    for name, table in tables.items():
        if table.shape != (num_rows, x.shape[1]) or not num_rows:
            raise ValueError(f"{name} must be [{max(1, num_rows)}, {x.shape[1]}], got {list(table.shape)}")
    if ids.shape != (len(x),) or ids.dtype not in (torch.int64, torch.int32) or ids.device != x.device:
        raise ValueError(f"ids must be [{len(x)}] int64 on {x.device}, got {list(ids.shape)} {ids.dtype}")
    if not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous, got strides {ids.stride()}")


# --- as operations of torch -------------------------------------------------------------------------------------------

_adaln_op = torch.library.custom_op("skylapse::adaln", _adaln_cpu, mutates_args=(), device_types="cpu")
_adaln_op.register_kernel("cuda")(_adaln_triton)
_adaln_op.register_fake(lambda x, shift, scale, ids, eps: x.new_empty(x.shape))

_gated_residual_op = torch.library.custom_op(
    "skylapse::gated_residual", _gated_residual_cpu, mutates_args=(), device_types="cpu"
)
_gated_residual_op.register_kernel("cuda")(_gated_residual_triton)
_gated_residual_op.register_fake(lambda x, y, gate, ids: x.new_empty(x.shape))

_gated_residual_adaln_op = torch.library.custom_op(
    "skylapse::gated_residual_adaln", _gated_residual_adaln_cpu, mutates_args=(), device_types="cpu"
)
_gated_residual_adaln_op.register_kernel("cuda")(_gated_residual_adaln_triton)
_gated_residual_adaln_op.register_fake(
    lambda x, y, gate, shift, scale, ids, eps: (x.new_empty(x.shape), x.new_empty(x.shape))
)


def shipped() -> list[Shipped]:
    """Every row of adaln.json, at Wan's widths (1.3B, 5B, 14B) and at its greatest."""
    return [
        compiled(arch, op, dtype, dim, row.launch, has_gate)
        for op in ("adaln", "gated_residual", "gated_residual_adaln")
        for arch, row, dtype, dim in points("adaln", op, (1536, 3072, 5120))
        for has_gate in ((True, False) if op == "gated_residual_adaln" and dtype == "bf16" else (True,))
    ]


def compiled(arch: int, op: str, dtype: str, dim: int, launch: Mapping[str, Any], has_gate: bool = True) -> Shipped:
    constants = _constants(op, dim, one_row=False)
    types = dict(x=f"*{dtype}", y=f"*{dtype}", gate="*fp32", shift="*fp32", scale="*fp32", ids="*i64")
    types |= dict(residual=f"*{dtype}", out=f"*{dtype}", dim="i32", eps="fp32")
    types |= {f"stride_{name}": "i32" for name in ("x", "y", "gate", "shift", "scale")}
    unused = ["y", "gate", "residual"] if op == "adaln" else [] if has_gate else ["gate"]
    unused += ["shift", "scale", "out"] if op == "gated_residual" else []
    return Shipped(
        op=op,
        configuration=f"{dtype} dim {dim}{'' if has_gate else ', no gate'}",
        kernel=_kernel,
        types={name: type_ for name, type_ in types.items() if name not in unused},
        constants=constants | dict.fromkeys(unused),
        num_warps=launch["num_warps"],
        architectures=(arch,),
    )
