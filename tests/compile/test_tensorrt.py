"""TensorRT without TensorRT: the backend on a stand-in that has the real bindings' calls and no others."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skylapse.compile import export, footprint, tensorrt, tensorrt_build, tensorrt_runner
from skylapse.compile.attention import ANY_AREA
from skylapse.compile.backend import Unavailable
from skylapse.compile.cache import EngineCache
from skylapse.compile.select import Selector
from skylapse.compile.stream import Coder, Plan
from skylapse.compile.tensorrt import MAX_ANY_PIXELS, TensorRT, extents

from .engines import BINDINGS, HostStream, chunks, decoded, needs_bindings
from .stand_in import NEEDED_BYTES, StandIn

pytestmark = needs_bindings


@pytest.fixture(scope="module")
def coder(coders: dict[str, Coder]) -> Coder:
    return coders["2.1"]


def test_the_stand_in_has_the_real_calls_and_no_others(trt: StandIn) -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    config = builder.create_builder_config()
    for name in ("FP16", "INT8"):  # gone in 11
        assert not hasattr(trt.BuilderFlag, name)
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError):
        builder.platform_has_fast_fp16  # noqa: B018
    with pytest.raises(TypeError):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(TypeError):
        config.set_flag("REFIT")
    with pytest.raises(NotImplementedError):
        config.set_tactic_sources(1)


# --------------------------------------------------------------------------------------------------------- the backend


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, trt: StandIn, graphs: Path) -> TensorRT:
    """On a GPU that is none; the graphs have been exported before."""
    monkeypatch.setattr(
        export, "export", lambda coder, plan, folder: shutil.copytree(graphs, folder, dirs_exist_ok=True)
    )
    monkeypatch.setattr(tensorrt, "machine_name", lambda device: "no GPU sm00")
    monkeypatch.setattr(tensorrt, "WORKSPACE_BYTES", NEEDED_BYTES)
    monkeypatch.setattr(tensorrt, "MAX_ANY_PIXELS", 16)  # 8 latents
    monkeypatch.setattr(tensorrt, "build", lambda request, timeout_s: tensorrt_build.run(request))
    monkeypatch.setattr(tensorrt_runner, "CudaStream", lambda device: HostStream(trt))
    backend = TensorRT(torch.device("cuda"))
    assert backend.missing(Plan()) is None
    backend.device = torch.device("cpu")
    return backend


def test_the_backend_builds_and_runs_a_decoder(backend: TensorRT, coder: Coder, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    backend.build(coder, Plan(), folder)
    assert {path.name for path in folder.iterdir()} == {"first.plan", "next.plan"}
    assert [path.read_bytes() for path in tmp_path.glob("tensorrt-*.timings")] == [b"timings of this device"]
    run = backend.load(coder, Plan(), folder)
    for frames, expected in zip(decoded(run, chunks(0, 4, 6)), decoded(coder, chunks(0, 4, 6)), strict=True):
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


def test_states_of_eager_are_taken(backend: TensorRT, coder: Coder, tmp_path: Path) -> None:
    backend.build(coder, Plan(), tmp_path)
    run = backend.load(coder, Plan(), tmp_path)
    first, *rest = chunks(0, 4, 6)
    with torch.inference_mode():
        states = coder(first, None)[1]
        ours = run(rest[0], states)[0]
        torch.testing.assert_close(ours, coder(rest[0], states)[0], rtol=0, atol=1e-5)


def test_engines_that_do_not_fit_leave_the_plans_alone(
    monkeypatch: pytest.MonkeyPatch, backend: TensorRT, coder: Coder, tmp_path: Path
) -> None:
    backend.build(coder, Plan(), tmp_path)
    monkeypatch.setattr(footprint, "free_bytes", lambda device, cached=False: 1000)
    with pytest.raises(Unavailable, match=r"0\.00 GiB are free"):  # another error has them built again
        backend.load(coder, Plan(), tmp_path)


def test_a_plan_of_one_size_is_static(coder: Coder) -> None:
    """Decoded one latent frame at a time, a clip takes the least memory."""
    (plan,) = TensorRT(torch.device("cuda")).plans(Plan("bf16", (60, 104)))
    assert plan == Plan("bf16", (60, 104), chunk=1)
    assert extents(coder, plan) == ((1, 60, 104),) * 3
    assert TensorRT(torch.device("cuda")).plans(Plan()) == [Plan()]


def test_a_plan_for_any_size_has_a_bounded_largest_shape(coder: Coder) -> None:
    """A context's memory is that of its profile's largest shape."""
    for scale in (1, 2, 4, 8, 16, 32):
        smallest, likeliest, largest = extents(replace(coder, in_scale=1, out_scale=scale), Plan())
        assert largest[1] * largest[2] * scale**2 <= MAX_ANY_PIXELS**2
        assert scale < 8 or largest[1] * largest[2] <= ANY_AREA  # which every family's VAE shrinks at least
        assert smallest == (1, 2, 2) and all(a <= b <= c for a, b, c in zip(smallest, likeliest, largest, strict=True))


def test_sizes_outside_the_profile_are_built_by_their_own(coder: Coder, tmp_path: Path) -> None:
    chooser = Selector(replace(coder, out_scale=8), [], EngineCache(tmp_path), device=torch.device("cpu"))
    backend = TensorRT(torch.device("cuda"))
    assert chooser.plan_for((64, 64), backend) == Plan()
    for size in ((60, 104), (104, 60), (90, 160), (2, 65)):  # of 480p less than ANY_AREA latents, in a wider frame
        assert chooser.plan_for(size, backend) == Plan(size=size)
    assert chooser.plan_for((60, 104)) == Plan()


def test_fp32_plans_have_tf32(
    monkeypatch: pytest.MonkeyPatch, backend: TensorRT, coder: Coder, tmp_path: Path, trt: StandIn
) -> None:
    """As torch's own convolutions do on CUDA: without it eager is several times faster."""
    backend.build(coder, Plan(), tmp_path)
    assert "clear_flag" not in {method for _, method, _ in trt.calls}
    assert backend.options(Plan())["tf32"] is True


def test_what_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA GPU" in str(TensorRT(torch.device("cpu")).missing(Plan()))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install" in str(TensorRT(torch.device("cuda")).missing(Plan()))
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn(BINDINGS / "api.json", version="10.9.0.34"))
    assert "10.13 or newer" in str(TensorRT(torch.device("cuda")).missing(Plan()))
