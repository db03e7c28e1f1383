"""Which product serves quantised weights on CUDA, what torch's own is handed, and whether it computes the formula."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from kernels.calls import Calls
from torch import Tensor

from skylapse.kernels import backends, linear_backends, reference, toolchain
from skylapse.kernels.backends import Backends, Choice, parse
from skylapse.kernels.fake_cuda import fake_cuda
from skylapse.kernels.linear_backends import SCALED_MM_ROWS, decide, fault_of_scaled_mm, scaled_mm
from skylapse.kernels.linear_quantized import DTYPES, linear_quantized, quantize_rows
from skylapse.kernels.live_bytes import LiveBytes
from skylapse.kernels.toolchain import told_capability

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
OPERANDS = ("self", "mat2", "scale_a", "scale_b")
OURS, TORCHS = "skylapse.product_quantized.default", "aten._scaled_mm.default"


Faults = dict[str, str | None]  # of each product that may be tried


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    yield
    backends._told.clear()
    linear_backends.fault_of_scaled_mm.cache_clear()


def operands(
    kind: str = "fp8", num_tokens: int = 1024, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, 64], weight [48, 64], its scales and a bias, on CUDA."""
    x, w, bias = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((num_tokens, 64), (48, 64), (48,)))
    return x, *quantize_rows(w, DTYPES[kind]), bias


def product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> list[str]:
    """Names of the products that run."""
    with Calls() as calls:
        y = linear_quantized(x, weight, weight_scale, bias)
    assert y.dtype == x.dtype and y.shape == (len(x), 48)
    return [name for name, _ in calls.made if name in (OURS, TORCHS)]


def test_torchs_product_gets_rows_a_weight_by_columns_and_scales_of_two_dimensions() -> None:
    with torch.inference_mode(), fake_cuda(90):
        x, weight, weight_scale, bias = operands()
        with Calls() as calls:
            linear_quantized(x.view(2, 512, 64), weight, weight_scale, bias, "gelu_tanh")
        made = dict(calls.made)
        rows, columns, row_scales, column_scales = (made[TORCHS][name] for name in OPERANDS)
        assert (rows.shape, rows.stride(), rows.dtype) == ((1024, 64), (64, 1), torch.float8_e4m3fn)
        assert (columns.shape, columns.stride(), columns.dtype) == ((64, 48), (1, 64), torch.float8_e4m3fn)
        assert (row_scales.shape, column_scales.shape) == ((1024, 1), (1, 48))
        assert all(one.dtype == torch.float32 and one.is_contiguous() for one in (row_scales, column_scales))
        rest = {name: value for name, value in made[TORCHS].items() if name not in OPERANDS}
        assert rest == dict(bias=bias, scale_result=None, out_dtype=torch.bfloat16, use_fast_accum=False)
        assert made["aten.gelu_.default"]["approximate"] == "tanh" and "aten.gelu.default" not in made


def test_beside_the_result_there_are_the_quantised_rows_alone() -> None:
    with torch.inference_mode(), fake_cuda(90):
        arguments = operands()
        with LiveBytes() as live:
            y = linear_quantized(*arguments, "gelu_tanh")
        assert live.peak_bytes == y.nbytes + 1024 * 64 + 4 * 1024


@pytest.mark.parametrize(
    ("capability", "kind", "num_tokens", "dtype", "name"),
    [
        (90, "fp8", SCALED_MM_ROWS, torch.bfloat16, TORCHS),
        (89, "fp8", 1024, torch.bfloat16, TORCHS),
        (90, "fp8", SCALED_MM_ROWS - 1, torch.bfloat16, OURS),
        (90, "int8", 1024, torch.bfloat16, OURS),
        (80, "int8", 1024, torch.bfloat16, OURS),
        (90, "fp8", 1024, torch.float32, OURS),
        (90, "fp8", 1024, torch.float16, OURS),
    ],
)
def test_our_product_serves_what_torchs_is_not_for(
    capability: int, kind: str, num_tokens: int, dtype: torch.dtype, name: str
) -> None:
    with torch.inference_mode(), fake_cuda(capability):
        assert product(*operands(kind, num_tokens, dtype)) == [name]


def test_dtypes_that_torchs_product_does_not_get_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with torch.inference_mode(), fake_cuda(90):
        x, weight, weight_scale, bias = operands()
        for _ in range(2):
            assert product(x, weight, weight_scale, bias.float()) == [OURS]
        assert product(x, weight, weight_scale, None) == [TORCHS]
    (record,) = caplog.records
    assert record.getMessage() == (
        "linear: ours instead of scaled_mm: it is called for bfloat16 alone, got torch.float32"
    )


@pytest.mark.parametrize(("asked", "found"), [("triton", OURS), ("scaled_mm", TORCHS), ("scaled_mm-fast", TORCHS)])
def test_the_operator_decides(asked: str, found: str) -> None:
    with torch.inference_mode(), fake_cuda(90), Backends(parse(f"linear={asked}")).active():
        arguments = operands()
        assert product(*arguments) == [found]
        with Calls() as calls:
            linear_quantized(*arguments)
    fast = [given["use_fast_accum"] for name, given in calls.made if name == TORCHS]
    assert fast == ([asked == "scaled_mm-fast"] if found == TORCHS else [])


def test_torch_serves_where_it_is_asked_for_and_where_triton_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_backends, "_chosen", lambda device: "scaled_mm")
    with fake_cuda(90):
        x, weight, _, bias = operands(num_tokens=7)
        assert linear_backends.product_of(x, weight, bias) == "triton"
        monkeypatch.setattr(toolchain, "fault", lambda device: "no compiler")
        assert linear_backends.product_of(x, weight, bias) == "torch"
    monkeypatch.setattr(linear_backends, "_chosen", lambda device: "torch")
    with torch.inference_mode(), fake_cuda(90):
        assert product(*operands()) == []


PUBLISHED = "published as the fastest, not measured here"


@pytest.mark.parametrize(
    ("asked", "capability", "faults", "expected"),
    [
        (None, 90, {"scaled_mm": None}, Choice("scaled_mm", PUBLISHED)),
        (None, 89, {"scaled_mm": None}, Choice("scaled_mm", PUBLISHED)),
        (None, 80, {"triton": None}, Choice("triton", "the only product in 8 bits of sm_80")),
        ("triton", 90, {"triton": None}, Choice("triton", "asked for")),
        ("torch", 90, {}, Choice("torch", "asked for")),
        ("scaled_mm-fast", 90, {"scaled_mm-fast": None}, Choice("scaled_mm-fast", "asked for", lossy=True)),
        (
            "scaled_mm",
            80,
            {"triton": None},
            Choice("triton", "scaled_mm (asked for) cannot serve: needs sm_89 or newer, this is sm_80", True),
        ),
        (
            None,
            120,
            {"triton": None, "scaled_mm": "it fails"},
            Choice("triton", f"scaled_mm ({PUBLISHED}) cannot serve: it fails", True),
        ),
        (
            None,
            120,
            {"triton": "no compiler", "scaled_mm": "it fails"},
            Choice("torch", f"scaled_mm ({PUBLISHED}) cannot serve: it fails", True),
        ),
        (
            "triton",
            90,
            {"triton": "no compiler"},
            Choice("torch", "triton (asked for) cannot serve: no compiler", True),
        ),
    ],
)
def test_choice_has_its_reason(asked: str | None, capability: int, faults: Faults, expected: Choice) -> None:
    """A product that is not among the faults is not tried."""
    assert decide(capability, asked, None, faults.__getitem__) == expected


def test_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(linear_backends, "fault_of_scaled_mm", lambda device: None)
    caplog.set_level(logging.INFO)
    chosen = Backends()
    assert [chosen.choose("linear", CUDA).name for _ in range(3)] == ["scaled_mm"] * 3
    assert [one.getMessage() for one in caplog.records] == [f"linear on cuda:0: scaled_mm ({PUBLISHED})"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_choice_is_a_constant_of_compiled_code() -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda x: x * len(linear_backends._chosen(x.device)), backend="eager", fullgraph=True)
    with told_capability(90):
        assert run(torch.ones(1)).item() == len("scaled_mm")


@pytest.mark.parametrize("fast", [False, True])
def test_torchs_product_computes_the_formula(fast: bool) -> None:
    """On a CPU, whose implementation takes the same operands."""
    draw = torch.Generator().manual_seed(0)
    rows, scales = quantize_rows(torch.randn(70, 144, generator=draw), torch.float8_e4m3fn)
    weight, weight_scale = quantize_rows(torch.randn(48, 144, generator=draw), torch.float8_e4m3fn)
    bias = torch.randn(48, generator=draw).bfloat16()
    y = scaled_mm(rows, scales, weight, weight_scale, bias, dtype=torch.bfloat16, fast=fast)
    expected = reference.linear_quantized(rows, scales, weight, weight_scale, bias, "none")
    assert y.dtype == torch.bfloat16 and (y.double() - expected).abs().max() < 1e-2 * expected.abs().max()


def test_a_device_is_asked_whether_torchs_product_works(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fault_of_scaled_mm(CPU) is None
    whole = scaled_mm

    def asked_again() -> str:
        fault_of_scaled_mm.cache_clear()
        return str(fault_of_scaled_mm(CPU))

    def unsupported(*_: object, **__: object) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when\ncalling cublasLtMatmulAlgoGetHeuristic")

    monkeypatch.setattr(linear_backends, "scaled_mm", unsupported)
    assert asked_again() == (
        "torch's row-wise product fails: RuntimeError: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling "
        "cublasLtMatmulAlgoGetHeuristic"
    )
    monkeypatch.setattr(
        linear_backends, "scaled_mm", lambda rows, scales, *rest, **how: whole(rows, scales.flip(0), *rest, **how)
    )
    assert asked_again() == "torch's row-wise product computed nonsense"


def unit_sums(rows: Tensor, weight: Tensor, finished_each: int) -> Tensor:
    """Products by an emulated matrix unit: 32 and the sum so far are cut to 14 bits below the largest, then added up.

    What is finished after so many goes to an fp32 sum outside.
    """
    rows, weight = rows.double(), weight.double()
    total = kept = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    for start in range(0, rows.shape[1], 32):
        products = rows[:, None, start : start + 32] * weight[None, :, start : start + 32]
        addends = torch.cat((products, kept[..., None]), dim=-1)
        bit = torch.exp2(torch.frexp(addends.abs().amax(-1))[1].double() - 14)
        kept = (addends / bit[..., None]).trunc().sum(-1) * bit
        if (start + 32) % finished_each == 0:
            total, kept = (total + kept).float().double(), torch.zeros_like(kept)
    return total + kept


@pytest.mark.parametrize(("mean", "least", "most"), [(0.0, 1e-3, 3e-3), (1.0, 1e-2, 4e-2)])
def test_sums_left_to_the_matrix_unit_lose_more_where_products_have_a_mean(
    mean: float, least: float, most: float
) -> None:
    """Why `scaled_mm-fast` is not the default; fp8 itself costs 0.037 of a product of random numbers."""
    draw = torch.Generator().manual_seed(0)
    rows, _ = quantize_rows(mean + torch.randn(12, 5120, generator=draw), torch.float8_e4m3fn)
    weight, _ = quantize_rows(mean / 2 + torch.randn(12, 5120, generator=draw), torch.float8_e4m3fn)
    exact = rows.double() @ weight.double().T
    left, finished = (unit_sums(rows, weight, each) for each in (5120, 128))
    assert least < float((left - exact).norm() / exact.norm()) < most
    assert float((finished - exact).norm() / exact.norm()) < 3e-4
