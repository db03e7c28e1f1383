"""The four small convolutions equal the doubled frame's one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from skylapse.kernels import resample_conv
from skylapse.kernels.fake_cuda import UNGUARDED, fake_cuda
from skylapse.kernels.resample_conv import upsample_conv2d
from skylapse.runtime.vae.wan import Upsample, WanVAE, WanVAEConfig


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


# --- kernels that are kept --------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights of which kernels are computed."""
    found: list[torch.Tensor] = []
    compute = resample_conv._kernels

    def counted(weight: torch.Tensor) -> torch.Tensor:
        found.append(weight)
        return compute(weight)

    monkeypatch.setattr(resample_conv, "_kernels", counted)
    return found


@torch.no_grad()
def test_kernels_are_computed_once_a_weight_and_to_the_bit(computed: list[torch.Tensor]) -> None:
    module, x = Module(), torch.randn(2, 5, 4, 6)
    first = module(x)
    assert torch.equal(module(x), first) and len(computed) == 1
    with torch.inference_mode():
        assert torch.equal(module(x), first) and len(computed) == 1
    assert torch.equal(resample_conv.kernels_of(module.conv.weight), resample_conv._kernels(module.conv.weight))


def _move(weight: torch.nn.Parameter, to: torch.Tensor) -> None:
    weight.data = to


CHANGES: dict[str, Callable[[torch.nn.Parameter], object]] = {
    "written to": lambda weight: weight.add_(1),
    "moved": lambda weight: _move(weight, weight.data * 2),
    "moved in inference mode": torch.inference_mode()(lambda weight: _move(weight, weight.data * 2)),
    "converted": lambda weight: _move(weight, weight.data.double()),
    "a view of what it was": lambda weight: _move(weight, weight.data.flip(-1).transpose(2, 3)),
    "transposed where it lies": lambda weight: _move(weight, weight.data.transpose(2, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_kernels_follow_their_weight(change: str) -> None:
    weight = Module().conv.weight
    resample_conv.kernels_of(weight)
    CHANGES[change](weight)
    kept, computed = resample_conv.kernels_of(weight), resample_conv._kernels(weight)
    assert kept.dtype == computed.dtype and torch.equal(kept, computed)


@torch.no_grad()
def test_two_weights_of_one_file_have_kernels_of_their_own(computed: list[torch.Tensor]) -> None:
    both = torch.randn(2, 3, 5, 3, 3)
    for _ in range(2):
        kernels = [resample_conv.kernels_of(weight) for weight in both]
    assert not torch.equal(*kernels) and len(computed) == 2


@torch.no_grad()
def test_kernels_are_freed_with_the_memory_that_their_weight_lay_in() -> None:
    module = Module()
    moved = weakref.ref(resample_conv.kernels_of(module.conv.weight))
    module.conv.weight.data = torch.zeros(3, 5, 3, 3)
    dropped = weakref.ref(resample_conv.kernels_of(module.conv.weight))
    assert moved() is None and dropped() is not None
    del module
    assert dropped() is None


@torch.no_grad()
def test_only_the_latest_of_a_weight_that_is_written_to_are_kept() -> None:
    weight = Module().conv.weight
    before = weakref.ref(resample_conv.kernels_of(weight))
    weight.zero_()
    resample_conv.kernels_of(weight)
    assert before() is None


def test_threads_share_them(computed: list[torch.Tensor]) -> None:
    module, x = Module().requires_grad_(False), torch.randn(2, 5, 4, 6)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: module(x), range(16)))
    assert len(computed) == 1 and all(torch.equal(result, results[0]) for result in results)


@torch.no_grad()
def test_another_stream_waits_for_them_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []
    with fake_cuda(90):
        monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda stream, event: log.append(stream))
        monkeypatch.setitem(UNGUARDED, "record_stream", lambda x, stream: log.append(stream))
    with fake_cuda(90):
        weight, side = torch.empty(3, 5, 3, 3, device="cuda"), torch.cuda.Stream()
        kernels = resample_conv.kernels_of(weight)
        assert resample_conv.kernels_of(weight) is kernels and log == []
        with torch.cuda.stream(side):
            assert resample_conv.kernels_of(weight) is kernels and log == [side, side]


def test_published_decoders_keep_what_is_said_of_them() -> None:
    def num_bytes(config: WanVAEConfig) -> float:
        with torch.device("meta"):
            decoder = WanVAE(config).decoder
        weights = [part.resample.weight for part in decoder.modules() if isinstance(part, Upsample)]
        return sum(4 * resample_conv._kernels(weight).numel() for weight in weights)

    wide = dict(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, patch_size=2)
    sides = dict(in_channels=12, out_channels=12, scale_factor_spatial=16)
    assert num_bytes(WanVAEConfig()) == pytest.approx(10.6e6, rel=0.01)
    assert num_bytes(WanVAEConfig(**wide, **sides)) == pytest.approx(151e6, rel=0.01)
