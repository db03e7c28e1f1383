"""Which attention serves a call on a CUDA device: by architecture, head size, lengths and raggedness.

Published figures decide until `bench pick` has written measured ones into measured/attention.json. What a backend
cannot take (a bias of keys, above all) goes to our Triton kernel, and only where that cannot run to torch's own choice,
which makes a mask [queries, keys] of a bias. Nothing here imports torch when it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import backends
from .backends import Choice, Rule

if TYPE_CHECKING:
    import torch

MEASURED = Path(__file__).parent / "measured" / "attention.json"


@dataclass(frozen=True)
class Backend:
    """What is known of one before it is called."""

    module: str | None = None  # must be importable
    since: int = 80  # the oldest compute capability
    only: tuple[int, ...] = ()  # the only ones; empty: every later one
    by_runs: bool = False  # takes batches of one shape, so that a pack needs a call for each run of such neighbours
    biased: bool = False  # takes a bias of keys, and returns a log-sum-exp
    head_multiple: int = 1  # of which the head size must be one
    lossy: bool = False  # on 8 bits: asked for by name, never a default


BACKENDS = {
    "triton": Backend(biased=True),
    "triton-ws": Backend(only=(90, 100, 103), biased=True),
    "triton-int8": Backend(biased=True, lossy=True),
    "triton-fp8": Backend(since=89, biased=True, lossy=True),
    "xformers": Backend(module="xformers.ops"),
    "flash3": Backend(module="flash_attn_interface", only=(90,), head_multiple=8),
    "varlen": Backend(module="torch.nn.attention.varlen", head_multiple=8),
    "sage": Backend(module="sageattention", only=(80, 86, 89, 90, 120), by_runs=True, lossy=True),
    "cudnn": Backend(by_runs=True, head_multiple=8),
    "flash": Backend(by_runs=True),
    "sdpa": Backend(since=0, biased=True),
}

# Exact backends, the fastest first: forward, bf16 or fp16, without a mask, head sizes 64 and 128. Not measured here.
#  sm_90: TFLOP/s on an H100 at 4k / 8k / 16k tokens, head size 128: FA3 638 / 646 / 648, cuDNN 609 / 600 / 595, FA2 368
#    / 370 / 370, Triton 389 / 392 / 395 (FA3's paper, arXiv 2407.08608, figure of fp16 forward); cuDNN 582 to 631
#    (pytorch #142132, meta-pytorch/tritonbench #141); the structure of our kernel 460 to 487 (TLX, #205). torch prefers
#    cuDNN to FA2 there by itself since 2.11 (huggingface/transformers #48163, pytorch #162073).
#  sm_100: cuDNN 9.19 beats FA4 1.24 to 1.98 times on Wan2.2's shapes, torch 2.11 with CUDA 13 (sglang #33655).
#  sm_120: cuDNN 4 to 10 % faster than flash (sglang #36494).
#  sm_80, 86, 89: flash at least as fast as cuDNN; torch prefers it there too, and says that sm_86 and 89 are to be
#    measured (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
PUBLISHED: Mapping[int, tuple[str, ...]] = {
    80: ("flash",),
    86: ("flash",),
    89: ("flash",),
    90: ("flash3", "cudnn"),
    100: ("cudnn",),
    120: ("cudnn",),
}

# Before 9.15.1 cuDNN's results were wrong for lengths that 128 does not divide (pytorch #169849). torch guards its own
# preference by it (`check_prefer_cudnn_attention`, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, 2.11 to 2.13:
# `cudnn_version > 91500`), but neither `can_use_cudnn_attention` nor cuDNN's operation, which is what we call.
CUDNN_RIGHT, CUDNN_OLDEST, CUDNN_MULTIPLE = 91501, 90000, 128

# What a run of a ragged pack must compute, in operations, before a backend that is called for each run is worth its
# calls. Arithmetic, not measured: a call more costs the device about 10 us (its launch, and a grid whose end does not
# fill the card); at 620 TFLOP/s (cuDNN) instead of 450 (ours) it wins that back at 10 us / (1 / 450 - 1 / 620) per
# TFLOP/s = 16 GFLOP: 900 tokens of 40 heads of 128, or 1,600 of 12.
RUN_OPERATIONS = 1.6e10
LONG = 8192  # queries above which a call counts as long
KINDS = ("ragged", "short", "long")


class Call(NamedTuple):
    """What a choice depends on beside the device."""

    head_size: int = 128
    kind: str = "long"  # of KINDS
    biased: bool = False  # a bias of keys, or a log-sum-exp that is wanted
    divided: bool = True  # whether 128 divides all lengths
    single: bool = False  # whether a sequence has one key alone


USUAL = Call(divided=False)  # 75,600 tokens, for one


@lru_cache(maxsize=256)
def call_of(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], num_heads: int, head_size: int, biased: bool
) -> Call:
    """The kind of call that a pack of these sequences is."""
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)]
    runs = sum(1 for _ in groupby(lengths))
    operations = 4 * num_heads * head_size * sum(queries * keys for queries, keys in lengths)
    return Call(
        head_size=head_size,
        kind=_kind(runs, operations, max(queries for queries, _ in lengths)),
        biased=biased,
        divided=all(n % CUDNN_MULTIPLE == 0 for pair in lengths for n in pair),
        single=any(keys == 1 for _, keys in lengths),
    )


def _kind(runs: int, operations: int, longest: int) -> str:
    if runs > 1 and operations < runs * RUN_OPERATIONS:
        return "ragged"
    return "long" if longest > LONG else "short"


def decide(capability: int, asked: str | None, call: Call | None, trial: Callable[[str], str | None]) -> Choice:
    """The first that serves the call: asked for or the fastest known, then our kernel, then torch's choice.

    `trial` says why a backend does not work on the device, and is asked only where it matters.
    """
    call = call or USUAL
    wanted = [(asked, "asked for")] if asked else list(_fastest(capability, call))
    passed: list[str] = []
    for name, reason in (*wanted, ("triton", "ours"), ("sdpa", "torch's choice")):
        fault = fault_of(name, capability, call) or (trial(name) if name != "sdpa" else None)
        if fault is None:
            reasons = "; ".join(dict.fromkeys((reason, *passed)))
            left = name == "sdpa" and all(name != one for one, _ in wanted)
            return Choice(name, reasons, fallback=left, lossy=BACKENDS[name].lossy)
        passed.append(f"{name} cannot serve: {fault}")
    raise AssertionError("sdpa serves everything")


def _fastest(capability: int, call: Call) -> Iterator[tuple[str, str]]:
    """Exact backends, the fastest first, and why they are thought to be."""
    ranked = measured().get((capability, call.head_size, call.kind))
    if ranked is not None:
        yield from ((name, f"the fastest measured on sm_{capability}, {call.kind} calls") for name in ranked)
        return
    known = max((one for one in PUBLISHED if one <= capability and one // 10 == capability // 10), default=None)
    if known is None:
        yield "triton", f"the default: nothing is published of sm_{capability}"
        return
    for name in PUBLISHED[known]:
        if call.kind == "ragged" and BACKENDS[name].by_runs:
            yield "triton", f"one launch for many short runs, where {name} needs a call for each (not measured)"
        yield name, f"published as the fastest of sm_{known}, not measured here"


@cache
def measured() -> dict[tuple[int, int, str], tuple[str, ...]]:
    """(capability, head size, kind) -> exact backends, the fastest first; `bench pick` writes them."""
    rows = json.loads(MEASURED.read_text())
    return {(row["capability"], row["head_size"], row["kind"]): tuple(row["fastest"]) for row in rows}


def fault_of(name: str, capability: int, call: Call) -> str | None:
    """Why a backend cannot serve such a call on such a device, as far as can be told without trying."""
    it = BACKENDS[name]
    if it.module is not None and not _importable(it.module):
        return f"{it.module.partition('.')[0] if name != 'varlen' else it.module} is not installed"
    if it.only and capability not in it.only:
        return f"needs {_words(it.only)}, this is sm_{capability}"
    if capability < it.since:
        return f"needs sm_{it.since} or newer, this is sm_{capability}"
    if call.biased and not it.biased:
        return "it takes no bias of keys and returns no log-sum-exp"
    if call.head_size % it.head_multiple:
        return f"the head size must be a multiple of {it.head_multiple}, got {call.head_size}"
    if name == "flash":
        return None if _has_flash() else "this torch is built without it"
    return _fault_of_cudnn(call) if name == "cudnn" else None


def _fault_of_cudnn(call: Call) -> str | None:
    version = cudnn_version()
    if version < CUDNN_OLDEST:
        return f"this torch has no cuDNN 9, but {version}" if version else "this torch has no cuDNN"
    if version < CUDNN_RIGHT and not call.divided:
        return f"cuDNN {version} is wrong for lengths that 128 does not divide; {CUDNN_RIGHT} is right"
    return "it takes no sequence of one key" if call.single else None


def cudnn_version() -> int:
    """Of torch, 91501 for 9.15.1; 0 without it. A device that is told (`told_capability`) has one that is right."""
    import torch

    from . import toolchain

    if toolchain.is_told():
        return CUDNN_RIGHT
    return (torch.backends.cudnn.version() or 0) if torch.backends.cudnn.is_available() else 0


def _has_flash() -> bool:
    import torch

    from . import toolchain

    return toolchain.is_told() or torch.backends.cuda.is_flash_attention_available()


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


def _words(numbers: Sequence[int]) -> str:
    *others, last = (f"sm_{number}" for number in numbers)
    return f"{', '.join(others)} or {last}" if others else last


def refusal(name: str, capability: int) -> str | None:
    """Why a backend can serve no call on such a device."""
    return fault_of(name, capability, Call())


# --- tried on the device ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def trial(name: str, device: torch.device) -> str | None:
    """Why a backend does not work on the device; None where it gave the right numbers."""
    if name.startswith("triton") and ((fault := backends.fault_of_triton(device)) or name == "triton"):
        return fault
    fault = try_out(name, device)
    return fault and f"it is broken: {fault}"


def try_out(name: str, device: torch.device) -> str | None:
    """What goes wrong in a small call: an installed library may lack this architecture, or a symbol of torch's."""
    import torch

    from .attention import attention_by, attention_with_lse_by, plain

    try:
        # Lengths about and beyond a tile, at Wan's head size; numbers of a generator of its own.
        cu_seqlens = (0, 128, 256, 512) if name == "cudnn" else (0, 3, 203, 303)
        generator = torch.Generator().manual_seed(0)
        q, k, v = torch.randn(3, cu_seqlens[-1], 2, 128, generator=generator).to(device, torch.bfloat16)
        layout = (q, k, v, cu_seqlens, cu_seqlens, None)
        found = attention_with_lse_by(name, *layout) if BACKENDS[name].biased else (attention_by(name, *layout),)
        bound = 0.5 if BACKENDS[name].lossy else 5e-2
        right = all(bool(((x - y).abs() <= bound).all()) for x, y in zip(found, plain(*layout), strict=False))
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None if right else "a kernel computed nonsense"


RULE = Rule(decide, refusal, trial, frozenset(name for name, it in BACKENDS.items() if it.lossy))
