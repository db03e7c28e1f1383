"""The command line in a folder of its own, with an engine behind it that only counts."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skylapse.cli import main
from skylapse.runtime.checkpoints import registry
from skylapse.runtime.core.events import Failed, Finished, Progress
from skylapse.runtime.core.request import ModelDefaults, ModelLimits, Video, VideoMetadata, VideoRequest


class FakeEngine:
    """Counts to `num_inference_steps` and returns black frames; `failure`, if any, comes instead of the second step."""

    failure: BaseException | None = None
    loaded: list[dict[str, Any]]
    requests: list[VideoRequest]

    device = "cpu"
    dtype = "torch.float32"
    quantize = None
    defaults = ModelDefaults(
        width=64, height=48, num_frames=9, fps=8, num_inference_steps=3, guidance_scale=4.0, solver="unipc", shift=3.0
    )
    limits = ModelLimits(size_multiple=16, max_num_frames=81, max_pixels=256 * 256)

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> "FakeEngine":
        cls.loaded.append({"name": name, **options})
        return cls()

    def submit(self, request: VideoRequest) -> int:
        self.requests.append(request)
        self._events = self._run(request.resolved(self.defaults, self.limits))
        return 0

    def has_work(self) -> bool:
        return True

    def step(self) -> list[Progress | Finished | Failed]:
        return [next(self._events)]

    def _run(self, request: VideoRequest) -> Iterator[Progress | Finished | Failed]:
        width, height, num_frames = request.size
        num_steps = request.num_inference_steps or 0
        for step in range(1, num_steps + 1):
            if step == 2 and isinstance(self.failure, KeyboardInterrupt):
                raise self.failure
            if step == 2 and isinstance(self.failure, Exception):
                yield Failed(0, self.failure)
            yield Progress(0, step, num_steps)
        timings_s, cut_tokens = {"denoise": 1.25, "decode": 0.5}, {"negative_prompt": 3}
        metadata = VideoMetadata(request=request, timings_s=timings_s, cut_tokens=cut_tokens)
        yield Finished(0, Video(np.zeros((num_frames, height, width, 3), np.uint8), request.fps or 0, metadata))


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str
    files: list[str] = field(default_factory=list)


class Command:
    """`skylapse` in a folder of its own, with FakeEngine behind it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], engine: type[FakeEngine]) -> None:
        self.folder, self.engine, self._capsys = folder, engine, capsys

    def __call__(self, *arguments: str) -> Result:
        try:
            status = main(arguments)
        except SystemExit as exit:  # --help, --version
            status = int(exit.code or 0)
        stdout, stderr = self._capsys.readouterr()
        return Result(status, stdout, stderr, sorted(path.name for path in self.folder.iterdir()))


def command_in(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line, with an engine that makes nothing in the place of ours."""
    engine = type("Engine", (FakeEngine,), {"loaded": [], "requests": []})
    known = SimpleNamespace(defaults=FakeEngine.defaults, limits=FakeEngine.limits)  # of "demo" alone
    monkeypatch.setattr(registry, "known_folder", lambda name, cache_dir: known if name == "demo" else None)
    module = ModuleType("skylapse.runtime.engine.engine")
    module.__dict__.update(Engine=engine)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("SKYLAPSE_DEBUG", raising=False)
    monkeypatch.chdir(folder)
    return Command(folder, capsys, engine)
