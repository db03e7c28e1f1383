"""`skylapse serve` whose engines have a GPU that is none: its Xids are read from a file. Run by test_sick_gpu.py."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from skylapse.runtime.core.config import load_settings
from skylapse.serve import app
from skylapse.serve.commands import serve as command
from skylapse.serve.deployment.replica import EngineReplica
from skylapse.serve.engine.gpu_health import GpuHealth, GpuWatch

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_nvml


class Told(fake_nvml.FakeNvml):  # type: ignore[misc]  # found through pytest's `pythonpath`
    """Takes one line of a file for one event."""

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> object:
        file = Path(os.environ["SKYLAPSE_TEST_XIDS"])
        if file.exists():
            self.xids += [int(line) for line in file.read_text().split()]
            file.unlink()
        return super().nvmlEventSetWait_v2(events, timeout_ms)


class OnThatGpu(EngineReplica):
    """Defined in `__main__`, so that Ray ships it by value: its workers need not find the tests."""

    def watch_gpu(self) -> GpuWatch:
        return GpuWatch(GpuHealth(Told(), fake_nvml.HANDLE))


if __name__ == "__main__":
    app.build = partial(app.application, engine=OnThatGpu)  # type: ignore[assignment]
    sys.exit(command.serve(sys.argv[1:], load_settings()))
