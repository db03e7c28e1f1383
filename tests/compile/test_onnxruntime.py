"""ONNX Runtime on the CPU codes as eager does: static and dynamic graphs, sizes, chunks, streams side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coded_clips import clip, coded, stream

from skylapse.compile.backend import Unavailable
from skylapse.compile.onnxruntime import OnnxRuntime
from skylapse.compile.stream import Coder, Plan, Run

Exported = Callable[[str, Plan], Path]
CPU = torch.device("cpu")
ANY, SIZE = Plan(lowering="native"), (4, 6)
STATIC = [
    ("2.1", Plan(size=SIZE)),
    ("2.2", Plan(size=SIZE, chunk=3)),
    ("2.1", Plan(size=SIZE, lowering="planar")),
    ("encoder", Plan(size=SIZE, lowering="planar")),
    ("encoder", Plan(size=SIZE, lowering="native")),
]


@pytest.fixture(scope="module")
def load(coders: dict[str, Coder], exported: Exported) -> Callable[[str, Plan], Run]:
    backend = OnnxRuntime(CPU, threads=1)
    return lambda name, plan: backend.load(coders[name], plan, exported(name, plan))


def error(run: Run, coder: Coder, num_latents: int, size: tuple[int, int], chunk: int) -> float:
    x = clip(coder, num_latents, size)
    expected = coded(coder, coder, x, chunk)
    return float((coded(run, coder, x, chunk) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("size", "chunk"), [((4, 6), 1), ((5, 3), 3), ((7, 8), 4)])
def test_dynamic_graphs_decode_as_eager_does(
    coders: dict[str, Coder], load: Callable[[str, Plan], Run], size: tuple[int, int], chunk: int
) -> None:
    """Wan2.2's, which has all that Wan2.1's has but one block's shortcut."""
    assert error(load("2.2", ANY), coders["2.2"], 8, size, chunk) < 1e-5


def test_dynamic_graphs_of_frames_in_planes_decode_as_eager_does(
    coders: dict[str, Coder], load: Callable[[str, Plan], Run]
) -> None:
    """What is built where no C++ compiler is."""
    for size, chunk in (((4, 6), 1), ((5, 3), 4)):
        assert error(load("2.1", Plan(lowering="planar")), coders["2.1"], 8, size, chunk) < 1e-5


@pytest.mark.parametrize(("name", "plan"), STATIC)
def test_static_graphs_code_as_eager_does(
    coders: dict[str, Coder], load: Callable[[str, Plan], Run], name: str, plan: Plan
) -> None:
    for chunk in (3,) if plan.chunk else (1, 3, 4):
        assert error(load(name, plan), coders[name], 7, SIZE, chunk) < 1e-5


def test_distilled_decoder_decodes_as_eager_does(coders: dict[str, Coder], load: Callable[[str, Plan], Run]) -> None:
    """A family of its own, of which nothing is known here but its module and its sides."""
    for size, chunk in (((4, 6), 3), ((3, 5), 1)):
        assert error(load("distilled", ANY), coders["distilled"], 7, size, chunk) < 1e-5


def test_clips_side_by_side_and_begun_anew_do_not_meet(
    coders: dict[str, Coder], load: Callable[[str, Plan], Run]
) -> None:
    """Two clips of different sizes, a chunk of each in turn; one is left half-way and begun again."""
    coder, run = coders["2.2"], load("2.2", ANY)
    a, b = clip(coder, 6, (4, 6), seed=1), clip(coder, 6, (5, 3), seed=2)
    alone = coded(run, coder, a, 2), coded(run, coder, b, 1)
    with torch.inference_mode():
        left = stream(run, coder, a, 2)
        next(left), next(left)
        first, second = stream(run, coder, a, 2), stream(run, coder, b, 1)
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for _ in range(6):
            for part, source in zip(parts, (first, second), strict=True):
                part.extend([y] if (y := next(source, None)) is not None else [])
    assert torch.equal(torch.cat(parts[0], dim=2), alone[0])
    assert torch.equal(torch.cat(parts[1], dim=2), alone[1])


def test_states_are_the_callers_own(coders: dict[str, Coder], load: Callable[[str, Plan], Run]) -> None:
    """A chunk coded twice from the same states gives the same, and eager goes on from them."""
    coder, run = coders["2.2"], load("2.2", ANY)
    x = clip(coder, 5, (4, 6))
    with torch.inference_mode():
        _, states = run(x[:, :, :1], None)
        kept = [state.clone() for state in states]
        first, second = run(x[:, :, 1:], states)[0], run(x[:, :, 1:], states)[0]
        assert torch.equal(first, second)
        assert all(torch.equal(a, b) for a, b in zip(states, kept, strict=True))
        assert (coder(x[:, :, 1:], states)[0] - first).abs().max() < 1e-5 * first.abs().max()


def test_size_or_chunk_that_a_static_graph_has_not_is_refused(
    coders: dict[str, Coder], load: Callable[[str, Plan], Run]
) -> None:
    run = load("2.2", Plan(size=(4, 6), chunk=3))
    coder = coders["2.2"]
    with pytest.raises(Exception, match=r"Got invalid dimensions for input|INVALID_ARGUMENT"):
        run(clip(coder, 1, (5, 6)), None)
    _, states = run(clip(coder, 1, (4, 6)), None)
    with pytest.raises(Exception, match=r"Got invalid dimensions for input|INVALID_ARGUMENT"):
        run(clip(coder, 3, (4, 6))[:, :, 1:], states)


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxRuntime(CPU)
    assert backend.missing(Plan()) is None
    assert "fp32" in (backend.missing(Plan("bf16")) or "")
    assert "onnxruntime-gpu" in (OnnxRuntime(torch.device("cuda")).missing(Plan()) or "")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'skylapse[compile]'" in (backend.missing(Plan()) or "")


def test_missing_runtime_loads_nothing(
    coders: dict[str, Coder], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("distilled", ANY)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(Unavailable, match=r"skylapse\[compile\]"):
        OnnxRuntime(CPU).load(coders["distilled"], ANY, folder)
