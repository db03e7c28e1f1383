"""Linear: on CUDA its GELU is made by the product, so that one tensor holds what two held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels.calls import Calls
from torch import Tensor

from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.linear import linear
from skylapse.kernels.live_bytes import LiveBytes

FUSED, PLAIN = "aten._addmm_activation.default", "aten.gelu.default"


def operands(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = (torch.zeros(shape, device=device, dtype=dtype) for shape in ((2, 5, 32), (48, 32), (48,)))
    return x, w, b


def called(run: Callable[[], Tensor]) -> dict[str, dict[str, Any]]:
    with Calls() as calls:
        run()
    return dict(calls.made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gelu_is_fused_on_cuda_over_rows_and_a_weight_by_columns(dtype: torch.dtype) -> None:
    with torch.inference_mode(), fake_cuda(90):
        x, w, b = operands(dtype)
        made = called(lambda: linear(x, w, b, "gelu_tanh"))
        bias, rows, columns = (made[FUSED][name] for name in ("self", "mat1", "mat2"))
        assert PLAIN not in made and made[FUSED]["use_gelu"] is True
        assert (bias.shape, rows.shape, columns.shape, columns.stride()) == ((48,), (10, 32), (32, 48), (1, 32))
        y = linear(x, w, b, "gelu_tanh")
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, 48), dtype, "cuda")


def test_fused_gelu_takes_one_tensor() -> None:
    with torch.inference_mode(), fake_cuda(90):
        x, w, b = operands()
        with LiveBytes() as live:
            y = linear(x, w, b, "gelu_tanh")
        assert live.peak_bytes == y.nbytes


def test_what_cublas_does_not_fuse_is_not_given_to_it() -> None:
    with torch.inference_mode(), fake_cuda(90):
        x, w, b = operands()
        unbiased = called(lambda: linear(x, w, None, "gelu_tanh"))
        double = called(lambda: linear(x.double(), w.double(), b.double(), "gelu_tanh"))
    assert all(FUSED not in made and PLAIN in made for made in (unbiased, double))


def test_gelu_is_not_fused_where_a_gradient_may_be_asked_for() -> None:
    with torch.enable_grad(), fake_cuda(90):
        x, w, b = operands()
        made = called(lambda: linear(x, w, b, "gelu_tanh"))
    assert FUSED not in made and PLAIN in made


def test_a_cpu_never_runs_the_operation_whose_gelu_is_exact_there() -> None:
    x, w, b = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((6, 32), (48, 32), (48,)))
    exact, tanh = (F.gelu(F.linear(x, w, b), approximate=how) for how in ("none", "tanh"))
    with torch.inference_mode():
        assert FUSED not in called(lambda: linear(x, w, b, "gelu_tanh"))
        assert (linear(x, w, b, "gelu_tanh") - tanh).abs().max() < 1e-5 < (exact - tanh).abs().max()
        assert torch.allclose(torch._addmm_activation(b, x, w.t(), use_gelu=True), exact, atol=1e-5)


def test_compiled_code_keeps_a_gelu_that_inductor_can_fuse() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    x, w, b = operands(torch.float32, "cpu")
    with torch.inference_mode():
        torch.compile(lambda: linear(x, w, b, "gelu_tanh"), backend=keep, fullgraph=True)()
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [F.linear, F.gelu]
