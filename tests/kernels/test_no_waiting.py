"""No launcher waits for the device, and none uploads anything once a layout is known: what CUDA graphs need.

Without a GPU, launchers run on tensors that say they are on one and have no numbers: whatever reads one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels.inputs import arguments
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from skylapse.kernels import (
    adaln,
    attention_kernels,
    attention_quantized_kernels,
    attention_sparse,
    attention_sparse_kernels,
    linear_quantized,
    linear_quantized_kernels,
    patch_embed,
    qk_norm_rope,
    quantize,
    rms_norm,
    solver_step,
    tables,
)

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "adaln": adaln._adaln_triton,
    "gated_residual": adaln._gated_residual_triton,
    "gated_residual_adaln": adaln._gated_residual_adaln_triton,
    "rms_norm": rms_norm._triton,
    "qk_norm_rope": qk_norm_rope._triton,
    "patch_embed": patch_embed._patch_embed_triton,
    "unpatchify": patch_embed._unpatchify_triton,
    "solver_step": solver_step._triton,
    "solver_step_uncorrected": solver_step._triton,
    "attention": attention_kernels.run,
    "attention_quantized": attention_quantized_kernels.run,
    "attention_sparse": attention_sparse_kernels.run,
    "quantize_rows": linear_quantized._quantize_rows_triton,
    "product_quantized": linear_quantized._product_triton,
}
UPLOADING = {"patch_embed": 2, "unpatchify": 2, "attention": 1, "attention_quantized": 4}  # tables of a new layout
LAUNCHES = {"attention_quantized": 5}  # columns, keys, queries, values, attention; of the others one


def inputs(name: str) -> tuple[Any, ...]:
    if name == "quantize_rows":
        return torch.randn(9, 32).bfloat16(), torch.int8
    if name == "product_quantized":
        rows, weight = (linear_quantized.quantize_rows(torch.randn(n, 32), torch.int8) for n in (9, 48))
        return *rows, *weight, torch.randn(48), "gelu_tanh", torch.bfloat16
    if not name.startswith("attention"):
        return arguments(name)
    q, k = torch.randn(9, 2, 64).bfloat16(), torch.randn(12, 2, 64).bfloat16()
    if name == "attention_quantized":
        tile = dict(block_m=64, block_n=64, num_warps=4, num_stages=3)
        return q, k, k, (0, 2, 9), (0, 4, 12), torch.zeros(12), "fp8", True, tile
    if name == "attention_sparse":
        lists = tuple(attention_sparse.BlockLists.full(*lengths) for lengths in ((2, 4), (7, 8)))
        layout = attention_sparse.layout_of(lists, 64, 64, torch.device("cpu"))
        tile = dict(block_m=64, block_n=64, num_warps=4, num_stages=3)
        return q, k, k, layout.tiles, layout.spans, torch.zeros(12), True, tile
    how = attention_kernels.Configuration(block_m=64, block_n=64, num_warps=4, num_stages=3)
    return q, k, k, (0, 2, 9), (0, 4, 12), torch.zeros(12), True, how


class Watch(TorchDispatchMode):
    """What crosses between the host and the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.crossed: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        leaves = [x for x in tree_flatten((args, kwargs, out))[0] if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in leaves}) > 1 or "_local_scalar_dense" in str(function):
            waits = "" if kwargs.get("non_blocking") else " waits"
            self.crossed.append(f"{function}{waits}")
        return out


class Recorded:
    """In a kernel's place: remembers with what it was launched."""

    def __init__(self, kernel: Any, launched: list[tuple[Any, ...]]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launched.append((self.kernel, grid, args, kwargs))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Every kernel recorded instead of launched, on an H100 that is not there."""
    found: list[tuple[Any, ...]] = []
    ours = (adaln, rms_norm, qk_norm_rope, patch_embed, solver_step, quantize, linear_quantized_kernels)
    for module in (*ours, attention_kernels, attention_quantized_kernels, attention_sparse_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with FakeTensorMode():
        yield found


def on_the_device(values: Any) -> Any:
    def move(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    return tree_map(move, values)


def fresh(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = getattr(module, name)
    monkeypatch.setattr(module, name, tables.PerLayout(kept.build))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_waits_for_nothing_and_uploads_a_new_layout_once(
    name: str, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh(patch_embed, "layout_of", monkeypatch)
    fresh(attention_kernels, "tiles_of", monkeypatch)
    fresh(attention_quantized_kernels, "query_tiles_of", monkeypatch)
    fresh(quantize, "sequences_of", monkeypatch)
    fresh(quantize, "tiles_of", monkeypatch)
    given = on_the_device(inputs(name))
    with Watch() as first:
        LAUNCHERS[name](*given)
    assert len(launched) == LAUNCHES.get(name, 1)
    assert len(first.crossed) == UPLOADING.get(name, 0) and not any("waits" in one for one in first.crossed)
    with Watch() as second:
        LAUNCHERS[name](*given)
    assert (len(launched), second.crossed) == (2 * LAUNCHES.get(name, 1), [])


def test_watch_sees_what_waits(launched: list[tuple[Any, ...]]) -> None:
    with Watch() as watch:
        torch.empty(3, device="cuda").cpu()
        torch.zeros(3).to("cuda:0")
    assert len(watch.crossed) == 2 and all("waits" in one for one in watch.crossed)
    with pytest.raises(DataDependentOutputException):
        torch.empty(1, device="cuda").item()


def test_patches_of_35_requests_are_three_launches_over_one_table(launched: list[tuple[Any, ...]]) -> None:
    latents = [torch.empty(3, 1, 2, 4 * (1 + i % 9), device="cuda") for i in range(35)]
    weight, bias = torch.empty(24, 12, device="cuda"), torch.empty(24, device="cuda")
    patch_embed._patch_embed_triton(latents, weight, bias, (1, 2, 2))
    firsts = [(args[16], args[17]) for _, _, args, _ in launched]  # the first tile, the first request
    assert [request for _, request in firsts] == [0, 16, 32]
    assert [tile for tile, _ in firsts] == [0, launched[0][1][0], launched[0][1][0] + launched[1][1][0]]
    assert sum(grid[0] for _, grid, _, _ in launched) == 35, "each request is a tile"
    assert [x is latents[32 + (i if i < 3 else 0)] for i, x in enumerate(launched[2][2][:16])] == [True] * 16


# --- tables -----------------------------------------------------------------------------------------------------------


def test_layout_is_built_once_and_the_latest_are_kept() -> None:
    built: list[int] = []

    def build(number: int) -> int:
        built.append(number)
        return number

    layouts = tables.PerLayout(build, latest=2)
    assert [layouts(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert built == [1, 2, 3, 2], "2 had been used least lately when 3 came"


def test_layout_that_was_captured_is_kept_and_a_new_one_is_refused_in_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    layouts = tables.PerLayout(lambda number: [number], latest=1)
    served = layouts(1)
    capturing[0] = True
    assert layouts(1) is served
    with pytest.raises(RuntimeError, match="serve a layout once before it is captured"):
        layouts(2)
    capturing[0] = False
    layouts(2), layouts(3)
    assert layouts(1) is served, "a graph reads it"


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAUNCHERS)
def test_captured_launch_replays_on_new_numbers(name: str) -> None:
    given = tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, inputs(name))
    numbers = [x for x in tree_flatten(given)[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        LAUNCHERS[name](*given)  # compiles, and uploads the layout
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tree_flatten(LAUNCHERS[name](*given))[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x in numbers:
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    expected = tree_flatten(LAUNCHERS[name](*given))[0]
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
