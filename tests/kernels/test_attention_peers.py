"""What other libraries and torch's own kernels are handed, and that nothing of the process is changed for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skylapse.kernels import attention as module
from skylapse.kernels import attention_peers, reference, tables
from skylapse.kernels.attention_peers import PEERS
from skylapse.kernels.fake_cuda import fake_cuda

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


class SeqLenInfo:
    """xformers': lengths, and where sequences start as a tensor on a device."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.seqstart_py = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        self.seqstart = torch.tensor(self.seqstart_py, dtype=torch.int32, device=device)


class BlockDiagonalMask:
    def __init__(self, q_seqlen: list[int], kv_seqlen: list[int], device: torch.device) -> None:
        self.q_seqinfo, self.k_seqinfo = SeqLenInfo(q_seqlen, device), SeqLenInfo(kv_seqlen, device)

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen, device)


def stand_in_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented interface, on torch: [1, N, H, D], and a mask made of two lists of lengths."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: BlockDiagonalMask) -> Tensor:
        starts = (info.seqstart.tolist() for info in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
        return each(q[0], k[0], v[0], *starts)[None]

    stand_in(monkeypatch, "xformers")
    stand_in(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    stand_in(monkeypatch, "xformers.ops.fmha")
    stand_in(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]  # type: ignore[attr-defined]


def varlen(*given: Any, **named: Any) -> Tensor:
    """flash-attention 3's and torch's: tables of int32, and the longest lengths."""
    names = ("q", "k", "v", "cu_q", "cu_k", "max_q", "max_k")
    q, k, v, cu_q, cu_k, max_q, max_k = (*given, *named.values())
    assert len(given) + len(named) == len(names)
    assert (cu_q.dtype, cu_k.dtype, max_q, max_k) == (torch.int32, torch.int32, 5, 7)
    return each(q, k, v, cu_q.tolist(), cu_k.tolist())


def stand_in_flash3(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=lambda *q, **n: (varlen(*q, **n), None))


def stand_in_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen as real

    monkeypatch.setattr(real, "varlen_attn", varlen)


def stand_in_sage(monkeypatch: pytest.MonkeyPatch) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
        assert (tensor_layout, is_causal, q.dim(), q.stride(-1)) == ("HND", False, 4, 1)
        return F.scaled_dot_product_attention(q, k, v)

    stand_in(monkeypatch, "sageattention", sageattn=sageattn)


INSTALL = {
    "xformers": stand_in_xformers,
    "flash3": stand_in_flash3,
    "varlen": stand_in_varlen,
    "sage": stand_in_sage,
}


@pytest.mark.parametrize("name", INSTALL)
def test_other_library_is_handed_the_packs_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    INSTALL[name](monkeypatch)
    monkeypatch.setattr(attention_peers, "_block_diagonal", tables.PerLayout(attention_peers._block_diagonal.build))
    q, k, v = torch.randn(9, 2, 16), torch.randn(12, 2, 16), torch.randn(12, 2, 16)
    out = PEERS[name](q, k, v, CU_Q, CU_K)
    expected, _ = reference.attention(q, k, v, CU_Q, CU_K, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_varlen_attn_of_this_torch_takes_what_it_is_handed() -> None:
    """The seven arguments by their places, in 2.11 to 2.13."""
    from inspect import signature

    from torch.nn.attention.varlen import varlen_attn

    parameters = list(signature(varlen_attn).parameters.values())
    assert [p.name for p in parameters[:7]] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert all(p.default is not p.empty for p in parameters[7:])


# --- torch's kernels --------------------------------------------------------------------------------------------------


def stand_in_aten(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> None:
    """In the place of both operations, which have no kernel for a CPU."""

    class Operations:
        class _scaled_dot_product_cudnn_attention:
            @staticmethod
            def default(q: Tensor, k: Tensor, v: Tensor, mask: None, with_lse: bool) -> tuple[Tensor]:
                assert mask is None and not with_lse
                return (attend(q, k, v),)

        class _scaled_dot_product_flash_attention:
            @staticmethod
            def default(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor]:
                assert q.shape[3] % 8 == 0
                return (attend(q, k, v, scale=scale),)

    monkeypatch.setattr(attention_peers, "aten", Operations)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("head_size", [16, 20])
def test_torchs_kernel_is_called_for_each_run_of_one_shape(
    name: str, head_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        shapes.append((*q.shape[:3], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    stand_in_aten(monkeypatch, attend)
    cu_q, cu_k = (0, 2, 4, 9), (0, 3, 6, 12)
    q, k, v = torch.randn(9, 2, head_size), torch.randn(12, 2, head_size), torch.randn(12, 2, head_size)
    out = module.attention_by(name, q, k, v, cu_q, cu_k)
    expected, _ = reference.attention(q, k, v, cu_q, cu_k, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert shapes == [(2, 2, 2, 3), (1, 2, 5, 6)]


def flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.parametrize("name", ["cudnn", "flash", "sdpa"])
def test_kernel_by_name_changes_nothing_that_another_thread_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE's attention, in a thread beside it, chooses as ever: `sdpa_kernel` would leave it cuDNN alone."""
    before, seen = flags(), []

    def attend(q: Tensor, *_: object, **__: object) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append((flags(), torch._C._get_sdp_priority_order())))
        thread.start()
        thread.join()
        return q

    order = torch._C._get_sdp_priority_order()
    stand_in_aten(monkeypatch, attend)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    q, k, v = torch.randn(3, 9, 2, 16)
    module.attention_by(name, q, k, v, (0, 4, 9), (0, 4, 9))
    assert seen == [(before, order)] * 2


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_are_pinned_sent_once_a_layout_and_kept_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(table: Tensor, device: torch.device) -> Tensor:
        sent.append((table.tolist(), table.dtype))
        return table

    stand_in_xformers(monkeypatch)
    stand_in_flash3(monkeypatch)
    for place in (tables, attention_peers):
        monkeypatch.setattr(place, "send", send)
    for name in ("_uploaded", "_block_diagonal"):
        kept = getattr(attention_peers, name)
        assert isinstance(kept, tables.PerLayout), "an evicted table would be freed under a graph that reads it"
        monkeypatch.setattr(attention_peers, name, tables.PerLayout(kept.build))
    q, k = torch.randn(9, 2, 16), torch.randn(12, 2, 16)
    for name in ("flash3", "xformers"):
        for _ in range(2):
            PEERS[name](q, k, k, CU_Q, CU_K)
        assert sent == [(list(CU_Q), torch.int32), (list(CU_K), torch.int32)]
        sent.clear()


class Crossings(TorchDispatchMode):
    """Whether each copy from the host to the device goes on without waiting."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        return out


def test_tables_cross_to_the_device_without_waiting() -> None:
    with torch.no_grad(), fake_cuda(90), Crossings() as seen:
        q = torch.empty(9, 2, 64, device="cuda", dtype=torch.bfloat16)
        module.attention_by("varlen", q, q, q, (0, 4, 9), (0, 4, 9))
    assert seen.waits == [False, False]


def test_table_of_fake_tensors_is_left_to_the_mode_that_made_it() -> None:
    kept = tables.PerLayout(tables.upload_cu_seqlens)
    for _ in range(2):
        with fake_cuda(90):
            assert kept((0, 4, 9), torch.device("cuda")).device.type == "cuda"
    assert kept((0, 4, 9), torch.device("cpu")).tolist() == [0, 4, 9]
