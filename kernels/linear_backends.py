"""Which product serves a quantised linear layer on a CUDA device, torch's or ours, and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from . import backends, toolchain
from .backends import Choice, Rule

SCALED_MM_SINCE = 89  # compute capability: no fp8 before
# Fewer go to our kernel. On an H100 cuBLAS has no algorithm for few rows of many inputs (pytorch/ao #4582: 256 rows of
# 9,216), and few rows are the text's, once a prompt.
SCALED_MM_ROWS = 512
LOSSY = frozenset({"scaled_mm-fast"})  # beside the 8 bits, whose error is the operator's choice (`quantize`)


def decide(capability: int, asked: str | None, call: None, trial: Callable[[str], str | None]) -> Choice:
    """The rule; `trial` says why a product does not work on the device, and is asked only where it matters.

    Published, not measured here: 1190 to 1215 TFLOP/s for torch's row-wise product of 4096^3 on an H100 (torch 2.11,
    CUDA 13, with sums left to the matrix unit, which is `scaled_mm-fast`: meta-pytorch/tritonbench #1149), and 403 to
    450 for kernels in Triton that finish sums outside of it, as ours does (vllm-project/vllm #23280).
    """
    name, reason = asked or "scaled_mm", "asked for" if asked else "published as the fastest, not measured here"
    if asked is None and capability < SCALED_MM_SINCE:
        name, reason = "triton", f"the only product in 8 bits of sm_{capability}"
    if name == "torch":
        return Choice(name, reason)
    fault = refusal(name, capability) or trial(name)
    if fault is None:
        return Choice(name, reason, lossy=name in LOSSY)
    rest = "torch" if name == "triton" or trial("triton") else "triton"
    return Choice(rest, f"{name} ({reason}) cannot serve: {fault}", fallback=True)


def refusal(name: str, capability: int) -> str | None:
    """Why a product can serve no call on such a device."""
    if name.startswith("scaled_mm") and capability < SCALED_MM_SINCE:
        return f"needs sm_{SCALED_MM_SINCE} or newer, this is sm_{capability}"
    return None


def trial(name: str, device: torch.device) -> str | None:
    """Why a product does not work on the device; None where it gave the right numbers."""
    if name == "torch":
        return None
    return backends.fault_of_triton(device) if name == "triton" else fault_of_scaled_mm(device)


def product_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """What multiplies these rows [N, in] and this weight [out, in] on CUDA: one of `backends.CHOICES`."""
    name = _chosen(x.device)
    if not name.startswith("scaled_mm"):
        return name
    if weight.dtype == torch.float8_e4m3fn and len(x) >= SCALED_MM_ROWS:
        wrong = [one.dtype for one in (x, bias) if one is not None and one.dtype != torch.bfloat16]
        if not wrong:  # other results and biases are taken by some versions, on some architectures
            return name
        backends.tell_once(f"linear: ours instead of {name}: it is called for bfloat16 alone, got {wrong[0]}")
    return "triton" if toolchain.fault(x.device) is None else "torch"


@torch.compiler.assume_constant_result  # the choice is made, and logged, while a graph is traced
def _chosen(device: torch.device) -> str:
    return backends.current().choose("linear", device).name


@lru_cache(maxsize=8)
def fault_of_scaled_mm(device: torch.device) -> str | None:
    """Why torch's row-wise product does not work on the device; None where it gave the right numbers.

    Asked of the device, for it depends on torch's and cuBLAS's versions too: torch 2.10 has none for sm_120 (pytorch
    #192707).
    """
    from .linear_quantized import product_in_fp32, quantize_rows

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 256, generator=generator) for n in (SCALED_MM_ROWS, 128))
    bias = torch.randn(128, generator=generator)
    (rows, scales), (weight, weight_scale) = (quantize_rows(one, torch.float8_e4m3fn) for one in (x, w))
    expected = product_in_fp32(rows, scales, weight, weight_scale) + bias.bfloat16().float()
    try:
        given = (one.to(device) for one in (rows, scales, weight, weight_scale, bias.bfloat16()))
        found = scaled_mm(*given, dtype=torch.bfloat16, fast=False).float().cpu()
    except Exception as error:  # whatever a version that lacks it raises is the reason
        return f"torch's row-wise product fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    wrong = bool(((found - expected).abs() > 0.05 * expected.std()).any())
    return "torch's row-wise product computed nonsense" if wrong else None


def scaled_mm(
    rows: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """torch's product of fp8 rows [N, in] and weight [out, in] with their scales [N] and [out] -> [N, out] in `dtype`.

    It wants the second operand by columns, and scales [N, 1] and [1, out] in fp32. fast: sums stay in the matrix unit,
    which keeps some 13 bits of them (see linear_quantized_kernels.py); otherwise fp32 adds them up.
    """
    out: Tensor = torch._scaled_mm(
        rows,
        weight.t(),
        scales.unsqueeze(1),
        weight_scale.unsqueeze(0),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return out


RULE = Rule(decide, refusal, trial, LOSSY)
