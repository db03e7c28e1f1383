"""The C++ operators against float64, in every library that this processor runs, through ONNX Runtime."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from skylapse.kernels.cpu import library

pytestmark = pytest.mark.skipif(library.level() is None or library.compiler() is None, reason="no C++ compiler")
Operate = Callable[..., list[Any]]
LEVELS = [*library._levels()]
LEVELS = LEVELS[LEVELS.index(library.level()) :] if library.level() else []  # from the best that this processor runs on


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each level up to this processor's, and one whose vectors are of four floats, as other architectures have."""
    folder = tmp_path_factory.mktemp("operators")
    library.build(folder)
    found = {level: folder / library.name_of(level) for level in LEVELS}
    found["four"] = folder / "four.so"
    command = [library.compiler(), *library.FLAGS, "-O1", str(library.HERE / "operators.cpp"), "-o", str(found["four"])]
    subprocess.run(command, check=True)
    return found


@pytest.fixture(params=[*LEVELS, "four"])
def operate(request: pytest.FixtureRequest, libraries: dict[str, Path]) -> Operate:
    """One operator on tensors, of which `constants` are the graph's: its outputs as far as they are `wanted`."""
    return lambda *arguments, **options: run(libraries[request.param], *arguments, **options)


def run(
    path: Path,
    name: str,
    inputs: Sequence[Tensor | None],
    constants: Sequence[int] = (),
    wanted: Sequence[bool] = (True,),
    threads: int = 1,
    **attributes: int,
) -> list[Any]:
    names = [f"in_{i}" if x is not None else "" for i, x in enumerate(inputs)]
    given = {names[i]: x for i, x in enumerate(inputs) if x is not None and i not in constants}
    kept = [f"out_{i}" if is_wanted else "" for i, is_wanted in enumerate(wanted)]
    node = helper.make_node(name, names, kept, domain="skylapse", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(x.shape)) for n, x in given.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in kept if n],
        [numpy_helper.from_array(inputs[i].contiguous().numpy(), names[i]) for i in constants],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("skylapse", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(path))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed: Mapping[str, np.ndarray] = {n: x.contiguous().numpy() for n, x in given.items()}
    made = iter(session.run(None, feed))
    return [torch.from_numpy(next(made)) if is_wanted else None for is_wanted in wanted]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolved(x: Tensor, weight: Tensor, bias: Tensor, doubled: bool = False) -> Tensor:
    """In float64, of frames [T, H, W, C]."""
    clip = x.double().permute(3, 0, 1, 2)[None]
    if doubled:
        clip = clip.repeat_interleave(2, 3).repeat_interleave(2, 4)
    side = weight.shape[-1] // 2
    return F.conv3d(clip, weight.double(), bias.double(), padding=(0, side, side))[0].permute(1, 2, 3, 0)


def normed(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x.double(), gamma.shape, gamma.double(), 1e-24))


def close(ours: Tensor | None, expected: Tensor, bound: float = 5e-6) -> None:
    assert ours is not None and ours.shape == expected.shape and ours.isfinite().all()
    assert float((ours.double() - expected).abs().max()) < bound * float(expected.abs().max())


# c_in, c_out, taps, side, frames, height, width, doubled: channels that fill vectors and those that do not, frames and
# sides that fill tiles and those that do not.
CONVOLUTIONS = [
    (16, 32, 3, 3, 4, 8, 8, False),
    (5, 3, 3, 3, 5, 7, 9, False),
    (33, 18, 3, 3, 1, 1, 2, False),
    (48, 80, 3, 3, 9, 5, 4, False),
    (7, 20, 3, 1, 6, 3, 5, False),
    (16, 48, 1, 1, 2, 9, 8, False),
    (24, 12, 1, 3, 3, 6, 10, True),
    (32, 16, 1, 3, 1, 2, 2, True),
]


@pytest.mark.parametrize("c_in, c_out, taps, side, frames, height, width, doubled", CONVOLUTIONS)
def test_convolution_is_that_of_float64(
    operate: Operate, c_in: int, c_out: int, taps: int, side: int, frames: int, height: int, width: int, doubled: bool
) -> None:
    small = (height // 2, width // 2) if doubled else (height, width)
    x = draw(frames + taps - 1, *small, c_in)
    weight, bias, gamma = draw(c_out, c_in, taps, side, side, seed=1), draw(c_out, seed=2), draw(c_out, seed=3)
    residual = draw(frames, height, width, c_out, seed=4)
    expected = convolved(x, weight, bias, doubled)
    past, present = (x[: taps - 1], x[taps - 1 :]) if taps == 3 else (None, x)

    def of(*more: Tensor | None, wanted: Sequence[bool]) -> list[Any]:
        inputs = (present, weight, bias, past, *more)
        return operate("CausalConv3d", inputs, constants=(1, 2), wanted=wanted, doubled=int(doubled))

    close(of(wanted=(True,))[0], expected)
    y, z = of(residual, gamma, wanted=(True, True))
    close(y, expected + residual)
    close(z, normed(expected + residual, gamma), 2e-5)  # a pixel that is near zero is as near as its neighbours
    _, z = of(None, gamma, wanted=(False, True))
    close(z, normed(expected, gamma), 2e-5)


@pytest.mark.parametrize("c_in, c_out, taps", [(384, 384, 3), (512, 480, 3), (1024, 704, 1)])
def test_large_weights_are_transformed_less(libraries: dict[str, Path], c_in: int, c_out: int, taps: int) -> None:
    """Not over time; nor in tiles of 4 x 4; each with frames and tiles that are not whole."""
    x = draw(4 + taps, 5, 6, c_in)
    weight, bias = draw(c_out, c_in, taps, 3, 3, seed=1), draw(c_out, seed=2)
    (y,) = run(libraries[LEVELS[0]], "CausalConv3d", (x, weight, bias), constants=(1, 2), doubled=0)
    close(y, convolved(x, weight, bias), 1e-5)


def test_threads_share_a_convolution(libraries: dict[str, Path]) -> None:
    x, weight, bias = draw(14, 30, 26, 24), draw(40, 24, 3, 3, 3, seed=1), draw(40, seed=2)
    path = libraries[LEVELS[0]]
    one, three = (
        run(path, "CausalConv3d", (x, weight, bias), constants=(1, 2), threads=n, doubled=0)[0] for n in (1, 3)
    )
    assert torch.equal(one, three)


def test_past_frames_may_be_any_of_the_frames(operate: Operate) -> None:
    """In one call as in three, whose pasts are what `LastFrames` gives."""
    x, weight, bias = draw(9, 5, 5, 8), draw(8, 8, 3, 3, 3, seed=1), draw(8, seed=2)
    past, parts = torch.zeros(2, 5, 5, 8), []
    for chunk in x.split((1, 5, 3)):
        parts += operate("CausalConv3d", (chunk, weight, bias, past), constants=(1, 2), doubled=0)
        (past,) = operate("LastFrames", (past, chunk))
    assert torch.equal(past, x[-2:])
    close(torch.cat(parts), convolved(torch.cat((torch.zeros(2, 5, 5, 8), x)), weight, bias))


@pytest.mark.parametrize("frames, height, width, c_in, c_out", [(1, 2, 2, 3, 5), (3, 6, 70, 16, 33)])
def test_halving_convolution_is_that_of_float64(
    operate: Operate, frames: int, height: int, width: int, c_in: int, c_out: int
) -> None:
    x, weight, bias = draw(frames, height, width, c_in), draw(c_out, c_in, 3, 3, seed=1), draw(c_out, seed=2)
    images = F.pad(x.double().permute(0, 3, 1, 2), (0, 1, 0, 1))
    expected = F.conv2d(images, weight.double(), bias.double(), stride=2).permute(0, 2, 3, 1)
    close(operate("HalvingConv2d", (x, weight, bias), constants=(1, 2))[0], expected)


def test_norm_of_zeros_is_zero_and_silu_is_finite_at_both_ends(operate: Operate) -> None:
    gamma = torch.cat((draw(20, seed=1), torch.tensor([1e4, -1e4, 0.0])))
    x = torch.stack((torch.zeros(23), draw(23), draw(23) * 1e10, torch.ones(23)))
    for silu in (0, 1):
        (y,) = operate("RMSNorm", (x, gamma), silu=silu)
        expected = F.rms_norm(x.double(), (23,), gamma.double(), 1e-24)
        close(y, F.silu(expected) if silu else expected)
        assert torch.equal(y[0], torch.zeros(23))
    steps = torch.linspace(-100, 95, 4001)[:, None].repeat(1, 2)  # of x / |x| * gamma = gamma
    for gamma_at in (-88.5, -30.0, -1.0, -1e-3, 1e-3, 1.0, 30.0, 89.0):
        (y,) = operate("RMSNorm", (torch.ones_like(steps), torch.full((2,), gamma_at)), silu=1)
        expected = F.silu(torch.tensor(gamma_at, dtype=torch.float64))
        assert float((y.double() - expected).abs().max()) <= 4e-7 * abs(float(expected)) + 1e-36


@pytest.mark.parametrize(
    "inputs, constants, message",
    [
        ((draw(3, 4, 4, 8), draw(8, 8, 3, 3, 3), draw(8)), (2,), "weights must be constants of the graph"),
        ((draw(3, 4, 4, 8), draw(8, 8, 2, 3, 3), draw(8)), (1, 2), "taps and side must be 1 or 3"),
        ((draw(3, 4, 4, 7), draw(8, 8, 3, 3, 3), draw(8)), (1, 2), "x must be"),
        ((draw(1, 4, 4, 8), draw(8, 8, 3, 3, 3), draw(8)), (1, 2), "as many frames as the kernel has taps"),
        ((draw(3, 4, 4, 8), draw(8, 8, 3, 3, 3), draw(8), draw(2, 4, 5, 8)), (1, 2), "past frames must have the sides"),
        ((draw(3, 4, 4, 8), draw(8, 8, 3, 3, 3), draw(8), None, draw(1, 4, 4, 9)), (1, 2), "residual must have"),
        ((draw(3, 4, 4, 8), draw(8, 8, 3, 3, 3), draw(8), None, None, draw(9)), (1, 2), "gamma must be"),
    ],
)
def test_what_does_not_fit_is_an_error(
    libraries: dict[str, Path], inputs: Sequence[Tensor | None], constants: Sequence[int], message: str
) -> None:
    wanted = (True, True) if len(inputs) == 6 else (True,)
    with pytest.raises(Exception, match=message):
        run(libraries[LEVELS[0]], "CausalConv3d", inputs, constants=constants, wanted=wanted, doubled=0)


# --- the library ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Any:
    """What has been compiled in this process is forgotten, before and after."""
    library._compiled.cache_clear()
    yield
    library._compiled.cache_clear()


def test_processor_without_a_library_has_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for capability, level in (("AVX512", "AVX512"), ("AVX2", "AVX2"), ("DEFAULT", None)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda told=capability: told)
        assert library.level() == level
    for machine, level in (("aarch64", "NEON"), ("riscv64", None)):
        monkeypatch.setattr(platform, "machine", lambda told=machine: told)
        assert library.level() == level


@pytest.mark.usefixtures("fresh")
def test_compilers_own_words_are_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(library, "COMPILERS", ("g++",))
    with pytest.raises(RuntimeError, match=r"cannot compile the operators: error: unrecognized option -std=c\+\+17"):
        library.build(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"install g\+\+"):
        library.build(tmp_path)


def test_model_is_valid_for_the_checker() -> None:
    """An operator that ONNX does not know is none of its business, but its domain has to be declared."""
    node = helper.make_node("LastFrames", ["a", "b"], ["c"], domain="skylapse")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 3, 4]) for name in "abc"]
    graph = helper.make_graph([node], "one", values[:2], values[2:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("skylapse", 1)]
    onnx.checker.check_model(helper.make_model(graph, opset_imports=opsets, ir_version=10), full_check=True)


def test_libraries_that_an_image_brings_need_no_compiler(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "READY", tmp_path / "ready")
    made = libraries[LEVELS[0]].parent
    monkeypatch.setattr(library, "_compiled", lambda level: (made / library.name_of(level)).read_bytes())
    library.main([])
    monkeypatch.undo()
    monkeypatch.setattr(library, "READY", tmp_path / "ready")
    monkeypatch.setattr(library, "compiler", lambda: None)
    assert library.can_build()
    library._compiled.cache_clear()
    (tmp_path / "built").mkdir()
    library.build(tmp_path / "built")
    for level in LEVELS:
        assert (tmp_path / "built" / library.name_of(level)).read_bytes() == libraries[level].read_bytes()
    library._compiled.cache_clear()
    monkeypatch.setattr(library, "READY", tmp_path / "nothing")  # as after a change of the sources
    assert not library.can_build()
    with pytest.raises(RuntimeError, match="a C\\+\\+ compiler is needed"):
        library.build(tmp_path / "built")
    library._compiled.cache_clear()
