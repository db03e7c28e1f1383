"""Quantised linear: its kernels in the interpreter, its CPU path against the formula, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.interpreter import interpret
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from skylapse.kernels import inspect, launches, machine_code, reference, roofline
from skylapse.kernels.linear_quantized import (
    _decoded,
    _linear_quantized_triton,
    linear_quantized,
    quantize_rows,
    shipped,
)
from skylapse.kernels.linear_quantized_kernels import DTYPES, FP8_FROM, LARGEST, configuration
from skylapse.kernels.toolchain import ARCHITECTURES

# Greatest distance of an element from the formula's, in units of the result's root mean square. The interpreter cuts
# off where it converts to bf16, which is twice a rounding's error.
TOLERANCES = {"torch.float32": 2e-5, "torch.float16": 5e-3, "torch.bfloat16": 6e-2}
KINDS = list(DTYPES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(kind: str) -> Tensor:
    """The magnitudes that there are: 0 to 127, or e4m3's: m / 8 2^-6 below the normal ones, (1 + m / 8) 2^e above."""
    if kind == "int8":
        return torch.arange(128, dtype=torch.float64)
    small = [m / 8 * 2.0**-6 for m in range(8)]
    return torch.tensor(
        small + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1], dtype=torch.float64
    )


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    lines = interpret(Path(__file__).with_name("linear_quantized_numerics.py")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("what", "number"), [("rows", 20), ("pointers", 16), ("descriptors", 16)])
def test_kernel_computes_the_formula_and_writes_every_element(
    what: str, number: int, interpreted: list[dict[str, Any]]
) -> None:
    cases = [case for case in interpreted if case["case"].split()[0] == what]
    assert len(cases) == number, "every shape and dtype was run"
    assert [case for case in cases if not case["worst"] <= TOLERANCES[case["dtype"]]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_the_nearest_levels_of_their_maximum(kind: str, dtype: torch.dtype) -> None:
    x = (draw(40, 48) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    values, scales = quantize_rows(x, DTYPES[kind])
    expected, expected_scales = reference.quantize_rows(x, levels(kind))
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-6, atol=0)
    # Where an element lies in the middle of two levels, to the precision of fp32, either is the nearest.
    off = (values.double() * scales.double()[:, None] - x.double()).abs()
    least = (expected * expected_scales[:, None] - x.double()).abs()
    assert (off <= least + 1e-6 * x.double().abs()).all()
    assert values.double().abs().amax(1).eq(LARGEST[DTYPES[kind]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_is_rounded_to_even(kind: str) -> None:
    x = torch.full((1, 16), LARGEST[DTYPES[kind]])
    x[0, :4] = torch.tensor([0.5, 1.5, 2.5, -2.5] if kind == "int8" else [17.0, 19.0, 21.0, -21.0])
    expected = [0.0, 2.0, 2.0, -2.0] if kind == "int8" else [16.0, 20.0, 20.0, -20.0]
    assert quantize_rows(x, DTYPES[kind])[0][0, :4].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_is_zeros_and_one_without_a_number_is_no_number(kind: str) -> None:
    weight, weight_scale = quantize_rows(draw(32, 16), DTYPES[kind])
    x = draw(6, 16)
    x[1], x[2, 3], x[3, 5], x[4, 0] = 0, torch.nan, torch.inf, -torch.inf
    y = linear_quantized(x, weight, weight_scale)
    assert (y[1] == 0).all() and y[2:5].isnan().all() and y[[0, 5]].isfinite().all()
    broken = draw(32, 16)
    broken[7, 2] = torch.inf
    weight, weight_scale = quantize_rows(broken, DTYPES[kind])
    y = linear_quantized(draw(3, 16), weight, weight_scale)
    assert y[:, 7].isnan().all() and y.isfinite().sum() == 3 * 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_path_computes_the_formula(kind: str, activation: Any, dtype: torch.dtype) -> None:
    x, bias = draw(2, 9, 64).to(dtype), draw(48, seed=1).to(dtype)
    weight, weight_scale = quantize_rows(draw(48, 64, seed=2), DTYPES[kind])
    for b in (bias, None):
        y = linear_quantized(x, weight, weight_scale, b, activation)
        rows = quantize_rows(x.flatten(0, 1), DTYPES[kind])
        expected = reference.linear_quantized(*rows, weight, weight_scale, b, activation).view(2, 9, 48)
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.05)])
def test_product_is_near_the_unquantised_one(kind: str, error: float) -> None:
    x, w = draw(64, 256), draw(128, 256, seed=1)
    y = linear_quantized(x, *quantize_rows(w, DTYPES[kind]))
    off = float((y - x @ w.T).norm() / (x @ w.T).norm())
    assert error / 4 < off < error  # measured: 0.010 and 0.037


def test_a_tokens_result_does_not_depend_on_its_neighbours() -> None:
    x, (weight, weight_scale) = draw(9, 64), quantize_rows(draw(48, 64, seed=1), torch.int8)
    louder = torch.cat((x[:4], 1000 * x[4:]))
    assert torch.equal(
        linear_quantized(louder, weight, weight_scale)[:4], linear_quantized(x[:4], weight, weight_scale)
    )


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_tokens_give_no_outputs(shape: tuple[int, ...]) -> None:
    weight, weight_scale = quantize_rows(draw(48, 32), torch.int8)
    assert linear_quantized(torch.empty(shape), weight, weight_scale).shape == (*shape[:-1], 48)
    assert _linear_quantized_triton(torch.empty(0, 32), weight, weight_scale, None, "none").shape == (0, 48)


REFUSED: list[tuple[str, Callable[[list[Any]], None], str]] = [
    ("double", lambda a: a.__setitem__(0, a[0].double()), "x must be float32, bfloat16 or float16"),
    ("columns", lambda a: a.__setitem__(0, a[0].T), "x's last dimension must be contiguous"),
    ("widths", lambda a: a.__setitem__(0, a[0][:, :16]), r"x must be \[N, in\].* got \[5, 16\] and \[48, 32\]"),
    ("bf16 weight", lambda a: a.__setitem__(1, a[1].bfloat16()), "weight must be contiguous .*got torch.bfloat16"),
    ("strided weight", lambda a: a.__setitem__(1, a[1].repeat(1, 2)[:, ::2]), r"of strides \(64, 2\)"),
    ("elsewhere", lambda a: a.__setitem__(1, a[1].to("meta")), "on cpu, got torch.int8 .* on meta"),
    ("24 inputs", lambda a: a.__setitem__(slice(0, 2), [a[0][:, :24], a[1][:, :24].clone()]), "of 16, got 24"),
    ("40 outputs", lambda a: a.__setitem__(1, a[1][:40]), "in and out must be multiples of 16, got 32 and 40"),
    ("scales", lambda a: a.__setitem__(2, a[2][:3]), r"weight_scale must be \[48\], got \[3\]"),
    ("half scales", lambda a: a.__setitem__(2, a[2].half()), "weight_scale must be float32, got torch.float16"),
    ("bias", lambda a: a.__setitem__(3, a[3][:3]), r"bias must be \[48\], got \[3\]"),
    ("bias elsewhere", lambda a: a.__setitem__(3, a[3].to("meta")), "bias must be on cpu"),
    ("relu", lambda a: a.__setitem__(4, "relu"), "activation must be none or gelu_tanh, got 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
@pytest.mark.parametrize("run", [linear_quantized, _linear_quantized_triton])
def test_wrong_argument_is_refused_by_name(run: Any, change: Callable[[list[Any]], None], message: str) -> None:
    inputs: list[Any] = [draw(5, 32), *quantize_rows(draw(48, 32), torch.int8), draw(48), "none"]
    change(inputs)
    with pytest.raises(ValueError, match=message):
        run(*inputs)


def test_rows_that_cannot_be_quantised_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.float8_e4m3fn or torch.int8, got torch.uint8"):
        quantize_rows(draw(2, 16), torch.uint8)
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] with dim at most 32768"):
        quantize_rows(torch.empty(2, 40000), torch.int8)


def test_every_architecture_has_a_configuration_of_any_length() -> None:
    for arch in ARCHITECTURES:
        for kind in KINDS:
            if kind == "fp8" and arch < FP8_FROM:
                with pytest.raises(ValueError, match=f"fp8 products need sm_89 or newer, this is sm_{arch}"):
                    configuration(arch, kind, 1)
                continue
            small, large = configuration(arch, kind, 1), configuration(arch, kind, 10**6)
            assert small.block_m <= large.block_m and large.descriptors == (arch >= 90)


MATRIX = {
    "int8": {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"},  # Triton 3.7 has no tcgen05 of int8
    "fp8": {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"},
}


@pytest.mark.parametrize(
    ("kind", "arch"), [pytest.param(kind, arch, marks=pytest.mark.kernels) for kind in MATRIX for arch in MATRIX[kind]]
)
def test_products_use_the_matrix_instruction_of_their_kind(kind: str, arch: int) -> None:
    items = [item for item in shipped() if item.configuration.startswith(f"{kind} to bf16, GELU, any")]
    ((item, _),) = inspect.on([arch], items)
    compiled = inspect.compile_for(item, arch)
    assert (compiled.matrix, compiled.faults) == (MATRIX[kind][arch], ())


def test_roofline_counts_the_operands_once() -> None:
    x, weight, bias = draw(7, 32), torch.empty(48, 32, dtype=torch.int8), draw(48)
    values, scales = quantize_rows(x, torch.int8)
    product = sum(t.nbytes for t in (values, scales, weight, bias, bias, linear_quantized(x, weight, bias, bias)))
    assert roofline.linear_quantized(7, 32, 48, 4).num_bytes == product
    assert roofline.linear_quantized(7, 32, 48, 4).operations == 2 * 7 * 32 * 48
    assert roofline.quantize_rows(7, 32, 4).num_bytes == x.nbytes + values.nbytes + scales.nbytes


def test_configurations_are_those_of_the_table() -> None:
    assert {*launches.table("linear_quantized")} == {*ARCHITECTURES}
    named = {(item.op, item.configuration, arch) for item in shipped() for arch in item.architectures}
    assert len(named) == sum(len(item.architectures) for item in shipped()), "no two of one name"


# --- as operations of torch -------------------------------------------------------------------------------------------

OPERATIONS = [(name, kind) for name in ("quantize_rows", "linear_quantized") for kind in KINDS]


def call(name: str, kind: str) -> tuple[Any, tuple[Any, ...]]:
    """The overload that torch calls, and arguments of it."""
    weight, weight_scale = quantize_rows(draw(48, 32), DTYPES[kind])
    x = draw(7, 32, seed=1)
    product = (x, weight, weight_scale, draw(48, seed=2), "gelu_tanh")
    arguments = (x, DTYPES[kind]) if name == "quantize_rows" else product
    return getattr(torch.ops.skylapse, name).default, arguments


def on_cuda(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x


@pytest.mark.parametrize(("name", "kind"), OPERATIONS)
def test_operation_passes_opcheck(name: str, kind: str) -> None:
    operation, arguments = call(name, kind)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Whether an operand was written to is asked by comparing it, which torch cannot for fp8; int8 takes the same way.
    torch.library.opcheck(operation, arguments, test_utils=checks[kind == "fp8" :])


@pytest.mark.parametrize(("name", "kind"), OPERATIONS)
def test_fake_results_on_cuda_have_the_shapes_of_real_ones(name: str, kind: str) -> None:
    operation, arguments = call(name, kind)
    real, _ = tree_flatten(operation(*arguments))
    with FakeTensorMode():
        fake, _ = tree_flatten(operation(*map(on_cuda, arguments)))
    assert [(x.shape, x.dtype, x.stride(), "cuda") for x in real] == [
        (x.shape, x.dtype, x.stride(), x.device.type) for x in fake
    ]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # what inductor imports
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_into_one_graph(kind: str) -> None:
    """As the operation that a GPU runs, and as the CPU's path, which is traced."""
    operation, (x, weight, weight_scale, bias, activation) = call("linear_quantized", kind)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x, weight, weight_scale, bias, activation
        return operation(*inputs), linear_quantized(*inputs)

    for one, other in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_cuda_tensors_go_to_the_kernels() -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 5, 32, device="cuda", dtype=torch.bfloat16)
        values, scales = quantize_rows(torch.empty(48, 32, device="cuda"), torch.float8_e4m3fn)
        y = linear_quantized(x, values, scales, None, "gelu_tanh")
    assert (values.dtype, scales.dtype, y.dtype, y.shape) == (torch.float8_e4m3fn, torch.float32, x.dtype, (2, 5, 48))


@pytest.mark.parametrize("kind", KINDS)
def test_without_8_bit_instructions_the_result_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs = call("linear_quantized", kind)
    expected = linear_quantized(*inputs)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    torch.testing.assert_close(linear_quantized(*inputs), expected)


def test_every_e4m3_number_is_decoded_exactly() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = ~numbers.float().isnan()
    assert torch.equal(_decoded(numbers)[finite], numbers.float()[finite]) and finite.sum() == 254


@pytest.mark.kernels
@pytest.mark.parametrize("arch", [89, 90, 120])
def test_sums_of_fp8_products_are_finished_outside_the_matrix_unit(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An addition for each element of a tile, which is not there otherwise: no compiler has put the sums together."""
    texts: list[str] = []
    read = machine_code.read

    def read_too(sass: str) -> machine_code.Code:
        texts.append(sass)
        return read(sass)

    monkeypatch.setattr(machine_code, "read", read_too)
    items = [item for item in shipped() if item.configuration.startswith("fp8 to bf16, any")]
    ((item, _),) = inspect.on([arch], items)
    for short_sums in (True, False):
        inspect.compile_for(replace(item, constants={**item.constants, "SHORT_SUMS": short_sums}), arch)
    elements = item.constants["BLOCK_M"] * item.constants["BLOCK_N"] // (32 * item.num_warps)
    assert item.constants["SHORT_SUMS"] and [text.count("FADD") for text in texts] == [elements, 0]
