"""Plans of the stand-in, a stream of a machine without a GPU, and clips to decode by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skylapse.compile import tensorrt_build
from skylapse.compile.stream import FIRST, NEXT, Coder
from skylapse.compile.tensorrt_build import BuildRequest, profile_of

from .stand_in import NEEDED_BYTES, StandIn

BINDINGS = Path(__file__).parents[2] / ".venv" / "tensorrt"
DYNAMIC = ((1, 2, 2), (3, 4, 6), (4, 8, 8))  # smallest, likeliest, largest
needs_bindings = pytest.mark.skipif(
    not (BINDINGS / "api.json").exists(), reason="NVIDIA's bindings are not there: make tensorrt-bindings"
)


class HostStream:
    """A stream of a machine without a GPU; what it captures is done when it is replayed."""

    handle = 7

    def __init__(self, trt: StandIn) -> None:
        self.trt, self.captured = trt, 0
        self.handed_out: list[Tensor] = []

    def hand_out(self, tensor: Tensor) -> None:
        self.handed_out.append(tensor)

    def section(self) -> Any:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        queued: list[Callable[[], None]] = []
        self.trt.captured = queued
        try:
            work()
        finally:
            self.trt.captured = None

        def replay() -> None:
            for run in queued:
                run()

        return replay


def request(graphs: Path, coder: Coder, graph: str, folder: Path, **fields: Any) -> BuildRequest:
    plan = str(folder / f"{graph}.plan")
    options = {"profile": profile_of(coder, graph, *DYNAMIC), "workspace_bytes": NEEDED_BYTES} | fields
    return BuildRequest(str(graphs / f"{graph}.onnx"), plan, **options)


def plans(graphs: Path, coder: Coder, folder: Path) -> dict[str, bytes]:
    requests = {graph: request(graphs, coder, graph, folder) for graph in (FIRST, NEXT)}
    for one in requests.values():
        tensorrt_build.run(one)
    return {graph: Path(one.plan).read_bytes() for graph, one in requests.items()}


@contextmanager
def checked(x: Tensor) -> Iterator[None]:
    before = x.clone()
    yield
    assert torch.equal(x, before), "the caller's latents were written to"


def decoded(run: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    states = None
    for chunk in chunks:
        with checked(chunk), torch.inference_mode():
            frames, states = run(chunk, states)
        yield frames


def chunks(seed: int, height: int, width: int, lengths: tuple[int, ...] = (1, 3, 4, 1, 3, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 4, length, height, width, generator=generator) for length in lengths]
