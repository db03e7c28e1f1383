"""`skylapse serve` whose engine dies when a prompt says so: run as a script by test_poison.py."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from typing import Any

from skylapse.runtime.core.config import load_settings
from skylapse.runtime.core.events import Progress
from skylapse.runtime.engine.engine import Engine
from skylapse.serve import app
from skylapse.serve.commands import serve as command
from skylapse.serve.deployment.replica import EngineReplica


class Poisoned(EngineReplica):
    """Defined in `__main__`, so that Ray ships it by value: its workers need not find the tests."""

    def load(self) -> Engine:
        engine = super().load()
        stream = engine.stream

        async def poisoned(request: Any, *rest: Any, **terms: Any) -> Any:
            async for event in stream(request, *rest, **terms):
                if "poison" in request.prompt and isinstance(event, Progress) and event.step >= 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield event

        engine.stream = poisoned  # type: ignore[method-assign]
        return engine


if __name__ == "__main__":
    app.build = partial(app.application, engine=Poisoned)  # type: ignore[assignment]
    sys.exit(command.serve(sys.argv[1:], load_settings()))
