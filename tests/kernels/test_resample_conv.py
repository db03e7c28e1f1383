"""The four small convolutions equal the doubled frame's one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from skylapse.kernels.resample_conv import upsample_conv2d


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(5, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.conv.bias is not None
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)


def reference(module: Module, x: torch.Tensor) -> torch.Tensor:
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    return F.conv2d(doubled, module.conv.weight, module.conv.bias, padding=1)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (6, 5)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_equals_doubling_and_convolving(height: int, width: int, order: torch.memory_format) -> None:
    module = Module().double()
    x = torch.randn(2, 5, height, width, dtype=torch.float64).contiguous(memory_format=order)
    y = module(x)
    assert torch.equal(y.isnan(), torch.zeros_like(y, dtype=torch.bool))
    torch.testing.assert_close(y, reference(module, x), rtol=1e-6, atol=1e-6)  # its sums of weights are fp32's
    if height > 1 and width > 1:
        assert y.is_contiguous(memory_format=order)


def test_gradients_are_the_references() -> None:
    module, x = Module(), torch.randn(2, 5, 4, 6)
    (ours,) = torch.autograd.grad(module(x).square().sum(), [module.conv.weight])
    (theirs,) = torch.autograd.grad(reference(module, x).square().sum(), [module.conv.weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_exported_graph_is_the_same_function_and_holds_no_doubled_frame() -> None:
    module, x = Module().eval(), torch.randn(2, 5, 4, 6)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {2: torch.export.Dim.DYNAMIC}})
    larger = torch.randn(2, 5, 9, 6)
    torch.testing.assert_close(program.module()(larger), reference(module, larger), rtol=1e-5, atol=1e-5)
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert [tuple(node.args[1].meta["val"].shape[2:]) for node in convolutions] == [(2, 2)] * 4
