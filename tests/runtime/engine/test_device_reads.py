"""A step seldom waits for the device: one read for all the decisions of a stage, none for static masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import CACHES, Recorder, engine_of, small_request
from torch.utils._python_dispatch import TorchDispatchMode

from skylapse.runtime.engine import batch, denoise

STATIC = [cache for cache in CACHES if not cache.startswith(("easy", "first_block"))]


class Scalars(TorchDispatchMode):
    """Refuses `item`, `float` and `bool` of a tensor, for each of which a step would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step reads a scalar"
        return func(*args, **(kwargs or {}))


class Reads:
    """Counts the lists that steps read from tensors (`tolist`), and the stages of decisions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages = self.lists = self.most_asking = 0
        self._steps = False
        ask, tolist = denoise._ask, torch.Tensor.tolist

        def asked(asking: list[Any], probes: Any) -> None:
            self.stages += bool(asking)
            self.most_asking = max(self.most_asking, len(asking))
            ask(asking, probes)

        def counted(tensor: torch.Tensor) -> Any:
            self.lists += self._steps
            return tolist(tensor)

        monkeypatch.setattr(denoise, "_ask", asked)
        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        for name in ("skip_ahead", "evaluate"):
            monkeypatch.setattr(batch, name, self._watched(getattr(denoise, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            self._steps = True
            try:
                with Scalars():  # type: ignore[no-untyped-call]
                    return function(*arguments)
            finally:
                self._steps = False

        return watched


def run_together(folder: Path, caches: list[str]) -> None:
    together = Recorder(engine_of(folder))
    for k, cache in enumerate(caches):
        together.engine.submit(small_request(cache, k))
    together.run()
    assert any("0" in together.trace(ticket) for ticket in together.trajectories)


def test_static_masks_need_no_read(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    run_together(folders["wan2.1-t2v"], STATIC)
    assert (reads.stages, reads.lists) == (0, 0)


def test_a_stage_reads_once_for_all_requests_together(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    run_together(folders["wan2.1-t2v"], CACHES * 2)
    assert reads.lists == reads.stages > 0 and reads.most_asking > 1
