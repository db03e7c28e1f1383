"""Block-sparse attention: its kernel in the interpreter and compiled, its operation, layouts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.interpreter import interpret
from kernels.sparse_lists import random_lists, seen
from torch import Tensor

from skylapse.kernels import inspect, launches, reference, roofline
from skylapse.kernels.attention import attention_with_lse
from skylapse.kernels.attention_sparse import (
    BlockLists,
    build_layout,
    layout_of,
    sparse_attention,
    sparse_attention_with_lse,
)
from skylapse.kernels.attention_sparse_kernels import launch, shipped
from skylapse.kernels.toolchain import Shipped

# As attention's in test_attention.py: in units of the result's root mean square.
TOLERANCES = {"torch.float32": 2e-5, "torch.float16": 8e-3, "torch.bfloat16": 6e-2}
CPU = torch.device("cpu")
SIZES = [((3, 1, 5), (2, 7, 1, 4)), ((4,), (6,)), ((1, 1), (3, 3, 3))]
CU_Q, CU_K = (0, 9, 13, 15), (0, 14, 20, 29)
operation: Any = torch.ops.skylapse.attention_sparse.default


def lists(num_heads: int) -> list[BlockLists]:
    generator = torch.Generator().manual_seed(1)
    return [random_lists(q_sizes, k_sizes, num_heads, generator) for q_sizes, k_sizes in SIZES]


def draw(num_tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((num_tokens, 2, 16), generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return draw(CU_Q[-1], 0, dtype), draw(CU_K[-1], 1, dtype), draw(CU_K[-1], 2, dtype)


def bias() -> Tensor:
    return torch.randn(CU_K[-1], generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    lines = interpret(Path(__file__).with_name("attention_sparse_numerics.py")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
def test_kernel_computes_the_formula_and_writes_every_element(variant: str, interpreted: list[dict[str, Any]]) -> None:
    cases = [case for case in interpreted if case["case"].split()[0] == variant]
    assert len(cases) == 13, "every shape and dtype was run"
    assert [case for case in cases if not case["worst"] <= TOLERANCES[case["dtype"]]] == []


@pytest.mark.parametrize("num_heads", [1, 2], ids=["shared", "of each head"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_torch_path_computes_the_formula(num_heads: int, biased: bool, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = inputs(dtype)
    key_bias, own = bias() if biased else None, lists(num_heads)
    layout = build_layout(CU_Q, CU_K, own, 16, dtype, CPU)
    out, lse = sparse_attention_with_lse(q, k, v, layout, key_bias)
    expected, sums = reference.sparse_attention(q, k, v, CU_Q, CU_K, [seen(one, 2) for one in own], key_bias)
    assert (out.double() - expected).abs().max() < tolerance
    hidden = sums == -torch.inf
    assert hidden.any(), "the last head's last list is empty"
    assert torch.equal(lse == -torch.inf, hidden) and (out.transpose(0, 1)[hidden] == 0).all()
    assert (lse - sums)[~hidden].abs().max() < tolerance
    assert torch.equal(sparse_attention(q, k, v, layout, key_bias), out)


def test_lists_of_every_block_are_attention_to_the_bit() -> None:
    q, k, v = inputs()
    full = [BlockLists.full(9, 14), BlockLists((0, 1, 4), (0, 2, 6), (((0, 1), (0, 1)),)), BlockLists.full(2, 9)]
    results = sparse_attention_with_lse(q, k, v, build_layout(CU_Q, CU_K, full, 16, q.dtype, CPU), bias())
    for one, other in zip(results, attention_with_lse(q, k, v, CU_Q, CU_K, bias()), strict=True):
        assert torch.equal(one, other)


def test_small_tiles_are_the_same_attention() -> None:
    q, k, v = inputs()
    whole = sparse_attention(q, k, v, build_layout(CU_Q, CU_K, lists(2), 16, q.dtype, CPU))
    cut = sparse_attention(q, k, v, layout_of(tuple(lists(2)), 2, 3, CPU))
    torch.testing.assert_close(whole, cut)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("skewed", [False, True], ids=["aligned", "misaligned"])
def test_on_a_gpu_it_computes_the_formula_the_same_at_each_call(head_size: int, skewed: bool) -> None:
    generator, cuda = torch.Generator().manual_seed(0), torch.device("cuda")
    sizes = [((130, 1, 200), (64, 1, 300, 33)), ((5,), (129,))]
    own = [random_lists(*pair, 2, generator) for pair in sizes]
    cu_q, cu_k = (0, 331, 336), (0, 398, 527)
    q, k, v = (torch.randn((n, 2, head_size + skewed), generator=generator).bfloat16() for n in (336, 527, 527))
    q, k, v = (x[..., skewed:] for x in (q, k, v))  # starts and strides that the copy engine does not take
    key_bias = torch.randn(527, generator=generator)
    layout = build_layout(cu_q, cu_k, own, head_size, q.dtype, cuda)
    given = q.to(cuda), k.to(cuda), v.to(cuda), layout, key_bias.to(cuda)
    results = [sparse_attention_with_lse(*given) for _ in range(3)]
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))
    expected, sums = reference.sparse_attention(q, k, v, cu_q, cu_k, [seen(one, 2) for one in own], key_bias)
    worst = (results[0][0].cpu().double() - expected).abs().max() / expected.square().mean().sqrt()
    assert worst < TOLERANCES["torch.bfloat16"]
    torch.testing.assert_close(results[0][1].cpu().double(), sums, atol=1e-3, rtol=0)


# --- as an operation of torch -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what opcheck imports
@pytest.mark.parametrize("with_lse", [False, True])
def test_operation_passes_opcheck(with_lse: bool) -> None:
    layout = build_layout(CU_Q, CU_K, lists(2), 16, torch.float32, CPU)
    tables = layout.tiles, layout.spans, layout.block_m, layout.block_n
    torch.library.opcheck(operation, (*inputs(), *tables, bias() if with_lse else None, with_lse))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what inductor imports
def test_operation_compiles_into_one_graph() -> None:
    layout = build_layout(CU_Q, CU_K, lists(1), 16, torch.float32, CPU)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(2 * q, k, v, layout, bias) + 1

    bias = torch.zeros(CU_K[-1])
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*inputs()), run(*inputs()))


def test_fake_tensors_on_a_gpu_that_is_not_there_have_the_results_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(15, 2, 64, device="cuda"), torch.empty(29, 2, 64, device="cuda")
        tables = (torch.empty(*shape, dtype=torch.int32, device="cuda") for shape in ((1, 6, 6), (9, 2)))
        out, lse = operation(q, k, k, *tables, 128, 64, None, True)
        assert (out.shape, out.device.type, lse.shape, lse.dtype) == ((15, 2, 64), "cuda", (2, 15), torch.float32)


def test_cpu_path_is_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    sparse_attention(q, k, v, build_layout(CU_Q, CU_K, lists(2), 16, q.dtype, CPU)).sum().backward()
    assert v.grad is not None and v.grad.isfinite().all() and v.grad.abs().sum() > 0


def test_roofline_counts_the_pairs_of_the_lists() -> None:
    q, k, v = inputs(torch.bfloat16)
    own = lists(2)
    layout = build_layout(CU_Q, CU_K, own, 16, torch.bfloat16, CPU)
    assert layout.num_pairs == sum(int(seen(one, 2).sum()) for one in own)
    cost = roofline.sparse_attention(layout.num_queries, layout.num_keys, layout.num_pairs, 2, 16, 2, biased=True)
    assert cost.num_bytes == 2 * q.nbytes + k.nbytes + v.nbytes + bias().nbytes
    assert cost.operations == 4 * layout.num_pairs * 16


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_layout_joins_neighbouring_blocks_cuts_spans_and_starts_the_longest_first() -> None:
    own = BlockLists((0, 2, 5), (0, 4, 6, 7, 12), (((1,), (0, 1, 3)),))
    layout = layout_of((own, own), 2, 4, CPU)
    assert layout.spans.tolist() == [[4, 2], [0, 4], [4, 2], [7, 4], [11, 1]], "told once for both sequences"
    many, few = (1, 5), (0, 1)
    assert layout.tiles.tolist() == [
        [
            [2, 2, *many, 0, 12],
            [4, 1, *many, 0, 12],
            [7, 2, *many, 12, 12],
            [9, 1, *many, 12, 12],
            [0, 2, *few, 0, 12],
            [5, 2, *few, 12, 12],
        ]
    ]
    assert (layout.tiles.dtype, layout.spans.dtype, layout.num_pairs) == (
        torch.int32,
        torch.int32,
        2 * (2 * 2 + 3 * 11),
    )


def test_layout_is_made_once() -> None:
    own = lists(2)
    layouts = [build_layout(CU_Q, CU_K, given, 16, torch.float32, CPU) for given in (own, [*own], lists(2))]
    assert layouts[0] is layouts[1] and layouts[0] is not layouts[2]


@pytest.mark.parametrize(
    ("q_bounds", "k_bounds", "of_heads", "error"),
    [
        ((0, 0), (0, 1), (((0,),),), r"q_bounds must rise from 0, got \(0, 0\)"),
        ((0, 1), (1, 2), (((0,),),), r"k_bounds must rise from 0, got \(1, 2\)"),
        ((0, 1, 2), (0, 1), (((0,),),), "1 lists for 2 blocks of queries"),
        ((0, 1), (0, 1, 2), (((0, 2),),), r"a list must rise within 0 and 1, got \(0, 2\)"),
        ((0, 1), (0, 1, 2), (((-1,),),), r"a list must rise within 0 and 1, got \(-1,\)"),
        ((0, 1), (0, 1, 2), (((1, 1),),), r"a list must rise within 0 and 1, got \(1, 1\)"),
        ((0, 1), (0, 1), (), "lists must be of every head, or one for all of them; got none"),
    ],
)
def test_wrong_lists_are_named(q_bounds: Any, k_bounds: Any, of_heads: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        BlockLists(q_bounds, k_bounds, of_heads)


def test_lists_that_do_not_fit_the_pack_are_named() -> None:
    for cu_q, cu_k in ((CU_Q[:-1], CU_K[:-1]), ((0, 8, 13, 15), CU_K), (CU_Q, (0, 13, 20, 29)), (CU_Q, CU_K[:-1])):
        with pytest.raises(ValueError, match=r"lists of \[\(9, 14\), \(4, 6\), \(2, 9\)\] queries and keys do not fit"):
            build_layout(cu_q, cu_k, lists(2), 16, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"sequences have lists of \[2, 3\] heads"):
        build_layout(CU_Q, CU_K, [*lists(2)[:2], lists(3)[2]], 16, torch.float32, CPU)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a | {"q": a["q"][:3]}, "the layout is of 15 queries and 29 keys, got 3 and 29"),
        (lambda a: a | {"v": a["v"][:3]}, "shapes differ"),
        (lambda a: {n: a[n].repeat(1, 2, 1) for n in a}, "the layout is of 2 heads, got 4"),
        (lambda a: a | {"key_bias": bias()[:4]}, r"key_bias must be \[29\], got \(4,\)"),
    ],
)
def test_call_that_does_not_fit_its_layout_is_named(change: Callable[[Any], dict[str, Any]], error: str) -> None:
    given = change(dict(zip("qkv", inputs(), strict=True)))
    with pytest.raises(ValueError, match=error):
        sparse_attention(**given, layout=build_layout(CU_Q, CU_K, lists(2), 16, torch.float32, CPU))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a | {"q": a["q"].float()}, "q must be bfloat16 or float16, got torch.float32"),
        (lambda a: a | {"k": a["k"].transpose(1, 2).contiguous().mT}, "k's last dimension must be contiguous"),
        (lambda a: a | {"spans": a["spans"].to("meta")}, "spans must be contiguous int32 on cpu as q is"),
        (lambda a: a | {"tiles": a["tiles"].long()}, "tiles must be contiguous int32 on cpu as q is, got torch.int64"),
        (lambda a: a, "no launch of attention_sparse in bf16 and width 16"),
    ],
)
def test_launcher_names_what_it_cannot_take(change: Callable[[Any], dict[str, Any]], error: str) -> None:
    """The last is a layout that was made for a CPU."""
    layout = build_layout(CU_Q, CU_K, lists(2), 16, torch.float32, CPU)
    given = dict(zip("qkv", inputs(torch.bfloat16), strict=True)) | dict(tiles=layout.tiles, spans=layout.spans)
    with pytest.raises(ValueError, match=error):
        launch(**change(given), block_m=layout.block_m, block_n=layout.block_n, key_bias=None, with_lse=False)


# --- configurations and machine code ----------------------------------------------------------------------------------

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize("arch", MATRIX)
def test_layout_of_an_architecture_serves_misaligned_tensors_too(arch: int) -> None:
    """A layout's blocks are those of the first row, and another row of pointers has the same ones."""
    for head_size in (8, 64, 96, 128):
        how = launches.find("attention_sparse", "attention_sparse", arch, "bf16", head_size, 75600)

        def pointers(row: Any, how: Any = how) -> bool:
            return not row.get("descriptors") and all(row[side] == how[side] for side in ("block_m", "block_n"))

        assert launches.find("attention_sparse", "attention_sparse", arch, "bf16", head_size, 75600, pointers)


@pytest.mark.kernels
@pytest.mark.parametrize("item", shipped(), ids=lambda item: f"sm_{item.architectures[0]} {item.configuration}")
def test_every_configuration_has_its_matrix_instruction_and_no_spills(item: Shipped) -> None:
    (arch,) = item.architectures
    compiled = inspect.compile_for(item, arch)
    assert (compiled.matrix, compiled.faults) == (MATRIX[arch], ())
