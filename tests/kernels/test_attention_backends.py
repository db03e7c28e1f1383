"""Which implementation of attention is taken, why, and what the other libraries are handed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from skylapse import Engine
from skylapse.kernels import attention as module
from skylapse.kernels import attention_peers, backends, reference, toolchain
from skylapse.kernels.backends import Choice, decide, parse, select

CUDA = torch.device("cuda", 0)


def working() -> None:
    return None


def never() -> str:
    raise AssertionError("asked though it does not matter")


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    yield
    select({})
    backends._chosen.clear()
    backends._told.clear()
    backends.fault_of_triton.cache_clear()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that answers as one does, where kernels work."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "fault_of_triton", lambda device: None)


def test_default_is_our_kernel_and_says_that_it_was_not_measured() -> None:
    assert decide("attention", 90, working) == Choice("triton", "the default: sm_90 has not been measured")


def test_measured_winner_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MEASURED["attention"], 90, "sdpa")
    assert decide("attention", 90, never) == Choice("sdpa", "the fastest of those measured on this architecture")
    assert decide("attention", 89, working).name == "triton"


@pytest.mark.parametrize(
    ("asked", "capability", "fault", "reason"),
    [
        ("xformers", 90, None, "xformers (asked for) cannot serve: xformers is not installed"),
        ("flash3", 90, None, "flash3 (asked for) cannot serve: flash_attn_interface is not installed"),
        ("triton-ws", 89, None, "triton-ws (asked for) cannot serve: needs sm_90 or sm_100, this is sm_89"),
        ("triton", 90, "it is broken", "triton (asked for) cannot serve: it is broken"),
        ("cudnn", 75, None, "cudnn (asked for) cannot serve: needs sm_80 or newer, this is sm_75"),
        ("cudnn", 90, None, "cudnn (asked for) cannot serve: this torch has no cuDNN"),
        ("flash", 90, None, "flash (asked for) cannot serve: this torch is built without it"),
    ],
)
def test_torch_serves_where_what_was_asked_for_cannot(
    asked: str, capability: int, fault: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_importable", lambda name: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    select({"attention": asked})
    assert decide("attention", capability, lambda: fault) == Choice("sdpa", reason, fallback=True)


def test_sdpa_asked_for_needs_no_triton() -> None:
    select(parse("attention=sdpa"))
    assert decide("attention", 90, never) == Choice("sdpa", "asked for")


@pytest.mark.parametrize("text", ["attention", "attention=best", "adaln=triton", "attention=sdpa,", "=", "a=b=c"])
def test_unknown_operation_or_backend_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be like attention=triton\|.*\|flash\|sdpa; linear=.*, got "):
        parse(text)


@pytest.mark.usefixtures("h100")
def test_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert [backends.choose("attention", CUDA).name for _ in range(3)] == ["triton"] * 3
    select({"attention": "sdpa"})
    backends.choose("attention", CUDA)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cuda:0: triton (the default: sm_90 has not been measured)",
        "attention on cuda:0: sdpa (asked for)",
    ]


def test_fallback_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(toolchain, "triton", None)
    monkeypatch.setattr(toolchain, "MISSING", "No module named 'triton'")
    assert backends.choose("attention", CUDA).name == "sdpa"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "Triton cannot be imported: No module named 'triton'" in record.message


def test_triton_that_cannot_launch_is_broken_and_all_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on this machine: it imports, and there is no driver."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(toolchain, "broken", None)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, device="cuda")
    assert toolchain.launches(x)
    backends.prepare(CUDA)
    assert not toolchain.launches(x) and "Triton is broken: " in str(toolchain.broken)
    assert backends.choose("attention", CUDA).name == "sdpa"
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (1 + len(backends.CHOICES))


def test_old_architecture_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert backends.fault_of_triton(CUDA) == "kernels need sm_80 or newer, this is sm_75"


def test_engine_passes_on_what_the_operator_asked_for(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYLAPSE_KERNELS", "attention=sdpa")
    Engine.from_pretrained(str(demo_folder), device="cpu")
    assert decide("attention", 90, never) == Choice("sdpa", "asked for")


# --- what a call is handed to -----------------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = CUDA  # type: ignore[assignment]


def tensors(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(9, 2, 16).to(dtype).as_subclass(Elsewhere) for _ in range(3)]


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("asked", "dtype", "biased", "served", "said"),
    [
        ("triton", torch.bfloat16, True, "triton", None),
        ("triton-ws", torch.float16, False, "triton-ws", None),
        ("sdpa", torch.float32, True, "sdpa", None),
        (
            "triton",
            torch.float32,
            False,
            "sdpa",
            "sdpa instead of triton: q must be bfloat16 or float16",
        ),
        ("xformers", torch.bfloat16, False, "xformers", None),
        (
            "xformers",
            torch.bfloat16,
            True,
            "sdpa",
            "sdpa instead of xformers: it takes no bias of keys",
        ),
        (
            "flash3",
            torch.float32,
            False,
            "sdpa",
            "sdpa instead of flash3: q must be bfloat16 or float16",
        ),
        ("cudnn", torch.bfloat16, False, "cudnn", None),
        ("flash", torch.float16, False, "flash", None),
        ("flash", torch.bfloat16, True, "sdpa", "sdpa instead of flash: it takes no bias of keys"),
    ],
)
def test_call_that_a_backend_cannot_serve_goes_to_sdpa_and_is_told_once(
    asked: str,
    dtype: torch.dtype,
    biased: bool,
    served: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(backends, "_importable", lambda name: True)
    monkeypatch.setattr(backends, "_fault_of_torch", lambda name, capability: None)
    monkeypatch.setattr(attention_peers, "torch_takes", lambda name, q, k, v: True)
    select({"attention": asked})
    bias = torch.zeros(9).as_subclass(Elsewhere) if biased else None
    q, k, v = tensors(dtype)
    assert [module._backend(q, k, v, bias) for _ in range(2)] == [served] * 2
    assert [record.getMessage().removeprefix("attention: ") for record in caplog.records if said is None] == []
    assert said is None or [record.getMessage().count(said) for record in caplog.records] == [1]


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("asked", ["cudnn", "flash"])
def test_tensors_that_torchs_kernel_refuses_go_to_what_torch_chooses(
    asked: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of this machine: they only say that they are on a GPU, and torch itself is asked."""
    monkeypatch.setattr(backends, "_fault_of_torch", lambda name, capability: None)
    select({"attention": asked})
    q, k, v = tensors()
    assert module._backend(q, k, v, None) == "sdpa"
    assert f"sdpa instead of {asked}: torch does not use it for torch.bfloat16 and head size 16 here" in caplog.text


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_named_kernel_of_torch_is_the_only_one_that_it_may_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = []

    def attend(q: Tensor, *_: object, **__: object) -> Tensor:
        cuda = torch.backends.cuda
        flags = cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
        allowed.append((*flags, cuda.math_sdp_enabled()))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    q, k, v = torch.randn(3, 9, 2, 16)
    module.attention_by(name, q, k, v, (0, 4, 9), (0, 4, 9))
    assert allowed == [(name == "cudnn", name == "flash", False, False)] * 2


@pytest.mark.usefixtures("h100")
def test_tensors_that_want_a_gradient_go_to_sdpa() -> None:
    q, k, v = tensors()
    assert module._backend(q, k.requires_grad_(), v, None) == "sdpa"
    with torch.no_grad():
        assert module._backend(q, k, v, None) == "triton"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what dynamo imports
@pytest.mark.usefixtures("h100")
def test_choosing_does_not_break_a_compiled_graph(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def run(x: Tensor) -> Tensor:
        return x + 1 if module._chosen(CUDA) == "triton" else x

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert [compiled(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert sum("attention on" in record.getMessage() for record in caplog.records) == 1


# --- other libraries --------------------------------------------------------------------------------------------------

CU_Q, CU_K = (0, 2, 7, 9), (0, 4, 5, 12)


def each(q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int]) -> Tensor:
    """[N, H, D], a sequence at a time."""
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))).transpose(0, 1)
        for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    ]
    return torch.cat(outputs)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__dict__.update(contents)


def stand_in_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented interface, on torch: [1, N, H, D], and a mask made of two lists of lengths."""

    class BlockDiagonalMask(list[list[int]]):
        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: object) -> BlockDiagonalMask:
            return cls([[sum(n[:i]) for i in range(len(n) + 1)] for n in (q_seqlen, kv_seqlen)])

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask) -> Tensor:
        return each(q[0], k[0], v[0], *attn_bias)[None]

    stand_in(monkeypatch, "xformers")
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    stand_in(monkeypatch, "xformers.ops.fmha")
    stand_in(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]  # type: ignore[attr-defined]


def stand_in_flash3(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> tuple[Tensor, None]:
        assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype, max_seqlen_q, max_seqlen_k) == (torch.int32, torch.int32, 5, 7)
        return each(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist()), None

    stand_in(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize(
    ("name", "install"), [("xformers", stand_in_xformers), ("flash3", stand_in_flash3)], ids=["xformers", "flash3"]
)
def test_other_library_is_handed_the_packs_layout(
    name: str, install: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    attention_peers._block_diagonal.cache_clear()
    q, k, v = torch.randn(9, 2, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    out = attention_peers.PEERS[name](q, k, v, CU_Q, CU_K)
    expected, _ = reference.attention(q, k, v, CU_Q, CU_K, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    attention_peers._block_diagonal.cache_clear()
