"""`skylapse serve` whose engines write down how long they worked, where no kill can take it."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from skylapse.runtime.core.config import load_settings
from skylapse.runtime.engine.engine import Engine
from skylapse.serve import app
from skylapse.serve.commands import serve as command
from skylapse.serve.deployment.replica import EngineReplica

FOLDER = "worked"  # in the service's: a file of seconds for each engine process


def clocked(work: Callable[..., Any], file: int) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            os.write(file, struct.pack("d", time.perf_counter() - began_s))  # the kernel's, once this returns

    return timed


class Clocked(EngineReplica):
    """Defined in `__main__`, so that Ray ships it by value: its workers need not find the tests."""

    def load(self) -> Engine:
        from skylapse.serve.engine import worker
        from skylapse.serve.engine.job_media import finished

        engine = super().load()
        folder = self.config.folder / FOLDER
        folder.mkdir(exist_ok=True)
        file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        engine._batch.tick = clocked(engine._batch.tick, file)  # type: ignore[method-assign]
        vars(worker)["finished"] = clocked(finished, file)
        return engine


if __name__ == "__main__":
    app.build = partial(app.application, engine=Clocked)  # type: ignore[assignment]
    sys.exit(command.serve(sys.argv[1:], load_settings()))
