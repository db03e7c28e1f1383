"""Which attention is taken for a call, on every architecture, and why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skylapse.kernels import attention as module
from skylapse.kernels import attention_backends, backends, toolchain
from skylapse.kernels.attention import attention, attention_with_lse
from skylapse.kernels.attention_backends import BACKENDS, KINDS, PUBLISHED, Call, call_of, decide, fault_of
from skylapse.kernels.attention_peers import PEERS
from skylapse.kernels.backends import Backends
from skylapse.kernels.fake_cuda import fake_cuda

CUDA = torch.device("cuda", 0)
EVEN, ODD = Call(), Call(divided=False)


def works(name: str) -> None:
    return None


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """All libraries are installed, and torch has flash attention and a cuDNN that is right."""
    monkeypatch.setattr(attention_backends, "_importable", lambda module: True)
    monkeypatch.setattr(attention_backends, "_has_flash", lambda: True)
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: 91900)


@pytest.fixture
def no_library(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_importable", lambda module: module.startswith("torch."))


# --- the table --------------------------------------------------------------------------------------------------------

FIRST = {80: "flash", 86: "flash", 87: "flash", 89: "flash", 90: "cudnn", 100: "cudnn", 103: "cudnn", 120: "cudnn"}


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(("capability", "name"), [*FIRST.items(), (121, "cudnn"), (110, "triton"), (75, "sdpa")])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kind", ["short", "long"])
def test_default_is_what_is_published_as_the_fastest(capability: int, name: str, head_size: int, kind: str) -> None:
    choice = decide(capability, None, Call(head_size, kind, divided=False), works)
    assert choice.name == name and not choice.lossy and choice.fallback == (name == "sdpa")
    if name in ("cudnn", "flash"):
        assert choice.reason.startswith(
            f"published as the fastest of sm_{max(n for n in PUBLISHED if n <= capability)}"
        )


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("capability", FIRST)
def test_flash_attention_3_comes_first_on_hopper_where_it_is_installed(capability: int) -> None:
    expected = "flash3" if capability == 90 else FIRST[capability]
    assert decide(capability, None, ODD, works).name == expected


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("capability", FIRST)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_of_keys_goes_to_our_kernel_and_not_to_a_mask(capability: int, kind: str) -> None:
    choice = decide(capability, None, Call(kind=kind, biased=True), works)
    assert (choice.name, choice.fallback) == ("triton", False)
    assert kind == "ragged" or "it takes no bias of keys and returns no log-sum-exp" in choice.reason


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("capability", FIRST)
def test_pack_of_many_short_runs_is_one_launch_of_ours(capability: int) -> None:
    choice = decide(capability, None, Call(kind="ragged"), works)
    assert choice.name == "triton" and choice.reason.startswith("one launch for many short runs, where ")
    broken = decide(capability, None, Call(kind="ragged"), lambda name: "broken" if name == "triton" else None)
    assert broken.name == FIRST[capability], "a call a run is better than none"


@pytest.mark.usefixtures("everything")
def test_flash_attention_3_takes_a_ragged_pack_in_one_call() -> None:
    assert decide(90, None, Call(kind="ragged"), works).name == "flash3"


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("capability", FIRST)
def test_what_does_not_work_on_the_device_is_passed_over_with_the_reason(capability: int) -> None:
    first = FIRST[capability]
    choice = decide(capability, None, ODD, lambda name: "it is broken" if name == first else None)
    assert choice.name == "triton" and f"{first} cannot serve: it is broken" in choice.reason
    left = decide(capability, None, ODD, lambda name: "it is broken")
    assert (left.name, left.fallback) == ("sdpa", True) and "triton cannot serve: it is broken" in left.reason


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("capability", FIRST)
def test_lossy_backends_are_taken_by_name_alone(capability: int) -> None:
    for call in (
        Call(head_size, kind, biased) for head_size in (64, 128) for kind in KINDS for biased in (False, True)
    ):
        for fault in (works, lambda name: None if BACKENDS[name].lossy else "it is broken"):
            assert not decide(capability, None, call, fault).lossy
    assert decide(90, "sage", ODD, works) == backends.Choice("sage", "asked for", lossy=True)
    assert {name for name, it in BACKENDS.items() if it.lossy} == {"sage", "triton-int8", "triton-fp8"}


def test_what_may_be_asked_for_is_what_is_known() -> None:
    assert tuple(BACKENDS) == backends.CHOICES["attention"]
    assert {name for names in PUBLISHED.values() for name in names} <= set(BACKENDS)


# --- cuDNN ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("asked", [None, "cudnn"])
@pytest.mark.parametrize(("version", "odd"), [(91500, "triton"), (91501, "cudnn"), (91002, "triton"), (91900, "cudnn")])
def test_cudnn_before_9_15_1_serves_only_lengths_that_128_divides(
    asked: str | None, version: int, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others were wrong (pytorch #169849); neither 75,600 nor 32,760 is such a length."""
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: version)
    assert decide(90, asked, EVEN, works).name == "cudnn"
    choice = decide(90, asked, call_of((0, 75600), (0, 75600), 40, 128, False), works)
    assert choice.name == odd
    assert odd == "cudnn" or f"cuDNN {version} is wrong for lengths that 128 does not divide" in choice.reason


@pytest.mark.usefixtures("no_library")
def test_cudnn_is_not_given_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of("cudnn", 90, Call(head_size=100)) == "the head size must be a multiple of 8, got 100"
    assert fault_of("cudnn", 90, Call(single=True)) == "it takes no sequence of one key"
    monkeypatch.setattr(attention_backends, "cudnn_version", lambda: 0)
    assert fault_of("cudnn", 90, EVEN) == "this torch has no cuDNN"


def test_cudnn_of_this_torch_is_asked_and_a_told_device_has_a_right_one() -> None:
    real = torch.backends.cudnn.version() or 0
    assert attention_backends.cudnn_version() == (real if torch.backends.cudnn.is_available() else 0)
    with toolchain.told_capability(90):
        assert attention_backends.cudnn_version() == 91501


# --- kinds of calls ---------------------------------------------------------------------------------------------------


def call(lengths: list[int], num_heads: int = 40, head_size: int = 128, keys: list[int] | None = None) -> Call:
    cu_q, cu_k = (tuple(accumulate(column, initial=0)) for column in (lengths, keys or lengths))
    return call_of(cu_q, cu_k, num_heads, head_size, False)


def test_kind_says_length_and_whether_runs_are_worth_a_call_each() -> None:
    assert call([75600]) == Call(128, "long", divided=False)
    assert call([75600] * 2) == call([75600]), "a guided pair is one call"
    assert call([8192]).kind == "short" and call([8193]).kind == "long"
    assert call([512, 512, 512]) == Call(128, "short"), "one run, however short"
    # 16 GFLOP a run and more: 900 tokens of 40 heads, 1,600 of 12
    assert (call([880, 800]).kind, call([920, 900]).kind) == ("ragged", "short")
    assert (call([1600, 1500], 12).kind, call([1640, 1624], 12).kind) == ("ragged", "short")
    assert call([75600, 16]).kind == "long", "what the long one gains is worth more than a call"
    assert call([256], keys=[1]) == Call(128, "short", divided=False, single=True)


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `bench pick` leaves the file after a lease."""
    entry: dict[str, Any] = {
        "capability": 90,
        "head_size": 128,
        "kind": "long",
        "fastest": ["flash3", "triton", "cudnn"],
    }
    (tmp_path / "measured.json").write_text(json.dumps([entry, entry | {"kind": "ragged", "fastest": ["varlen"]}]))
    monkeypatch.setattr(attention_backends, "MEASURED", tmp_path / "measured.json")
    attention_backends.measured.cache_clear()
    yield
    attention_backends.measured.cache_clear()


@pytest.mark.usefixtures("written", "no_library")
def test_measured_order_comes_before_what_is_published() -> None:
    assert decide(90, None, Call(128, "long"), works).name == "triton", "flash3 won, and is not installed here"
    assert decide(90, None, Call(128, "ragged"), works).name == "varlen"
    assert decide(90, None, Call(64, "long"), works).name == "cudnn", "not measured"
    assert decide(100, None, Call(128, "long"), works).name == "cudnn", "not measured"
    assert decide(90, "cudnn", Call(128, "long"), works).reason == "asked for"


def test_committed_measurements_are_of_exact_backends() -> None:
    for (_, _, kind), names in attention_backends.measured().items():
        assert kind in KINDS and names and all(not BACKENDS[name].lossy for name in names)


# --- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "capability", "reason"),
    [
        ("xformers", 90, "xformers is not installed"),
        ("flash3", 90, "flash_attn_interface is not installed"),
        ("sage", 90, "sageattention is not installed"),
        ("varlen", 90, "torch.nn.attention.varlen is not installed"),
        ("triton-ws", 89, "needs sm_90, sm_100 or sm_103, this is sm_89"),
        ("triton-fp8", 86, "needs sm_89 or newer, this is sm_86"),
        ("cudnn", 75, "needs sm_80 or newer, this is sm_75"),
        ("cudnn", 90, "this torch has no cuDNN"),
        ("flash", 90, "this torch is built without it"),
    ],
)
def test_what_a_device_cannot_run_is_said(
    asked: str, capability: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "_importable", lambda name: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert attention_backends.refusal(asked, capability) == reason


@pytest.mark.usefixtures("everything")
def test_sage_and_flash_attention_3_are_for_the_architectures_that_they_have_kernels_for() -> None:
    assert attention_backends.refusal("sage", 100) == "needs sm_80, sm_86, sm_89, sm_90 or sm_120, this is sm_100"
    assert attention_backends.refusal("flash3", 100) == "needs sm_90, this is sm_100"


@pytest.mark.usefixtures("everything")
def test_sdpa_by_name_takes_everything_and_tries_nothing() -> None:
    def never(name: str) -> str:
        raise AssertionError("asked though it does not matter")

    assert decide(90, "sdpa", Call(biased=True), never) == backends.Choice("sdpa", "asked for")


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_trial_finds_nonsense(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "flash3", lambda q, *_: torch.full_like(q, value))
    assert attention_backends.try_out("flash3", torch.device("cpu")) == "a kernel computed nonsense"


def test_trial_finds_what_is_installed_and_broken() -> None:
    """As all of them are on this machine, where there is no device."""
    fault = attention_backends.try_out("cudnn", torch.device("cpu"))
    assert fault is not None and "_scaled_dot_product_cudnn_attention" in fault
    assert attention_backends.try_out("sdpa", torch.device("cpu")) is None


# --- end to end: what is dispatched -----------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    """The attention operations that a call comes down to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function) or "varlen" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


OPS = {
    "flash": "aten._scaled_dot_product_flash_attention.default",
    "cudnn": "aten._scaled_dot_product_cudnn_attention.default",
    "triton": "skylapse.attention.default",
    "varlen": "torch_attn._varlen_attn.default",
}


def pack(*lengths: int, num_heads: int = 40) -> tuple[Tensor, tuple[int, ...]]:
    return torch.empty(sum(lengths), num_heads, 128, device="cuda", dtype=torch.bfloat16), tuple(
        accumulate(lengths, initial=0)
    )


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_fastest_kernel_is_dispatched_at_720p_and_ours_for_a_bias(capability: int) -> None:
    with torch.no_grad(), fake_cuda(capability), Dispatched() as seen:
        q, cu_seqlens = pack(75600)
        out = attention(q, q, q, cu_seqlens)
        bias = torch.empty(512, device="cuda")
        attention(q, q[:512], q[:512], cu_seqlens, (0, 512), bias)
        attention_with_lse(q, q, q, cu_seqlens)
        assert (out.shape, out.is_contiguous()) == ((75600, 40, 128), True)
    assert seen.names == [OPS[FIRST[capability]], OPS["triton"], OPS["triton"]]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_guided_pair_is_one_call_and_a_pack_of_short_clips_one_launch(capability: int) -> None:
    with torch.no_grad(), fake_cuda(capability), Dispatched() as seen:
        for lengths in ((32760, 32760), (32760, 75600), (160, 224, 320, 96)):
            q, cu_seqlens = pack(*lengths)
            attention(q, q, q, cu_seqlens)
    first = OPS[FIRST[capability]]
    assert seen.names == [first, first, first, OPS["triton"]]


def test_varlen_by_name_is_one_call_of_torchs() -> None:
    with torch.no_grad(), fake_cuda(90), Dispatched() as seen, Backends({"attention": "varlen"}).active():
        q, cu_seqlens = pack(160, 224, 320)
        assert attention(q, q, q, cu_seqlens).shape == q.shape
    assert seen.names == [OPS["varlen"]]


# --- what is refused of tensors ---------------------------------------------------------------------------------------


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    device = CUDA  # type: ignore[assignment]


def tensors(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(9, 2, 16).to(dtype).as_subclass(Elsewhere) for _ in range(3)]


def served(q: Tensor, k: Tensor, v: Tensor) -> str:
    with toolchain.told_capability(90):
        return module._backend(q, k, v, (0, 4, 9), (0, 4, 9), None, with_lse=False)


def test_tensors_that_no_kernel_takes_go_to_sdpa_and_it_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._told.clear()
    caplog.set_level(logging.INFO)
    assert [served(*tensors(torch.float32)) for _ in range(2)] == ["sdpa"] * 2
    (record,) = caplog.records
    assert record.getMessage() == "attention: sdpa instead of triton: q must be bfloat16 or float16, got torch.float32"
    assert served(*tensors(torch.float16)) == "triton"


def test_tensors_that_want_a_gradient_go_to_sdpa() -> None:
    q, k, v = tensors()
    assert served(q, k.requires_grad_(), v) == "sdpa"
    with torch.no_grad():
        assert served(q, k, v) == "triton"
