"""The kernels as operations of torch: schemas, fake tensors, torch.compile, and what a CPU runs."""

import subprocess
import sys

import pytest
import torch
from compare import TOLERANCES, relative_l2
from kernels.inputs import NAMES, arguments, operation
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map

from skylapse.kernels import adaln, patch_embed, qk_norm_rope, reference, solver_step, toolchain
from skylapse.runtime.layers.pack import build_rotation
from skylapse.runtime.sampler.guidance import combine
from skylapse.runtime.sampler.schedule import SolverConfig, make_schedule
from skylapse.runtime.sampler.solver import get_solver
from skylapse.runtime.vae.preview import Previewer


@pytest.mark.parametrize("name", NAMES)
def test_operation_passes_opcheck(name: str) -> None:
    torch.library.opcheck(operation(name), arguments(name))


@pytest.mark.parametrize("name", NAMES)
def test_fake_results_on_cuda_have_the_shapes_of_real_ones(name: str) -> None:
    real, _ = tree_flatten(operation(name)(*arguments(name)))

    def fake(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="cuda")

    with FakeTensorMode():
        results, _ = tree_flatten(operation(name)(*tree_map(fake, arguments(name))))
    assert [(x.shape, x.dtype, x.stride()) for x in results] == [(x.shape, x.dtype, x.stride()) for x in real]
    assert {x.device.type for x in results} == {"cuda"}


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # what inductor imports
def test_all_operations_compile_into_one_graph() -> None:
    inputs = {name: arguments(name) for name in NAMES}

    def run() -> list[object]:
        return [operation(name)(*inputs[name]) for name in NAMES]

    compiled, _ = tree_flatten(torch.compile(run, fullgraph=True)())
    eager, _ = tree_flatten(run())
    assert all(torch.equal(one, other) for one, other in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if "solver" not in name])
def test_cpu_path_computes_the_plain_formula(name: str, dtype: torch.dtype) -> None:
    inputs = arguments(name, dtype)
    if name.startswith("gated_residual_adaln"):
        x, y, gate, shift, scale, ids, eps = inputs
        gate = torch.ones_like(shift) if gate is None else gate
        residual, normed = adaln.gated_residual_adaln(*inputs)
        pairs = [(residual, reference.gated_residual(x, y, gate, ids))]
        pairs.append((normed, reference.adaln(residual, shift, scale, ids, eps)))
    elif name == "unpatchify":
        grids = [(1, 1, 1), (2, 2, 3)]
        expected = reference.unpatchify(inputs[0], grids, inputs[2])
        pairs = list(zip(patch_embed.unpatchify(inputs[0], grids, tuple(inputs[2])), expected, strict=True))
    else:
        actual, expected = operation(name)(*inputs), getattr(reference, name)(*inputs)
        pairs = [(actual, torch.stack(expected[:2]) if name == "qk_norm_rope" else expected)]
    assert all(relative_l2(one, other) < TOLERANCES[dtype] for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_residual_and_norm_on_a_cpu_are_torchs_to_the_bit(dtype: torch.dtype) -> None:
    x, y, table = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype), torch.randn(3, 24)
    ids, norm = torch.tensor([0, 2, 1, 1, 0]), torch.nn.LayerNorm(24, 1e-6)
    with torch.no_grad():
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        residual, normed = adaln.gated_residual_norm(x, y, table, norm.weight, norm.bias, ids, 1e-6)
    assert torch.equal(residual, adaln.gated_residual(x, y, table, ids))
    assert torch.equal(normed, norm(residual.float()).to(dtype))


def test_gated_residual_and_norm_on_cuda_is_one_call_of_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scale and a shift of all tokens; the CPU's implementation stands for the kernel."""
    monkeypatch.setattr(adaln, "launches", lambda x: True)
    x, y, gate, weight, bias = (
        torch.randn(5, 24),
        torch.randn(5, 24),
        torch.randn(2, 24),
        torch.rand(24),
        torch.rand(24),
    )
    ids = torch.tensor([0, 1, 1, 1, 0])
    residual, normed = adaln.gated_residual_norm(x, y, gate, weight, bias, ids, 1e-6)
    zero = torch.zeros(1, 24)
    expected = reference.adaln(reference.gated_residual(x, y, gate, ids), zero, zero, ids, 1e-6) * weight + bias
    assert torch.equal(residual, adaln._gated_residual_cpu(x, y, gate, ids))
    assert relative_l2(normed, expected) < TOLERANCES[torch.float32]


def test_heads_are_normed_each_by_itself_when_the_weight_is_one_heads() -> None:
    qkv, weights = torch.randn(6, 3 * 4 * 12), (torch.randn(12), torch.randn(12))
    rotation = build_rotation(12, [(1, 2, 3)], torch.device("cpu"))
    actual = qk_norm_rope.qk_norm_rope(qkv, *weights, rotation, 4, 1e-6)
    expected = reference.qk_norm_rope(qkv, *weights, torch.view_as_real(rotation), 4, 1e-6)
    assert all(relative_l2(one, other) < 1e-6 for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_fused_solver_step_on_a_cpu_is_the_samplers_to_the_bit(solver: str, order: int) -> None:
    schedule = make_schedule(SolverConfig(solver=solver, solver_order=order), 6)
    state, latents = get_solver(solver).start(schedule), torch.randn(16, 2, 3, 4)
    previewer = Previewer(torch.randn(48, 16) / 8, torch.randn(48))
    for _ in range(6):
        cond, uncond = torch.randn(16, 2, 3, 4), torch.randn(16, 2, 3, 4)
        weights = state.plan[state.step_index]
        fused = solver_step.solver_step(
            latents,
            cond,
            uncond,
            4.5,
            weights.sigma,
            weights.predictor,
            weights.corrector,
            state.last_sample,
            state.clean_predictions,
            (previewer.weight, previewer.bias),
        )
        latents, state = get_solver(solver).step(state, combine(cond, uncond, 4.5), latents)
        assert torch.equal(fused.latents, latents)
        assert fused.preview is not None and (fused.preview.numpy() == previewer(fused.clean)).all()
        if state.clean_predictions:
            assert torch.equal(fused.clean, state.clean_predictions[0])
        if state.last_sample is not None:
            assert torch.equal(fused.sample, state.last_sample)


def test_cpu_operations_are_differentiable() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    adaln.adaln(x, torch.randn(1, 8), torch.randn(1, 8), torch.zeros(4, dtype=torch.int64), 1e-6).sum().backward()
    assert x.grad is not None


def test_without_triton_the_cpu_paths_work_and_say_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from skylapse.kernels import adaln, patch_embed, qk_norm_rope, rms_norm, solver_step, toolchain\n"
        "assert 'triton' in toolchain.MISSING\n"
        "print(rms_norm.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "8.0\n"


def test_cuda_tensors_go_to_the_kernels_and_v_is_not_copied() -> None:
    with FakeTensorMode(), torch.no_grad():
        qkv, weight = torch.empty(30, 288, device="cuda", dtype=torch.bfloat16), torch.empty(96, device="cuda")
        rotation = torch.empty(30, 16, device="cuda", dtype=torch.complex64)
        q, k, v = qk_norm_rope.qk_norm_rope(qkv, weight, weight, rotation, 3, 1e-6)
        latents = patch_embed.unpatchify(torch.empty(30, 64, device="cuda"), [(2, 3, 5)], (1, 2, 2))
    assert [x.stride() for x in (q, k, v)] == [(96, 32, 1), (96, 32, 1), (288, 32, 1)]
    assert v.storage_offset() == 192
    assert [(*x.shape, x.device.type) for x in latents] == [(16, 2, 6, 10, "cuda")]


def test_tensor_that_asks_for_a_gradient_is_left_to_torch() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 8, device="cuda", requires_grad=True)
        assert not toolchain.launches(x)
        with torch.no_grad():
            assert toolchain.launches(x)
    assert not toolchain.launches(torch.empty(4))
