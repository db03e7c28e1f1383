"""Attention: its kernels in the interpreter, its operation under torch's tools, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.interpreter import interpret
from torch import Tensor

from skylapse.kernels import attention_kernels, inspect, launches, reference, roofline
from skylapse.kernels.attention import attention, attention_with_lse
from skylapse.kernels.attention_kernels import can_be_described, configuration, launch, shipped, tiles_of

# Greatest distance of an element from the formula's, in units of the result's root mean square. Weights are rounded to
# the values' dtype before they are multiplied, as on the device; measured: 2e-6, 2e-3 and 2e-2.
TOLERANCES = {"torch.float32": 2e-5, "torch.float16": 8e-3, "torch.bfloat16": 6e-2}
Q_LENS, K_LENS = (1, 5, 5, 33), (7, 2, 2, 40)
CU_Q, CU_K = tuple(accumulate(Q_LENS, initial=0)), tuple(accumulate(K_LENS, initial=0))
operation: Any = torch.ops.skylapse.attention.default


def draw(num_tokens: int, dtype: torch.dtype = torch.float32, head_size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn((num_tokens, 2, head_size), generator=generator).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    keys = draw(2 * CU_K[-1], dtype)
    return draw(CU_Q[-1], dtype), keys[: CU_K[-1]], keys[CU_K[-1] :]


def bias() -> Tensor:
    return torch.randn(CU_K[-1], generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    lines = interpret(Path(__file__).with_name("attention_numerics.py")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("variant", "count"), [("pointers", 22), ("descriptors", 22), ("specialised", 4)])
def test_kernel_computes_the_formula_and_writes_every_element(
    variant: str, count: int, interpreted: list[dict[str, Any]]
) -> None:
    cases = [case for case in interpreted if case["case"].split()[0] == variant]
    assert len(cases) == count, "every shape and dtype was run"
    assert [case for case in cases if not case["worst"] <= TOLERANCES[case["dtype"]]] == []


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_torch_paths_compute_the_formula(dtype: torch.dtype, tolerance: float, biased: bool) -> None:
    q, k, v = inputs(dtype)
    key_bias = bias() if biased else None
    expected, sums = reference.attention(q, k, v, CU_Q, CU_K, key_bias)
    out, lse = attention_with_lse(q, k, v, CU_Q, CU_K, key_bias)
    for one, other in ((attention(q, k, v, CU_Q, CU_K, key_bias), expected), (out, expected), (lse, sums)):
        assert (one.double() - other).abs().max() < tolerance


def test_parts_of_the_keys_merge_by_their_log_sum_exp() -> None:
    q, k, v = draw(9), draw(50), draw(50) * 2
    whole, lse = attention_with_lse(q, k, v, (0, 9), (0, 50))
    parts = [
        attention_with_lse(q, k[part], v[part], (0, 9), (0, n)) for part, n in ((slice(20), 20), (slice(20, 50), 30))
    ]
    weights = torch.stack([part[1] for part in parts]).softmax(0).transpose(1, 2)[..., None]
    merged = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(torch.logaddexp(parts[0][1], parts[1][1]), lse)


def test_query_without_keys_is_zeros() -> None:
    key_bias = torch.full((4,), -math.inf)
    out, lse = attention_with_lse(draw(2), draw(4), draw(4), (0, 2), (0, 4), key_bias)
    assert (out == 0).all() and (lse == -math.inf).all()


# --- as an operation of torch -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what opcheck imports
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_operation_passes_opcheck(with_lse: bool, biased: bool) -> None:
    torch.library.opcheck(operation, (*inputs(), [*CU_Q], [*CU_K], bias() if biased else None, with_lse, False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what inductor imports
def test_operation_compiles_into_one_graph() -> None:
    q, k, v = inputs()

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = operation(2 * q, k, v, CU_Q, CU_K, None, True, False)
        return out + 1, lse

    for one, other in zip(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v), strict=True):
        torch.testing.assert_close(one, other)


def test_fake_tensors_on_a_gpu_that_is_not_there_have_the_results_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(39, 2, 64, device="cuda"), torch.empty(51, 2, 64, device="cuda")
        out, lse = operation(q, k, k, [0, 39], [0, 51], None, True, False)
        assert (out.shape, out.device.type, lse.shape, lse.dtype) == ((39, 2, 64), "cuda", (2, 39), torch.float32)


def test_cpu_path_is_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    attention(q, k, v, CU_Q, CU_K).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_without_triton_attention_works() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from skylapse.kernels.attention import attention\n"
        "print(attention(torch.ones(2, 1, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 4), (0, 1, 2)).sum().item())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "8.0\n"


def test_roofline_counts_the_tensors_bytes_and_two_products_a_sequence() -> None:
    q, k, v = inputs(torch.bfloat16)
    out = attention(q, k, v, CU_Q, CU_K, bias())
    cost = roofline.attention(Q_LENS, K_LENS, num_heads=2, head_dim=16, itemsize=2, biased=True)
    assert cost.num_bytes == sum(x.nbytes for x in (q, k, v, bias(), out))
    pairs = 1 * 7 + 5 * 2 + 5 * 2 + 33 * 40
    assert cost.operations == 2 * 2 * pairs * 2 * 16


# --- tiles and configurations -----------------------------------------------------------------------------------------


def test_tiles_cover_every_query_once_and_the_longest_start_first() -> None:
    tiles = tiles_of(CU_Q, CU_K, 16, torch.device("cpu"))
    assert tiles.dtype == torch.int32
    assert tiles.tolist() == [
        [11, 33, 11, 40],
        [27, 17, 11, 40],
        [43, 1, 11, 40],
        [0, 1, 0, 7],
        [1, 5, 7, 2],
        [6, 5, 9, 2],
    ]


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("head_size", [8, 24, 64, 96, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_architecture_dtype_and_head_size_has_a_configuration(arch: int, head_size: int, dtype: str) -> None:
    for longest in (1, 64, 65, 75600):
        for described in (False, True):
            how = configuration(arch, dtype, head_size, longest, described)
            assert not how.warp_specialized and (described or not how.descriptors)
            assert how.descriptors == (described and arch >= 90)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 100), (103, 100), (120, 120), (121, 120)],
)
def test_device_is_served_by_the_nearest_architecture_below(capability: int, arch: int) -> None:
    assert launches.architecture(capability) == arch


def test_bound_on_registers_is_handed_to_triton_where_a_row_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **keywords: told.append(keywords)

    monkeypatch.setattr(attention_kernels, "_pointer_kernel", Kernel())
    launch = dict(block_m=64, block_n=64, num_warps=8, num_stages=2)
    for one in (launch, launch | dict(maxnreg=128)):
        with launches.forced("attention", one):
            attention_kernels.launch(*inputs(torch.bfloat16), CU_Q, CU_K, None, False)
    assert [keywords.get("maxnreg") for keywords in told] == [None, 128]
    assert "maxnreg" not in told[0] and told[1]["num_warps"] == 8


def test_what_the_copy_engine_cannot_take_goes_by_pointers() -> None:
    qkv = torch.zeros(5, 3, 2, 16, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(1)
    wide = torch.zeros(5, 2, 24, dtype=torch.bfloat16)
    assert can_be_described(q, k, v)
    assert not can_be_described(q, k[..., 4:], v), "starts between"
    assert not can_be_described(*(wide[..., :12],) * 3), "the output's heads would start between"
    q = torch.zeros(5, 60, dtype=torch.bfloat16)[:, :48].unflatten(1, (3, 16))
    assert not can_be_described(q, q, q), "tokens 120 bytes apart"


def test_warp_specialisation_is_opted_into() -> None:
    assert configuration(90, "bf16", 128, 4096, True, True).warp_specialized
    assert not configuration(80, "bf16", 128, 4096, True, True).warp_specialized  # there are none there


# --- offline compilation; test_inspect.py looks for spills and at the shared memory of these same configurations ------

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize("arch", MATRIX)
def test_matrix_instruction_is_the_architectures_own(arch: int) -> None:
    item = next(item for item in shipped() if arch in item.architectures)
    assert inspect.compile_for(item, arch).matrix == MATRIX[arch]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "error"),
    [
        ((0, 3, 2, 44), CU_K, "cu_seqlens_q must rise from 0 to 44 without empty sequences"),
        ((0, 3, 3, 44), CU_K, "cu_seqlens_q must rise from 0 to 44 without empty sequences"),
        ((1, 3, 44), CU_K, "cu_seqlens_q must rise from 0 to 44"),
        ((0, 43), CU_K, "cu_seqlens_q must rise from 0 to 44"),
        ((), CU_K, "cu_seqlens_q must rise from 0 to 44"),
        ((0,), CU_K, "cu_seqlens_q must rise from 0 to 44"),
        (CU_Q, (), "cu_seqlens_k must rise from 0 to 51"),
        ((0, 44), CU_K, "1 query sequences, but 4 key sequences"),
        (torch.tensor(CU_Q), CU_K, "cu_seqlens_q must be host integers, got a tensor of torch.int64"),
    ],
)
def test_wrong_sequences_are_named(cu_q: Any, cu_k: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        attention(*inputs(), cu_q, cu_k)


def huge() -> Tensor:
    return torch.empty(2**24 + 1, 1, 128, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a | {"q": a["q"].float()}, "q must be bfloat16 or float16, got torch.float32"),
        (lambda a: a | {"v": a["v"].half()}, "v must be torch.bfloat16 as q is, got torch.float16"),
        (lambda a: a | {"k": a["k"].to("meta")}, "k must be on cpu as q is, got meta"),
        (lambda a: {n: torch.ones(4, 1, 136).bfloat16() for n in a}, "head size must be at most 128, got 136"),
        (lambda a: a | {"k": a["k"].transpose(1, 2).contiguous().mT}, "k's last dimension must be contiguous"),
        (lambda a: {n: huge() for n in a}, "q must have at most 2\\^31 elements"),
        (lambda a: a | {"key_bias": bias().half()}, "key_bias must be contiguous float32, got torch.float16"),
        (lambda a: a | {"key_bias": bias().to("meta")}, "key_bias must be on cpu as q is, got meta"),
    ],
)
def test_launcher_names_what_it_cannot_take(change: Callable[[Any], dict[str, Any]], error: str) -> None:
    given = {"key_bias": None} | change(dict(zip("qkv", inputs(torch.bfloat16), strict=True)))
    with pytest.raises(ValueError, match=error):
        launch(**given, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, with_lse=False)
