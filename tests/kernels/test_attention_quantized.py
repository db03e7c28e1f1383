"""Attention on 8 bits: its error, what smoothing does, its kernels in the interpreter and compiled, its operation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import relative_l2
from kernels.interpreter import interpret
from torch import Tensor

from skylapse.kernels import (
    attention_quantized_kernels,
    backends,
    inspect,
    launches,
    machine_code,
    quantize,
    reference,
    roofline,
)
from skylapse.kernels.attention import attention, attention_by
from skylapse.kernels.attention_quantized import plain, quantized_attention
from skylapse.kernels.attention_quantized_kernels import launch, query_tiles_of, shipped
from skylapse.kernels.backends import Choice, decide, select
from skylapse.kernels.toolchain import Shipped

# Relative L2 distance from float64, and the greatest distance of an element in units of the result's root mean square.
# Measured on what is drawn below: int8 0.0098 and 0.07, fp8 0.054 and 0.4, bf16 attention 0.0017 and 0.02.
BOUNDS = {"int8": (0.012, 0.15), "fp8": (0.065, 0.6)}
# How far the kernel is from torch's path, which rounds in the same places but for the weights' anchor: the running
# maximum of a tile or the whole row's. Weights that are not rounded differ by fp32's order alone.
APART = {("int8", "torch.float32"): 1e-5, ("int8", "torch.float16"): 1e-3, ("int8", "torch.bfloat16"): 1e-2}
CU_Q, CU_K = (tuple(accumulate(lens, initial=0)) for lens in ((1, 5, 5, 33), (7, 2, 2, 40)))
operation: Any = torch.ops.skylapse.attention_quantized.default
forms = pytest.mark.parametrize("form", ["int8", "fp8"])


def draw(num_tokens: int, seed: int, head_size: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn((num_tokens, 2, head_size), generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return draw(CU_Q[-1], 0, 16, dtype), draw(CU_K[-1], 1, 16, dtype), draw(CU_K[-1], 2, 16, dtype)


def bias() -> Tensor:
    return torch.randn(CU_K[-1], generator=torch.Generator().manual_seed(3))


def with_outliers(k: Tensor) -> Tensor:
    """Four channels far from zero, as SageAttention shows keys of video models to have them (figure 4)."""
    offsets = torch.zeros(k.shape[2])
    offsets[:4] = torch.tensor([30.0, -20.0, 15.0, 40.0])
    return (k.float() + offsets).to(k.dtype)


# --- error ------------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
def test_error_is_within_the_bounds_that_are_documented(form: str, head_size: int, outliers: bool) -> None:
    q, k, v = (draw(600, seed, head_size) for seed in range(3))
    k = with_outliers(k) if outliers else k
    cu_seqlens = (0, 1, 250, 600)
    out, lse = quantized_attention(q, k, v, cu_seqlens, cu_seqlens, None, form, with_lse=True)
    expected, sums = reference.attention(q, k, v, cu_seqlens, cu_seqlens, None)
    worst = (out.double() - expected).abs().max() / expected.square().mean().sqrt()
    assert relative_l2(out, expected) < BOUNDS[form][0] and worst < BOUNDS[form][1]
    assert (lse.double() - sums).abs().max() < 3 * BOUNDS[form][0]


@forms
def test_error_doubles_where_few_keys_count(form: str) -> None:
    """Queries four times as large: an error of a logit is one of a weight's logarithm. Measured: 0.020 and 0.092."""
    q, k, v = (draw(600, seed) for seed in range(3))
    expected, _ = reference.attention(4 * q, k, v, (0, 600), (0, 600), None)
    error = relative_l2(quantized_attention(4 * q, k, v, (0, 600), (0, 600), None, form)[0], expected)
    assert BOUNDS[form][0] < error < {"int8": 0.03, "fp8": 0.13}[form]


@forms
def test_smoothing_is_what_keeps_keys_with_outlier_channels_within_the_bounds(form: str) -> None:
    q, k, v = (draw(600, seed) for seed in range(3))
    k = with_outliers(k)
    expected, _ = reference.attention(q, k, v, (0, 600), (0, 600), None)
    errors = [
        relative_l2(plain(q, k, v, (0, 600), (0, 600), None, form, False, smoothed)[0], expected)
        for smoothed in (True, False)
    ]
    assert errors[0] < BOUNDS[form][0] < 1.5 * BOUNDS[form][0] < errors[1]


@forms
def test_log_sum_exp_is_that_of_keys_with_their_mean(form: str) -> None:
    """A vector that is added to all keys adds q m / sqrt(D) to it, and changes no output."""
    q, k, v = inputs()
    shift = draw(1, 9, 16, torch.float32)[0] * 8
    moved = (q * shift).sum(-1).T / 4
    (out, lse), (same, moved_lse) = (
        quantized_attention(q, keys, v, CU_Q, CU_K, bias(), form, with_lse=True) for keys in (k, k + shift)
    )
    torch.testing.assert_close(moved_lse, lse + moved, atol=2e-2, rtol=0)
    assert relative_l2(same, out) < (1e-2 if form == "fp8" else 1e-3)


@forms
def test_query_without_keys_is_zeros(form: str) -> None:
    q, k, v = inputs()
    out, lse = quantized_attention(q, k, v, CU_Q, CU_K, torch.full((51,), -math.inf), form, with_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@forms
def test_sequence_does_not_change_its_neighbours(form: str) -> None:
    q, k, v = inputs()
    whole, _ = quantized_attention(q, k, v, CU_Q, CU_K, bias(), form)
    alone, _ = quantized_attention(q[1:6], k[7:9], v[7:9], (0, 5), (0, 2), bias()[7:9], form)
    assert torch.equal(whole[1:6], alone)


# --- kernels in the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    lines = interpret(Path(__file__).with_name("attention_quantized_numerics.py")).splitlines()
    return [json.loads(line) for line in lines]


@forms
@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
def test_kernel_rounds_where_torch_does_and_writes_every_element(
    variant: str, form: str, interpreted: list[dict[str, Any]]
) -> None:
    cases = [case for case in interpreted if case["case"].startswith(f"{variant} {form} ")]
    assert len(cases) == 11, "every shape and dtype was run"
    relative, worst = BOUNDS[form]
    assert [case for case in cases if not (case["relative"] < relative and case["worst"] < worst)] == []
    allowed = {case["case"]: APART.get((form, case["dtype"]), 3e-2) for case in cases}  # fp8's weights are rounded
    assert [case for case in cases if not case["apart"] < allowed[case["case"]]] == []


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_on_a_gpu_it_is_within_the_bounds_and_the_same_at_each_call(form: str, head_size: int) -> None:
    if form == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs sm_89 or newer")
    cu_q, cu_k, cuda = (0, 1, 128, 600), (0, 129, 257, 1000), torch.device("cuda")
    q, k, v = (draw(n, seed, head_size) for seed, n in enumerate((600, 1000, 1000)))
    k, key_bias = with_outliers(k), torch.randn(1000, generator=torch.Generator().manual_seed(3))
    given = q.to(cuda), k.to(cuda), v.to(cuda), cu_q, cu_k, key_bias.to(cuda), form, True
    results = [quantized_attention(*given) for _ in range(3)]
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))
    expected, sums = reference.attention(q, k, v, cu_q, cu_k, key_bias)
    assert relative_l2(results[0][0], expected) < BOUNDS[form][0]
    assert (results[0][1].cpu().double() - sums).abs().max() < 3 * BOUNDS[form][0]


# --- as an operation of torch -----------------------------------------------------------------------------------------


@forms
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what opcheck imports
@pytest.mark.parametrize("with_lse", [False, True])
def test_operation_passes_opcheck(form: str, with_lse: bool) -> None:
    torch.library.opcheck(operation, (*inputs(), [*CU_Q], [*CU_K], bias() if with_lse else None, form, with_lse))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what inductor imports
def test_operation_compiles_into_one_graph() -> None:
    q, k, v = inputs()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_by("triton-int8", 2 * q, k, v, CU_Q, CU_K) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v))


def test_fake_tensors_on_a_gpu_that_is_not_there_have_the_results_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(39, 2, 64, device="cuda"), torch.empty(51, 2, 64, device="cuda")
        out, lse = operation(q, k, k, [0, 39], [0, 51], None, "fp8", True)
        assert (out.shape, out.device.type, lse.shape, lse.dtype) == ((39, 2, 64), "cuda", (2, 39), torch.float32)


def test_roofline_adds_what_quantising_moves() -> None:
    q, k, v = draw(40, 0), draw(51, 1), draw(51, 2)
    exact = roofline.attention((40,), (51,), 2, 64, 2)
    for form, num_values in (("int8", 0), ("fp8", v.numel())):
        cost = roofline.quantized_attention((40,), (51,), 2, 64, 2, form)
        written = q.numel() + k.numel() + num_values + 4 * 2 * (40 + 51)
        assert cost.num_bytes - exact.num_bytes == 2 * written + k.nbytes + (v.nbytes if form == "fp8" else 0)
        assert cost.operations == exact.operations


# --- how it is chosen -------------------------------------------------------------------------------------------------


def test_it_is_asked_for_and_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        assert [decide("attention", arch, lambda: None).name for arch in (80, 89, 90, 100, 120)] == ["triton"] * 5
        select(backends.parse("attention=triton-fp8"))
        assert decide("attention", 89, lambda: None) == Choice("triton-fp8", "asked for")
        missing = "triton-fp8 (asked for) cannot serve: needs sm_89 or newer, this is sm_86"
        assert decide("attention", 86, lambda: None) == Choice("sdpa", missing, fallback=True)
        select(backends.parse("attention=triton-int8"))
        assert decide("attention", 80, lambda: None) == Choice("triton-int8", "asked for")
        assert decide("attention", 80, lambda: "it is broken").fallback
    finally:
        select({})


def test_attention_hands_its_call_to_the_form_that_was_chosen() -> None:
    q, k, v = inputs()
    exact = attention(q, k, v, CU_Q, CU_K, bias())
    for form in quantize.FORMATS:
        out = attention_by(f"triton-{form}", q, k, v, CU_Q, CU_K, bias())
        assert torch.equal(out, quantized_attention(q, k, v, CU_Q, CU_K, bias(), form)[0])
        assert 1e-4 < relative_l2(out, exact) < BOUNDS[form][0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a | {"q": a["q"].float()}, "q must be bfloat16 or float16, got torch.float32"),
        (lambda a: {n: torch.ones(4, 1, 136).bfloat16() for n in a}, "head size must be at most 128, got 136"),
        (lambda a: a | {"v": a["v"].transpose(1, 2).contiguous().mT}, "v's last dimension must be contiguous"),
        (lambda a: a | {"key_bias": bias().half()}, "key_bias must be contiguous float32, got torch.float16"),
        (lambda a: a | {"form": "int4"}, "form must be int8 or fp8, got 'int4'"),
    ],
)
def test_launcher_names_what_it_cannot_take(change: Callable[[Any], dict[str, Any]], error: str) -> None:
    given = {"key_bias": None, "form": "int8"} | change(dict(zip("qkv", inputs(torch.bfloat16), strict=True)))
    with pytest.raises(ValueError, match=error):
        launch(**given, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, with_lse=False)


# --- tiles, configurations, machine code ------------------------------------------------------------------------------


def test_tiles_say_where_padded_sequences_lie() -> None:
    cpu = torch.device("cpu")
    tiles, num_padded = quantize.tiles_of((0, 130, 133), cpu)
    assert (tiles.tolist(), num_padded) == ([[0, 130, 0], [128, 2, 0], [130, 3, 1]], 384)
    rows = query_tiles_of((0, 130, 131), (0, 5, 205), 128, cpu).tolist()
    assert rows == [[130, 1, 256, 5, 200, 128, 1], [0, 130, 0, 0, 5, 0, 0], [128, 2, 128, 0, 5, 0, 0]]


def test_tiles_of_attention_divide_those_that_are_quantised() -> None:
    rows = [row for rows in launches.table("attention_quantized").values() for row in rows]
    assert rows and all(quantize.PADDING % row.launch[side] == 0 for row in rows for side in ("block_m", "block_n"))


# Triton 3.7 has no tcgen05 for int8 (3.9 has), so there it is sm_80's instruction.
MATRIX = {
    "attention_int8": {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"},
    "attention_fp8": {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"},
}


@pytest.mark.kernels
@pytest.mark.parametrize(
    "item", shipped(), ids=lambda item: f"{item.op} sm_{item.architectures[0]} {item.configuration}"
)
def test_every_configuration_has_its_matrix_instruction_and_no_spills(item: Shipped) -> None:
    (arch,) = item.architectures
    compiled = inspect.compile_for(item, arch)
    assert (compiled.matrix, compiled.faults) == (MATRIX[item.op][arch], ())


@pytest.mark.kernels
def test_sums_of_fp8_products_leave_the_matrix_unit_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they are what it accumulates on, in too few bits: the output is then scaled outside it, and not added to."""
    item = next(item for item in shipped() if item.op == "attention_fp8" and item.architectures == (89,))
    texts, read = list[str](), machine_code.read

    def read_too(sass: str) -> machine_code.Code:
        texts.append(sass)
        return read(sass)

    monkeypatch.setattr(machine_code, "read", read_too)
    for short_sums in (True, False):
        inspect.compile_for(replace(item, constants={**item.constants, "SHORT_SUMS": short_sums}), 89)
    elements = item.constants["BLOCK_M"] * item.constants["BLOCK_D"] // (32 * item.num_warps)
    assert item.constants["SHORT_SUMS"] and texts[0].count("FFMA") - texts[1].count("FFMA") == elements


def test_every_architecture_and_head_size_has_a_configuration_of_each_form() -> None:
    for op, matrix in MATRIX.items():
        for arch in matrix:
            for head_size in (8, 64, 96, 128):
                how = launches.find("attention_quantized", op, arch, "fp16", head_size, 75600)
                assert bool(how.get("descriptors")) == (arch >= 90)
    with pytest.raises(ValueError, match="no launch of attention_fp8 in bf16"):
        launches.find("attention_quantized", "attention_fp8", 80, "bf16", 64, 1)
    assert attention_quantized_kernels.shipped()
